"""Match detections with ground-truth objects at an IoU of 0.5, as pycocotools does.

pycocotools keeps the IoU of equal classes only. What a detection of another class overlaps is
needed for its kind of error and for the confusion matrix. Letters: D detections, G objects.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as rle_tools

FOREGROUND_IOU = 0.5

Entry = Mapping[str, Any]  # an annotation or a result with indices as ids, for COCOeval


@dataclass(frozen=True)
class ImageMatches:
    """The detections of an image, best first, and what they overlap.

    Attributes:
        scores, labels: float `(D,)` and int `(D,)`.
        gt_labels: int `(G,)`, of the objects without crowds.
        iou: float `(D, G)`.
        matched: int `(D,)`, the object of the same class, which no other detection has, or -1.
        ignored: bool `(D,)`: matches no object, but a crowd of its class; it does not count.
    """

    scores: np.ndarray
    labels: np.ndarray
    gt_labels: np.ndarray
    iou: np.ndarray
    matched: np.ndarray
    ignored: np.ndarray


def match_images(
    annotations: Iterable[Entry], results: Iterable[Entry], iou_type: str, num_images: int
) -> Iterator[ImageMatches]:
    """Yield the matches of each image, in the order of their indices.

    Args:
        annotations, results: with `image_id` in `0..num_images - 1`, `category_id` from 0, `bbox`
            (x, y, width, height) or for "segm" `segmentation`, a run-length code; annotations with
            `iscrowd`, results with `score`.
        iou_type: "bbox" or "segm".
    """
    objects_of, results_of = _group(annotations), _group(results)
    for image in range(num_images):
        yield _match_image(objects_of[image], results_of[image], iou_type)


def greedy_match(
    iou: np.ndarray, is_crowd: np.ndarray | None = None, is_ignored: np.ndarray | None = None
) -> np.ndarray:
    """Match rows, best first, with the remaining columns: the highest IoU of at least 0.5.

    Of several columns with this IoU the last one is taken, as by pycocotools.

    Args:
        iou: `(D, G)`.
        is_crowd: bool `(G,)`, columns that several rows match; None: none.
        is_ignored: bool `(G,)`, columns that a row matches only if no other is left; None: none.

    Returns:
        int `(D,)`: the column of each row, or -1.

    Example:
        >>> greedy_match(np.array([[0.6, 0.5], [0.9, 0.4], [0.7, 0.8]]))
        array([ 0, -1,  1])
    """
    none = np.zeros(iou.shape[1], bool)
    is_crowd = none if is_crowd is None else is_crowd
    is_ignored = none if is_ignored is None else is_ignored
    matched, remains = np.full(len(iou), -1), ~none
    for row in np.flatnonzero((iou >= FOREGROUND_IOU).any(axis=1)):
        candidates = (iou[row] >= FOREGROUND_IOU) & (remains | is_crowd)
        if (candidates & ~is_ignored).any():
            candidates &= ~is_ignored
        if candidates.any():
            values = np.where(candidates, iou[row], -1.0)
            matched[row] = len(values) - 1 - int(values[::-1].argmax())
            remains[matched[row]] = False
    return matched


def _group(entries: Iterable[Entry]) -> dict[int, list[Entry]]:
    groups: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry["image_id"]].append(entry)
    return groups


def _match_image(
    annotations: list[Entry], results: list[Entry], iou_type: str, max_dets: int = 100
) -> ImageMatches:
    crowds = [entry for entry in annotations if entry["iscrowd"]]
    objects = [entry for entry in annotations if not entry["iscrowd"]]
    results = sorted(results, key=lambda entry: -entry["score"])
    labels = np.array([entry["category_id"] for entry in results], int)
    # The best of each class, as COCO's AP at 100 detections.
    rank = np.zeros(len(labels), int)
    for label in np.unique(labels):
        rank[labels == label] = np.arange(np.count_nonzero(labels == label))
    results = [entry for entry, number in zip(results, rank, strict=True) if number < max_dets]
    labels = labels[rank < max_dets]
    gt_labels = np.array([entry["category_id"] for entry in objects], int)
    crowd_labels = np.array([entry["category_id"] for entry in crowds], int)
    iou = _iou(results, objects, iou_type)
    matched = greedy_match(np.where(labels[:, None] == gt_labels, iou, 0))
    in_crowd = _iou(results, crowds, iou_type) >= FOREGROUND_IOU
    in_crowd = (in_crowd & (labels[:, None] == crowd_labels)).any(axis=1)
    scores = np.array([entry["score"] for entry in results], float)
    return ImageMatches(scores, labels, gt_labels, iou, matched, in_crowd & (matched < 0))


def _iou(results: list[Entry], annotations: list[Entry], iou_type: str) -> np.ndarray:
    """Return the IoU `(D, G)`; for crowds the shared part of the detection's area."""
    if not results or not annotations:
        return np.zeros((len(results), len(annotations)))
    key = {"bbox": "bbox", "segm": "segmentation"}[iou_type]
    regions = ([entry[key] for entry in entries] for entries in (results, annotations))
    return rle_tools.iou(*regions, [entry["iscrowd"] for entry in annotations])
