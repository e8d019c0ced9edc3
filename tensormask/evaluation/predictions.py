"""Images of an evaluation: predictions beside ground truth, and a montage of them."""

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
SHEET_COLUMNS = 2
SHEET_CELL_WIDTH = 800


def write_images(
    output_dir: Path, dataset: Any, image_ids: Sequence[Identity], results_file: Path
) -> None:
    """Draw the detections of some images from a file of `ResultsWriter`.

    `<output_dir>/images/<stem>.png` has each beside its ground truth, and
    `<output_dir>/montage.png` small copies of all.
    """
    drawn: dict[Identity, list[Result]] = {image_id: [] for image_id in image_ids}
    for result in read_results(results_file) if drawn else ():
        if result["image_id"] in drawn and result["score"] >= DRAWN_SCORE:
            drawn[result["image_id"]].append(result)
    stems: set[str] = set()
    sheet = []
    for image_id, results in drawn.items():
        rgb, _ = dataset.load(image_id)
        detections = detections_of(results, dataset.category_ids)
        predicted = draw_instances(
            rgb,
            detections["boxes"],
            detections["labels"],
            detections.get("masks"),
            detections["scores"],
            dataset.class_names,
        )
        truth, num_crowds = draw_ground_truth(rgb, dataset, image_id)
        truth_title = "ground truth"
        if num_crowds:
            truth_title += f", without {num_crowds} crowd" + "s" * (num_crowds > 1)
        titles = (f"predicted, score >= {DRAWN_SCORE}", truth_title)
        panel = side_by_side(predicted, truth, titles)
        stem = unique_stem(Path(dataset.image(image_id)["file_name"]).stem, stems)
        save_image(output_dir / "images" / f"{stem}.png", panel)
        sheet.append(shrink(panel, SHEET_CELL_WIDTH))
    if sheet:
        sheet = montage(sheet, columns=SHEET_COLUMNS)
        save_image(output_dir / "montage.png", sheet)


def evenly_spread(items: Sequence, count: int) -> list:
    """`count` of `items` (all of them if there are fewer), from the first to the last, in order."""
    count = min(count, len(items))
    if count == 0:
        return []
    places = np.linspace(0, len(items) - 1, count).round().astype(int)
    return [items[place] for place in places]


def draw_ground_truth(rgb: np.ndarray, dataset: Any, image_id: Identity) -> tuple[np.ndarray, int]:
    """`rgb (H, W, 3)` with its annotated objects, and the number of crowds, which are left out."""
    annotations = dataset.annotations(image_id)
    objects = [a for a in annotations if not a["iscrowd"] and (a["bbox"] or a["segmentation"])]
    masks = np.zeros((len(objects), *rgb.shape[:2]), bool)
    boxes = np.zeros((len(objects), 4))
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
