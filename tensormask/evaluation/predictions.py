"""Draw predictions beside ground truth: one file per image, and a montage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle_tools

from tensormask.data.checks.issues import Identity
from tensormask.data.checks.segmentation import segmentation_to_rle
from tensormask.evaluation.results import Result, detections_of, read_results
from tensormask.visualization.grid import montage, shrink, side_by_side
from tensormask.visualization.instances import draw_instances, save_image, unique_stem

DRAWN_SCORE = 0.3
MONTAGE_COLUMNS = 2
MONTAGE_CELL_WIDTH = 800


def write_images(
    output_dir: Path, dataset: Any, image_ids: Sequence[Identity], results_file: Path
) -> None:
    """Draw the detections of some images, which are read from a file of `ResultsWriter`.

    `<output_dir>/images/<stem>.png` shows each image beside its ground truth, and
    `<output_dir>/montage.png` small copies of all.
    """
    results_of: dict[Identity, list[Result]] = {image_id: [] for image_id in image_ids}
    for result in read_results(results_file) if results_of else ():
        if result["image_id"] in results_of and result["score"] >= DRAWN_SCORE:
            results_of[result["image_id"]].append(result)
    stems: set[str] = set()
    thumbnails = []
    for image_id, results in results_of.items():
        rgb, _ = dataset.load(image_id)
        detections = detections_of(results, dataset.category_ids)
        boxes, labels, scores = (detections[key] for key in ("boxes", "labels", "scores"))
        masks, names = detections.get("masks"), dataset.class_names
        predicted = draw_instances(rgb, boxes, labels, masks, scores, names)
        truth, num_crowds = draw_ground_truth(rgb, dataset, image_id)
        left_out = f", without {num_crowds} crowd" + "s" * (num_crowds > 1) if num_crowds else ""
        titles = (f"predicted, score >= {DRAWN_SCORE}", "ground truth" + left_out)
        panel = side_by_side(predicted, truth, titles)
        stem = unique_stem(Path(dataset.image(image_id)["file_name"]).stem, stems)
        save_image(output_dir / "images" / f"{stem}.png", panel)
        thumbnails.append(shrink(panel, MONTAGE_CELL_WIDTH))
    if thumbnails:
        save_image(output_dir / "montage.png", montage(thumbnails, MONTAGE_COLUMNS))


def evenly_spread(items: Sequence, count: int) -> list:
    """Return `count` of `items`, or all if there are fewer, evenly from the first to the last."""
    indices = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[index] for index in indices]


def draw_ground_truth(rgb: np.ndarray, dataset: Any, image_id: Identity) -> tuple[np.ndarray, int]:
    """Draw the annotated objects on a copy of `rgb (H, W, 3)`; return it and the number of crowds.

    Crowds are not drawn.
    """
    annotations = dataset.annotations(image_id)
    objects = [a for a in annotations if not a["iscrowd"] and (a["bbox"] or a["segmentation"])]
    masks, boxes = np.zeros((len(objects), *rgb.shape[:2]), bool), np.zeros((len(objects), 4))
    for mask, box, annotation in zip(masks, boxes, objects, strict=True):
        code = None
        if annotation["segmentation"]:
            code = segmentation_to_rle(annotation["segmentation"], mask.shape)
            mask[:] = rle_tools.decode(code)
        box[:] = annotation["bbox"] or rle_tools.toBbox(code)
    boxes[:, 2:] += boxes[:, :2]
    labels = [dataset.label_of(annotation) for annotation in objects]
    drawn = draw_instances(rgb, boxes, labels, masks, class_names=dataset.class_names)
    return drawn, sum(annotation["iscrowd"] for annotation in annotations)
