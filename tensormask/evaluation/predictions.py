"""Draw predictions beside ground truth: one file per image, and a montage.

A prediction has the color of the ground-truth object that it matches. What matches nothing is red:
false positives on the left, and missed objects on the right.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle_tools

from tensormask.data.checks.issues import Identity
from tensormask.data.checks.segmentation import segmentation_to_rle
from tensormask.evaluation.results import Detections, Result, detections_of, read_results
from tensormask.visualization.colors import UNMATCHED, Color, instance_color
from tensormask.visualization.grid import montage, shrink, side_by_side
from tensormask.visualization.instances import draw_instances, save_image, unique_stem
from tensormask.visualization.overlap import match

DRAWN_SCORE = 0.3  # if the evaluation has no threshold
MONTAGE_COLUMNS = 2
MONTAGE_CELL_WIDTH = 800


def write_images(
    output_dir: Path,
    dataset: Any,
    image_ids: Sequence[Identity],
    results_file: Path,
    threshold: float = DRAWN_SCORE,
) -> None:
    """Draw detections with scores above a threshold, read from a file of `ResultsWriter`.

    `<output_dir>/images/<stem>.png` shows each image beside its ground truth, and
    `<output_dir>/montage.png` small copies of all.
    """
    results_of: dict[Identity, list[Result]] = {image_id: [] for image_id in image_ids}
    for result in read_results(results_file) if results_of else ():
        if result["image_id"] in results_of and result["score"] > threshold:
            results_of[result["image_id"]].append(result)
    stems: set[str] = set()
    thumbnails = []
    for image_id, results in results_of.items():
        rgb, _ = dataset.load(image_id)
        found = detections_of(results, dataset.category_ids)
        panel = draw_beside(rgb, dataset, image_id, found, threshold)
        stem = unique_stem(Path(dataset.image(image_id)["file_name"]).stem, stems)
        save_image(output_dir / "images" / f"{stem}.png", panel)
        thumbnails.append(shrink(panel, MONTAGE_CELL_WIDTH))
    if thumbnails:
        save_image(output_dir / "montage.png", montage(thumbnails, MONTAGE_COLUMNS))


def evenly_spread(items: Sequence, count: int) -> list:
    """Return `count` of `items`, or all if there are fewer, evenly from the first to the last."""
    indices = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[index] for index in indices]


def draw_beside(
    rgb: np.ndarray, dataset: Any, image_id: Identity, found: Detections, threshold: float
) -> np.ndarray:
    """Draw detections on a copy of `rgb (H, W, 3)`, and the ground truth on another one beside it.

    The title states the `threshold` of their scores.

    Each detection, best score first, takes the color of the remaining object with the highest mask
    IoU, of any class, if that is 0.5 or more; the IoU of boxes where there are no masks. Detections
    and objects without a partner are red; in a data set without annotations, no detection is.
    Crowds are not drawn, only counted in the title.
    """
    order = np.argsort(-found["scores"], kind="stable")
    detections = {key: values[order] for key, values in found.items()}
    boxes, labels, scores = (detections[key] for key in ("boxes", "labels", "scores"))
    masks, names = detections.get("masks"), dataset.class_names
    gt_boxes, gt_labels, gt_masks, num_crowds = ground_truth(rgb.shape[:2], dataset, image_id)
    matched = match(boxes, masks, gt_boxes, gt_masks)
    colors: list[Color] | None = None
    if dataset.has_annotations:
        colors = [instance_color(row) if row >= 0 else UNMATCHED for row in matched]
    gt_colors = [
        instance_color(row) if row in matched else UNMATCHED for row in range(len(gt_labels))
    ]
    predicted = draw_instances(rgb, boxes, labels, masks, scores, names, colors=colors)
    truth = draw_instances(rgb, gt_boxes, gt_labels, gt_masks, None, names, colors=gt_colors)
    left_out = f", without {num_crowds} crowd" + "s" * (num_crowds > 1) if num_crowds else ""
    gt_title = "ground truth (red: missed)" if dataset.has_annotations else "no ground truth"
    titles = (f"predicted, score > {threshold:.2g} (red: no match)", gt_title + left_out)
    return side_by_side(predicted, truth, titles)


def ground_truth(
    size: tuple[int, int], dataset: Any, image_id: Identity
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return boxes, labels and masks of the K annotated objects, and the number of crowds.

    Crowds are not among the objects. Masks are bool `(K, *size)`, empty for an object with a box
    only.
    """
    annotations = dataset.annotations(image_id)
    objects = [a for a in annotations if not a["iscrowd"] and (a["bbox"] or a["segmentation"])]
    masks, boxes = np.zeros((len(objects), *size), bool), np.zeros((len(objects), 4))
    for mask, box, annotation in zip(masks, boxes, objects, strict=True):
        code = None
        if annotation["segmentation"]:
            code = segmentation_to_rle(annotation["segmentation"], mask.shape)
            mask[:] = rle_tools.decode(code)
        box[:] = annotation["bbox"] or rle_tools.toBbox(code)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([dataset.label_of(annotation) for annotation in objects], int)
    return boxes, labels, masks, sum(annotation["iscrowd"] for annotation in annotations)
