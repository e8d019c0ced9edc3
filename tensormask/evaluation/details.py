"""The numbers of an evaluation beyond COCO's metrics: `evaluation.json`, for `tensormask report`.

AP by class and size, precision over recall by class, the confusion matrix, what the kinds of error
cost, and how good each image is. Letters: D detections, G objects of an image.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tensormask.data.checks.issues import Identity
from tensormask.evaluation.error_kinds import error_kinds
from tensormask.evaluation.matching import ImageMatches, greedy_match, match_images
from tensormask.utils.files import write_atomically

DETAILS_FILE = "evaluation.json"
SIZES = ("all", "small", "medium", "large")  # COCOeval's axis of areas


def describe_evaluation(
    coco_eval: Any,
    iou_type: str,
    class_names: Sequence[str],
    image_ids: Sequence[Identity],
    threshold: float,
) -> dict[str, Any]:
    """Return the details of an evaluation by one kind of IoU, as JSON values but for NaN.

    Args:
        coco_eval: of `run_evaluator`.
        iou_type: "bbox" or "segm".
        class_names: of its categories 0, 1, ...
        image_ids: of its images 0, 1, ...
        threshold: the confusion matrix and `images` count detections with a higher score.

    Returns:
        `by_class`: see `ap_by_class`; `precision50`: by class the 101 precisions at the recalls
        0, 0.01, ... 1 at an IoU of 0.5; `errors`: see `error_kinds`; `confusion`: rows `[label of
        the object, predicted label, count]`, where the number of classes is the background, at
        `threshold`; `images`: see `image_quality`.
    """
    found = list(
        match_images(
            coco_eval.cocoGt.dataset["annotations"],
            coco_eval.cocoDt.dataset["annotations"],
            iou_type,
            len(image_ids),
        )
    )
    at_100 = coco_eval.eval["precision"][..., list(coco_eval.params.maxDets).index(100)]
    by_class = ap_by_class(at_100, class_names)
    for row, count in zip(by_class, count_objects(found, len(class_names)), strict=True):
        row["objects"] = count
    return {
        "threshold": threshold,
        "by_class": by_class,
        "precision50": {
            name: at_100[0, :, label, 0].round(4).tolist()
            for label, name in enumerate(class_names)
            if at_100[0, :, label, 0].max() >= 0  # -1: no objects
        },
        "errors": error_kinds(found, len(class_names)),
        "confusion": confusion(found, len(class_names), threshold),
        "images": [
            {"image_id": image_id, **image_quality(image, threshold)}
            for image_id, image in zip(image_ids, found, strict=True)
        ],
    }


def write_details(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON; NaN becomes null."""
    text = json.dumps(_without_nan(content), allow_nan=False)
    write_atomically(path, lambda file: file.write(text.encode()))


def ap_by_class(precision: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return `class`, `AP50` and `AP75` of each class, and AP by size, in percent or NaN.

    Args:
        precision: of COCOeval, `(10 IoU thresholds, 101 recalls, classes, 4 areas)`.
    """
    rows = []
    for label, name in enumerate(class_names):
        row: dict[str, Any] = {"class": name}
        row |= {size: _percent(precision[:, :, label, area]) for area, size in enumerate(SIZES)}
        row |= {"AP50": _percent(precision[0, :, label, 0])}
        row |= {"AP75": _percent(precision[5, :, label, 0])}
        rows.append(row)
    return rows


def count_objects(images: Iterable[ImageMatches], num_classes: int) -> list[int]:
    """Return the number of objects of each class, without crowds."""
    counts = np.zeros(num_classes, int)
    for image in images:
        counts += np.bincount(image.gt_labels, minlength=num_classes)
    return counts.tolist()


def confusion(
    images: Iterable[ImageMatches], num_classes: int, threshold: float
) -> list[tuple[int, int, int]]:
    """Count pairs of an object's label and the label that was predicted for it.

    The detections with scores above the threshold take the objects of any class, best score first,
    as in the drawings of an evaluation: `greedy_match`.

    Returns:
        `(label of the object, predicted label, count)` of the pairs that occur. `num_classes` is
        the label of the background: of detections without an object, and of missed objects.
    """
    counts = np.zeros((num_classes + 1, num_classes + 1), int)
    for image in images:
        is_counted = (image.scores > threshold) & ~image.ignored
        labels, matched = image.labels[is_counted], greedy_match(image.iou[is_counted])
        truth = np.append(image.gt_labels, num_classes)[matched]  # -1 is the last one
        np.add.at(counts, (truth, labels), 1)
        missed = np.delete(image.gt_labels, matched[matched >= 0])
        counts[:, num_classes] += np.bincount(missed, minlength=num_classes + 1)
    return [(a, b, int(counts[a, b])) for a, b in np.argwhere(counts).tolist()]


def image_quality(image: ImageMatches, threshold: float) -> dict[str, Any]:
    """Count the detections with scores above a threshold, and measure how good they are together.

    Returns:
        `matched`, `false_positives` and `missed`, and the `quality` of panoptic segmentation (arXiv
        1801.00868) over all classes: the sum of the matches' IoU, divided by matches + (false
        positives + missed) / 2; 0..1, NaN for an image without objects and detections.
    """
    is_counted = (image.scores > threshold) & ~image.ignored
    is_match = is_counted & (image.matched >= 0)
    num_matches, num_false = int(is_match.sum()), int((is_counted & ~is_match).sum())
    num_missed = len(image.gt_labels) - num_matches
    size = num_matches + (num_false + num_missed) / 2
    rows = np.flatnonzero(is_match)
    shared = float(image.iou[rows, image.matched[rows]].sum())
    return {
        "matched": num_matches,
        "false_positives": num_false,
        "missed": num_missed,
        "quality": shared / size if size else math.nan,
    }


def _percent(precision: np.ndarray) -> float:
    """Return the mean in percent; NaN where COCOeval has -1: no objects."""
    return 100 * float(precision.mean()) if precision.min() >= 0 else math.nan


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
