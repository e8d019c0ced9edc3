"""The evaluators that match detections with objects: pycocotools, or faster-coco-eval.

faster-coco-eval is the same algorithm in C++. Its precisions differ by rounding, up to 2e-16:
pycocotools adds that much to the number of detections, by which it divides.
"""

import contextlib
import io
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tensormask.evaluation.matching import greedy_match
from tensormask.evaluation.results import Result
from tensormask.utils.errors import UserError, unknown_name
from tensormask.utils.extras import require

PYCOCOTOOLS, FASTER = EVALUATORS = ("pycocotools", "faster_coco_eval")  # of TEST.EVALUATOR
_BOUNDARY = 0.02  # its width as a share of the image's diagonal


def check_evaluator(
    name: str, *, boundary: bool = False, sizes: Iterable[tuple[int, int]] = ()
) -> None:
    """Check `TEST.EVALUATOR`, and with `boundary` whether it can measure boundary AP.

    Args:
        sizes: `(height, width)` of the images.

    Raises:
        UserError: an unknown evaluator, one that is not installed, or one without boundary AP; an
            image that is too flat for it.
    """
    if name not in EVALUATORS:
        raise UserError(unknown_name("a value of TEST.EVALUATOR", name, EVALUATORS))
    if boundary and name != FASTER:
        raise UserError(
            f"boundary AP (TEST.BOUNDARY_AP) needs TEST.EVALUATOR {FASTER}, it is {name}"
        )
    if name == FASTER:
        require(FASTER, extra="fast-eval")
    for height, width in sizes if boundary else ():
        # All of a mask is boundary then, but faster-coco-eval 1.8 removes a part of it.
        if height <= 2 * max(1, math.ceil(_BOUNDARY * math.hypot(height, width) - 0.5)):
            raise UserError(
                f"boundary AP cannot be measured in images of height {height} and width {width}: "
                "set TEST.BOUNDARY_AP to False"
            )


def run_evaluator(
    name: str, ground_truth: COCO, results: list[Result], iou_type: str, max_dets: list[int]
) -> Any:
    """Match results with objects, and accumulate precisions and recalls.

    Args:
        name: of `EVALUATORS`.
        ground_truth: of `build_ground_truth`; it is changed.
        results: valid, with the ids of `ground_truth`; they are changed.
        iou_type: "bbox", "segm" or "boundary" (of masks: the smaller one of their IoU and that of
            their boundaries, arXiv 2103.16562; the boundary is 2 % of the image's diagonal wide,
            rounded to pixels).
        max_dets: limits of detections per image and class.

    Returns:
        A `COCOeval` of pycocotools, or an object with the same `params`, `eval`, `ious`, `cocoGt`
        and `cocoDt`.
    """
    sizes = ((image["height"], image["width"]) for image in ground_truth.dataset["images"])
    check_evaluator(name, boundary=iou_type == "boundary", sizes=sizes)
    with contextlib.redirect_stdout(io.StringIO()):
        if name == FASTER:
            faster = require(FASTER, extra="fast-eval")
            ground_truth = faster.COCO(ground_truth.dataset)
            found = ground_truth.loadRes(results)
            options = {"boundary_dilation_ratio": _BOUNDARY}
            coco_eval = faster.COCOeval_faster(ground_truth, found, iou_type, **options)
        else:
            found = _load_results(ground_truth, results)
            coco_eval = COCOeval(ground_truth, found, iou_type)
        coco_eval.params.maxDets = sorted(max_dets)
        coco_eval.evaluate()
        coco_eval.accumulate()
    return coco_eval


def _load_results(ground_truth: COCO, results: list[Result]) -> COCO:
    if results:
        return ground_truth.loadRes(results)
    empty = COCO()  # loadRes reads the first result
    empty.dataset = ground_truth.dataset | {"annotations": []}
    empty.createIndex()
    return empty


class Matches(NamedTuple):
    """The detections that count, N of all images and classes, and the number of objects."""

    scores: np.ndarray  # (N,)
    is_match: np.ndarray  # (N,) bool
    num_objects: int


def find_matches(coco_eval: Any, max_dets: int) -> Matches:
    """Match detections with objects of all areas at an IoU of 0.5, as COCOeval.

    faster-coco-eval does not return its matches. Detections that match a crowd, which COCO ignores,
    are left out.

    Args:
        coco_eval: of `run_evaluator`.
        max_dets: detections per image and class.
    """
    lowest, highest = coco_eval.params.areaRng[0]
    objects, scores, is_match = _grouped(coco_eval.cocoGt), list[float](), list[bool]()
    is_ignored = {
        key: np.array([a["iscrowd"] or not lowest <= a["area"] <= highest for a in group], bool)
        for key, group in objects.items()
    }
    for key, group in _grouped(coco_eval.cocoDt).items():
        group = sorted(group, key=lambda found: -found["score"])[:max_dets]
        matched = np.full(len(group), -1)
        if key in objects:
            crowd = np.array([a["iscrowd"] for a in objects[key]], bool)
            ious = np.asarray(coco_eval.ious[key])[:max_dets]
            matched = greedy_match(ious, crowd, is_ignored[key])
        for found, index in zip(group, matched.tolist(), strict=True):
            if index >= 0 and is_ignored[key][index]:
                continue
            if index >= 0 or lowest <= found["area"] <= highest:
                scores.append(found["score"])
                is_match.append(index >= 0)
    num_objects = sum(len(ignored) - int(ignored.sum()) for ignored in is_ignored.values())
    return Matches(np.array(scores, float), np.array(is_match, bool), num_objects)


def _grouped(coco: Any) -> dict[tuple[int, int], list[Result]]:
    """Return the annotations by image and category, in their order."""
    groups: dict[tuple[int, int], list[Result]] = defaultdict(list)
    for entry in coco.dataset["annotations"]:
        groups[entry["image_id"], entry["category_id"]].append(entry)
    return groups
