"""Score detections in COCO's results format, and summarize COCO's metrics."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO

from tensormask.data.checks.annotations import sort_key
from tensormask.data.checks.issues import Identity
from tensormask.evaluation.evaluators import PYCOCOTOOLS, find_matches, run_evaluator
from tensormask.evaluation.ground_truth import build_ground_truth, contiguous_ids
from tensormask.evaluation.results import REGION_KEYS, Result, checked_results
from tensormask.utils.errors import UserError

Metrics = dict[str, float]
Curves = dict[str, list[float]]

STANDARD_MAX_DETS = (1, 10, 100)
AREA_RANGES = {"APs": 1, "APm": 2, "APl": 3}  # metric -> index on COCOeval's area axis; 0 is all


class Scores(NamedTuple):
    """The scores of results by one kind of IoU."""

    metrics: Metrics  # as of `evaluate_results`
    curves: Curves  # `precision_curves`
    class_names: list[str]  # unique, as in the metrics
    coco_eval: Any  # of `run_evaluator`, with images and classes numbered from 0


def evaluate_results(
    coco_gt: COCO,
    results: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    *,
    category_ids: Sequence[Identity] | None = None,
    image_ids: Sequence[Identity] | None = None,
    iou_types: Sequence[str] = ("bbox", "segm"),
    max_dets: int = 100,
    evaluator: str = PYCOCOTOOLS,
) -> dict[str, Metrics]:
    """Score detections in COCO's results format, without changing `coco_gt` or `results`.

    Args:
        class_names: name of each category, in the order of `category_ids`.
        category_ids: the categories to score; None for all, by ascending id.
        image_ids: the images to score; None for all.
        iou_types: some of "bbox", "segm" and "boundary" (see `run_evaluator`); the last two need a
            `segmentation` in each result.
        max_dets, evaluator: as of `evaluate`.

    Returns:
        Per IoU type, in percent, NaN without ground-truth objects: `AP`, `AP50`, `AP75`, `APs`,
        `APm`, `APl` and `AP-<class>` at 100 detections per image and class, and `AP@<max_dets>`
        and `AR@<max_dets>` when `max_dets` is not 100. Also those of `best_f1`.

    Raises:
        ValueError: different numbers of names and categories, images or categories that `coco_gt`
            does not have, invalid results (see `checked_results`), or an invalid RLE in the ground
            truth.
    """
    unknown = set(iou_types) - REGION_KEYS.keys()
    if unknown:
        raise ValueError(f"iou_types are {', '.join(REGION_KEYS)}, not {sorted(unknown)}")
    given = {"categories": (category_ids, coco_gt.cats), "images": (image_ids, coco_gt.imgs)}
    for kind, (ids, known) in given.items():
        missing = [identity for identity in ids or [] if identity not in known]
        if missing:
            raise ValueError(f"the ground truth has no {kind} with the ids {missing[:5]}")
    category_ids = sorted(coco_gt.cats, key=sort_key) if category_ids is None else category_ids
    image_ids = list(coco_gt.imgs) if image_ids is None else image_ids
    if len(class_names) != len(category_ids):
        raise ValueError(f"{len(class_names)} class names for {len(category_ids)} categories")
    results = checked_results(results, coco_gt, iou_types)
    return {
        iou_type: score(
            coco_gt, results, iou_type, class_names, category_ids, image_ids, max_dets, evaluator
        ).metrics
        for iou_type in iou_types
    }


def score(
    coco_gt: COCO,
    results: Iterable[Result],
    iou_type: str,
    class_names: Sequence[str],
    category_ids: Sequence[Identity],
    image_ids: Sequence[Identity],
    max_dets: int,
    evaluator: str = PYCOCOTOOLS,
) -> Scores:
    """Score results by one kind of IoU.

    The results must be valid (see `checked_results`). The order of the categories does not change
    with their ids, so neither does the rounding of the means.
    """
    if max_dets < 1:
        raise UserError(f"max_dets must be 1 or more, got {max_dets}")
    images = contiguous_ids(image_ids)
    categories = {category: i for i, category in enumerate(dict.fromkeys(category_ids))}
    renumbered = [
        {
            "image_id": images[result["image_id"]],
            "category_id": categories[result["category_id"]],
            "score": result["score"],
            # Only one kind of region: loadRes computes areas from the box if it is present.
            REGION_KEYS[iou_type]: result[REGION_KEYS[iou_type]],
        }
        for result in results
        if result["image_id"] in images and result["category_id"] in categories
    ]
    ground_truth = build_ground_truth(coco_gt, images, categories, iou_type)
    limits = [*{*STANDARD_MAX_DETS, max_dets}]
    coco_eval = run_evaluator(evaluator, ground_truth, renumbered, iou_type, limits)
    counts = Counter(class_names)
    category_index = {
        name if counts[name] == 1 else f"{name} (id {category})": categories[category]
        for name, category in zip(class_names, category_ids, strict=True)
    }
    metrics = _summarize(coco_eval, category_index, max_dets) | best_f1(coco_eval, max_dets)
    return Scores(metrics, precision_curves(coco_eval), list(category_index), coco_eval)


def _summarize(coco_eval: Any, category_index: Mapping[str, int], max_dets: int) -> Metrics:
    """Return the metrics of `evaluate_results` from an accumulated evaluation.

    COCOeval's own summary supports only three limits of detections, and reads the third for most
    metrics. At 100 detections both summaries are bit-identical.
    """
    params = coco_eval.params
    precision = coco_eval.eval["precision"]  # (thresholds, recalls, classes, areas, limits)
    at_100 = precision[..., params.maxDets.index(100)]
    metrics = {
        "AP": _mean_percent(at_100[:, :, :, 0]),
        "AP50": _mean_percent(at_100[params.iouThrs == 0.5, :, :, 0]),
        "AP75": _mean_percent(at_100[params.iouThrs == 0.75, :, :, 0]),
    }
    for metric, area in AREA_RANGES.items():
        metrics[metric] = _mean_percent(at_100[:, :, :, area])
    if max_dets != 100:
        limit = params.maxDets.index(max_dets)
        recall = coco_eval.eval["recall"]  # (thresholds, classes, areas, limits)
        metrics[f"AP@{max_dets}"] = _mean_percent(precision[:, :, :, 0, limit])
        metrics[f"AR@{max_dets}"] = _mean_percent(recall[:, :, 0, limit])
    for name, index in category_index.items():
        metrics[f"AP-{name}"] = _mean_percent(at_100[:, :, index, 0])
    return metrics


def precision_curves(coco_eval: Any) -> Curves:
    """Return precision over recall, from 0 to 1; the mean of a curve is the AP of its name.

    Returns:
        `{"AP", "AP50", "AP75"}`, each a list of 101 precisions at the recalls 0, 0.01, ... 1: means
        over the classes, and over the IoU thresholds, at 100 detections. Lists are empty without
        ground-truth objects.
    """
    params = coco_eval.params
    at_100 = coco_eval.eval["precision"][:, :, :, 0, params.maxDets.index(100)]
    at_100 = at_100[:, :, (at_100 > -1).all(axis=(0, 1))]  # classes with objects
    chosen = {"AP": params.iouThrs > 0, "AP50": params.iouThrs == 0.5}
    chosen["AP75"] = params.iouThrs == 0.75
    return {
        name: at_100[thresholds].mean(axis=(0, 2)).tolist() if at_100.size else []
        for name, thresholds in chosen.items()
    }


def best_f1(coco_eval: Any, max_dets: int) -> Metrics:
    """Find the threshold on scores with the best F1 over all classes together, at an IoU of 0.5.

    F1 is 2 TP / (2 TP + FP + FN), of the detections whose score is above the threshold. Detections
    of crowds, which COCO ignores, do not count.

    Args:
        coco_eval: of `run_evaluator`.
        max_dets: detections per image and class.

    Returns:
        `best_f1` in percent, and `best_f1_threshold` in 0..1, halfway between two scores (or just
        below the lowest one); the highest of several. `{}` if no detection matches an object.
    """
    score, is_match, num_objects = find_matches(coco_eval, max_dets)
    if not is_match.any():
        return {}
    order = np.argsort(-score)
    score, num_matches = score[order], np.cumsum(is_match[order])
    # A threshold cannot separate equal scores.
    ends = np.flatnonzero(np.append(score[1:] < score[:-1], True))
    f1 = 2 * num_matches[ends] / (ends + 1 + num_objects)
    best = ends[f1.argmax()]
    lower = score[best + 1] if best + 1 < len(score) else 0.998 * score[best]
    return {"best_f1": 100 * float(f1.max()), "best_f1_threshold": float(score[best] + lower) / 2}


def _mean_percent(values: np.ndarray) -> float:
    """Return 100 times the mean of COCOeval's values, without those of -1 (no objects), or NaN."""
    defined = values[values > -1]
    return 100 * float(np.mean(defined)) if defined.size else float("nan")
