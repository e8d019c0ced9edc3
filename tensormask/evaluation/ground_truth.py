"""Convert COCO annotations to the form that pycocotools' evaluation needs."""

import contextlib
import io
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

IndexOf = Mapping[Identity, int]

logger = logging.getLogger(__name__)


def contiguous_ids(ids: Iterable[Identity]) -> dict[Identity, int]:
    """Map ids to 0, 1, ... in ascending order, numbers before strings.

    COCOeval sorts ids with NumPy, which converts all of them to strings if one is a string, and
    large ones to floats; its tables then do not contain them.
    """
    return {identity: index for index, identity in enumerate(sorted(set(ids), key=sort_key))}


def build_ground_truth(
    coco_gt: COCO, image_indices: IndexOf, category_indices: IndexOf, iou_type: str
) -> COCO:
    """Build the ground truth for COCOeval, which writes into it: training can share the original.

    It contains the images and categories that have an index, with this index as id, and their
    annotations that have a mask (`iou_type` "segm" or "boundary"), or a box or a mask ("bbox"). The
    number of other annotations is logged. Only the keys that evaluators need are taken: some read
    others too, such as "ignore" or "lvis_mark".

    Annotations are numbered from 1: COCOeval reads the id 0 as "not matched", and two annotations
    with the same id as one object.

    Raises:
        ValueError: an RLE is not of its image's size, or its counts do not add up.
    """
    annotations: list[dict[str, Any]] = []
    num_left_out = 0
    for annotation in coco_gt.dataset.get("annotations", []):
        image_id, category_id = annotation["image_id"], annotation["category_id"]
        if image_id not in image_indices or category_id not in category_indices:
            continue
        completed = _complete(annotation, coco_gt.imgs[image_id], iou_type)
        if completed is None:
            num_left_out += 1
            continue
        completed["id"] = len(annotations) + 1
        completed["image_id"] = image_indices[image_id]
        completed["category_id"] = category_indices[category_id]
        annotations.append(completed)
    if num_left_out:
        logger.warning("%d annotations have no region to score as %s", num_left_out, iou_type)
    ground_truth = COCO()
    ground_truth.dataset = {
        "images": [{**coco_gt.imgs[image], "id": index} for image, index in image_indices.items()],
        "categories": [{"id": index} for index in category_indices.values()],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        ground_truth.createIndex()
    return ground_truth


def has_box(entry: Mapping[str, Any]) -> bool:
    """Return whether an annotation or a result has a `bbox` of four finite numbers."""
    box = entry.get("bbox")
    return (
        isinstance(box, Sequence | np.ndarray) and len(box) == 4 and all(map(is_finite_number, box))
    )


def is_finite_number(value: Any) -> bool:
    """Return whether a value is a number, and neither NaN nor infinite."""
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an integer larger than any float
        return False


def _complete(
    annotation: Mapping[str, Any], image: Mapping[str, Any], iou_type: str
) -> dict[str, Any] | None:
    """Return the keys that COCOeval needs, also those that hand-made files can lack.

    But for "bbox" it has a mask, as a run-length code. The result is None if no region can be
    scored.
    """
    completed = {key: annotation[key] for key in ("bbox", "area") if key in annotation}
    completed["iscrowd"] = int(bool(annotation.get("iscrowd", 0)))
    box, area = has_box(annotation), is_finite_number(annotation.get("area"))
    if iou_type == "bbox" and box and area:
        return completed
    code = _mask_code(annotation, (image["height"], image["width"]))
    if code is None:
        if iou_type != "bbox" or not box:
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
    """Return the mask as a run-length code, from an RLE or valid polygons; None without them."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list):
        segmentation = [p for p in segmentation if polygon_issue(p, size) is None]
    if not segmentation:
        return None
    try:
        return segmentation_to_rle(segmentation, size)
    except ValueError as error:
        raise UserError(f"annotation {annotation.get('id')} of the ground truth: {error}") from None
