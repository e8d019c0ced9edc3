"""Annotations in the form that pycocotools' evaluation needs."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO

from tensormask.data.checks.annotations import sort_key
from tensormask.data.checks.issues import Identity
from tensormask.data.checks.segmentation import polygon_issue, segmentation_to_rle
from tensormask.utils.errors import UserError

Numbers = Mapping[Identity, int]

logger = logging.getLogger(__name__)


def numbered(ids: Iterable[Identity]) -> dict[Identity, int]:
    """A number from 0 for each id, in ascending order, numbers before strings.

    COCOeval sorts ids by NumPy, which makes strings of all of them if one is a string, and floats
    of large ones; neither is then found in its tables.
    """
    return {identity: number for number, identity in enumerate(sorted(set(ids), key=sort_key))}


def scorable_copy(
    coco_gt: COCO, image_numbers: Numbers, category_numbers: Numbers, iou_type: str
) -> COCO:
    """A copy for COCOeval, which writes into the annotations: training may share the originals.

    It has those images and categories that are given a number, under this number, and those of
    their annotations that have a mask for the `iou_type` "segm", or a box or a mask for "bbox"; how
    many have not is logged.

    Annotations are numbered from 1, since COCOeval takes one with the id 0 for "not found" and two
    with the same id for one object.

    Raises:
        ValueError: an RLE is not of its image's size, or its counts do not add up.
    """
    annotations = []
    num_left_out = 0
    for annotation in coco_gt.dataset.get("annotations", []):
        image_id, category_id = annotation["image_id"], annotation["category_id"]
        if image_id not in image_numbers or category_id not in category_numbers:
            continue
        completed = _completed(annotation, coco_gt.imgs[image_id], iou_type)
        if completed is None:
            num_left_out += 1
            continue
        annotations.append(
            completed
            | {
                "id": len(annotations) + 1,
                "image_id": image_numbers[image_id],
                "category_id": category_numbers[category_id],
            }
        )
    if num_left_out:
        logger.warning("%d annotations have nothing to score as %s", num_left_out, iou_type)
    copy = COCO()
    copy.dataset = {
        "images": [
            {**coco_gt.imgs[image_id], "id": number} for image_id, number in image_numbers.items()
        ],
        "categories": [{"id": number} for number in category_numbers.values()],
        "annotations": annotations,
    }
    copy.createIndex()
    return copy


def has_box(entry: Mapping[str, Any]) -> bool:
    """Whether an annotation or a result has a `bbox` of four finite numbers."""
    box = entry.get("bbox")
    is_box = isinstance(box, Sequence | np.ndarray) and len(box) == 4
    return is_box and all(map(is_finite_number, box))


def is_finite_number(value: Any) -> bool:
    """Whether a value is a number, and neither NaN nor infinite."""
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def _completed(
    annotation: Mapping[str, Any], image: Mapping[str, Any], iou_type: str
) -> dict[str, Any] | None:
    """A shallow copy with the keys that COCOeval insists on and that hand-made files lack.

    For "segm" its mask is a run-length code. None if there is nothing to score.
    """
    completed = {**annotation, "iscrowd": int(bool(annotation.get("iscrowd", 0)))}
    box, area = has_box(annotation), is_finite_number(annotation.get("area"))
    if iou_type == "bbox" and box and area:
        return completed
    code = _mask_code(annotation, (image["height"], image["width"]))
    if code is None:
        if iou_type == "segm" or not box:
            return None
        completed["area"] = completed["bbox"][2] * completed["bbox"][3]
        return completed
    completed["segmentation"] = code
    if not box:
        completed["bbox"] = rle_tools.toBbox(code).tolist()
    if not area:
        completed["area"] = float(rle_tools.area(code))
    return completed


def _mask_code(annotation: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any] | None:
    """The mask as a run-length code, from an RLE or sound polygons; None if there is neither."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list):
        segmentation = [p for p in segmentation if polygon_issue(p, size) is None]
    if not segmentation:
        return None
    try:
        return segmentation_to_rle(segmentation, size)
    except ValueError as error:
        raise UserError(f"annotation {annotation.get('id')} of the ground truth: {error}") from None
