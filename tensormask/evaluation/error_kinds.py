"""The kinds of error that cost AP: TIDE (arXiv 2008.08115, section 2).

A detection that matches no object at an IoU of 0.5 has one of five kinds of error, and an object
that neither a detection nor a correction reaches is missed. The cost of a kind is the AP50 that
its correction, and no other, would add. The costs do not sum to 100 - AP50.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tensormask.evaluation.matching import FOREGROUND_IOU, ImageMatches

BACKGROUND_IOU = 0.1
RECALLS = np.linspace(0, 1, 101)

CLASSIFICATION, LOCALIZATION, BOTH, DUPLICATE, BACKGROUND, MISSED = KINDS = (
    "classification",
    "localization",
    "both",
    "duplicate",
    "background",
    "missed",
)
_NO_ERROR = -1


@dataclass(frozen=True)
class _Detections:
    """All detections that count, images in order, each best first; arrays `(D,)`."""

    scores: np.ndarray
    labels: np.ndarray
    kinds: np.ndarray  # index into KINDS, or -1 for one that matches an object
    objects: np.ndarray  # the object that is matched, or that a correction would match, or -1


def error_kinds(images: Iterable[ImageMatches], num_classes: int) -> dict[str, dict[str, float]]:
    """Return `{kind: {"count", "dAP"}}`, with the `dAP` in percent; NaN without objects.

    - classification: IoU >= 0.5 with an object of another class. Corrected: it has that class.
    - localization: IoU in [0.1, 0.5) with an object of its class. Corrected: it is at the object.
    - both: IoU in [0.1, 0.5) with an object of another class only. Corrected: it is removed.
    - duplicate: IoU >= 0.5 with an object of its class that another detection matches. Removed.
    - background: IoU < 0.1 with every object. Removed.
    - missed: objects without a match, which no correction of the first two kinds reaches. They do
      not count any more.

    A detection that fits several has the first of localization, classification, duplicate, both. If
    several corrected and matched detections are at one object, the best one remains.

    Args:
        num_classes: labels are below.
    """
    detections, gt_labels = _collect(images)
    found = np.isin(np.arange(len(gt_labels)), detections.objects)
    before = _mean_ap(detections, np.bincount(gt_labels, minlength=num_classes), gt_labels)
    result = {}
    for kind, name in enumerate(KINDS):
        is_kind, counted = detections.kinds == kind, gt_labels
        if name == MISSED:
            count, corrected, counted = np.count_nonzero(~found), detections, gt_labels[found]
        elif name in (CLASSIFICATION, LOCALIZATION):
            count, corrected = np.count_nonzero(is_kind), _corrected(detections, kind, gt_labels)
        else:
            count, corrected = np.count_nonzero(is_kind), _where(detections, ~is_kind)
        num_objects = np.bincount(counted, minlength=num_classes)
        after = _mean_ap(corrected, num_objects, gt_labels)
        result[name] = {"count": int(count), "dAP": after - before}
    return result


def average_precision(scores: np.ndarray, is_match: np.ndarray, num_objects: int) -> float:
    """Return COCO's AP in 0..1 of one class: the mean precision at 101 recalls.

    Without objects it is 1 if there are no detections, and else 0.

    Args:
        scores: float `(D,)`; the first of equal scores is the better one.
        is_match: bool `(D,)`.

    Example:
        >>> average_precision(np.array([0.9, 0.8]), np.array([False, True]), 1)
        0.5
    """
    if not num_objects:
        return float(not len(scores))
    num_matches = np.cumsum(is_match[np.argsort(-scores, kind="stable")])
    precision = num_matches / np.arange(1, len(scores) + 1)
    highest_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    indices = np.searchsorted(num_matches / num_objects, RECALLS)
    return float(np.append(highest_from_here, 0)[indices].mean())


def _mean_ap(detections: _Detections, num_objects: np.ndarray, gt_labels: np.ndarray) -> float:
    """Return the mean AP50 in percent of the classes with objects in `gt_labels`."""
    values = []
    for label in np.unique(gt_labels):
        chosen = _where(detections, detections.labels == label)
        values.append(
            average_precision(chosen.scores, chosen.kinds == _NO_ERROR, num_objects[label])
        )
    return 100 * float(np.mean(values)) if values else float("nan")


def _collect(images: Iterable[ImageMatches]) -> tuple[_Detections, np.ndarray]:
    """Join the images; return the detections, and the labels `(G,)` of all objects."""
    parts: list[tuple[np.ndarray, ...]] = []
    gt_labels: list[np.ndarray] = []
    num_objects = 0
    for image in images:
        kinds, objects = _classify(image)
        parts.append((image.scores, image.labels, kinds, _offset(objects, num_objects)))
        parts[-1] = tuple(values[~image.ignored] for values in parts[-1])
        gt_labels.append(image.gt_labels)
        num_objects += len(image.gt_labels)
    columns: Iterator[Sequence[np.ndarray]] = zip(*parts, strict=True)
    empty = np.zeros(0, int)
    joined = [np.concatenate(column) for column in columns] or [empty] * 4
    return _Detections(*joined), np.concatenate([empty, *gt_labels])


def _classify(image: ImageMatches) -> tuple[np.ndarray, np.ndarray]:
    """Return the kind of each detection and the object that it belongs to, both int `(D,)`."""
    same = image.labels[:, None] == image.gt_labels
    of_class, best_of_class = _best(np.where(same, image.iou, 0))
    of_other, best_of_other = _best(np.where(same, 0, image.iou))
    # From the last choice to the first one.
    kinds = np.full(len(image.labels), KINDS.index(BACKGROUND))
    objects = np.full(len(image.labels), -1)
    kinds[of_other >= BACKGROUND_IOU] = KINDS.index(BOTH)
    kinds[of_class >= FOREGROUND_IOU] = KINDS.index(DUPLICATE)
    for name, condition, best in (
        (CLASSIFICATION, of_other >= FOREGROUND_IOU, best_of_other),
        (LOCALIZATION, (of_class >= BACKGROUND_IOU) & (of_class < FOREGROUND_IOU), best_of_class),
    ):
        kinds[condition], objects[condition] = KINDS.index(name), best[condition]
    is_match = image.matched >= 0
    kinds[is_match], objects[is_match] = _NO_ERROR, image.matched[is_match]
    return kinds, objects


def _best(iou: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the highest IoU of each row, 0 without columns, and its column."""
    padded = np.pad(iou, ((0, 0), (0, 1)))
    return padded.max(axis=1), padded.argmax(axis=1)


def _offset(objects: np.ndarray, offset: int) -> np.ndarray:
    return np.where(objects >= 0, objects + offset, -1)


def _corrected(detections: _Detections, kind: int, gt_labels: np.ndarray) -> _Detections:
    """Turn errors of a kind into matches of their objects, where each object keeps its best one."""
    is_kind = detections.kinds == kind
    at_object = is_kind | (detections.kinds == _NO_ERROR)
    rows = np.flatnonzero(at_object)
    rows = rows[np.argsort(-detections.scores[rows], kind="stable")]
    _, first = np.unique(detections.objects[rows], return_index=True)
    kept = ~at_object
    kept[rows[first]] = True
    labels = detections.labels.copy()
    labels[is_kind] = gt_labels[detections.objects[is_kind]]
    kinds = np.where(is_kind, _NO_ERROR, detections.kinds)
    return _where(replace(detections, labels=labels, kinds=kinds), kept)


def _where(detections: _Detections, kept: np.ndarray) -> _Detections:
    """Return the detections of a mask `(D,)`."""
    return _Detections(*(values[kept] for values in vars(detections).values()))
