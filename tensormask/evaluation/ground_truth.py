"""Annotations in the form that pycocotools' evaluation needs."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pycocotools import mask as rle_tools
from pycocotools.coco import COCO

from tensormask.data.segmentation import segmentation_to_rle, usable_polygons

logger = logging.getLogger(__name__)


def scorable_copy(coco_gt: COCO, image_ids: Sequence[int], iou_type: str) -> COCO:
    """A copy for COCOeval, which writes into the annotations: training may share the originals.

    It has the annotations of `image_ids` that have a mask for the `iou_type` "segm", or a box or a
    mask for "bbox"; how many have not is logged.

    Annotations are numbered from 1, since COCOeval takes one with the id 0 for "not found" and two
    with the same id for one object.
    """
    wanted = set(image_ids)
    annotations = [
        annotation
        for annotation in coco_gt.dataset.get("annotations", [])
        if annotation["image_id"] in wanted
    ]
    scorable = [
        annotation
        for annotation in annotations
        if has_mask(annotation) or (iou_type == "bbox" and annotation.get("bbox"))
    ]
    if len(scorable) < len(annotations):
        num_left_out = len(annotations) - len(scorable)
        logger.warning("%d annotations have nothing to score as %s", num_left_out, iou_type)
    copy = COCO()
    copy.dataset = {
        "images": coco_gt.dataset["images"],
        "categories": coco_gt.dataset["categories"],
        "annotations": [
            _completed(annotation, coco_gt.imgs[annotation["image_id"]], iou_type) | {"id": number}
            for number, annotation in enumerate(scorable, start=1)
        ],
    }
    copy.createIndex()
    return copy


def has_mask(annotation: Mapping[str, Any]) -> bool:
    """Whether an annotation has a run-length code, or a polygon of at least three points."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list):
        return bool(usable_polygons(segmentation))
    return bool(segmentation)


def _completed(
    annotation: Mapping[str, Any], image: Mapping[str, Any], iou_type: str
) -> dict[str, Any]:
    """A shallow copy with the keys that COCOeval insists on and that hand-made files lack.

    For "segm" its mask is a run-length code, of those of its polygons that have three points.
    """
    completed = {"iscrowd": 0, **annotation}
    if iou_type == "segm" or not (completed.get("bbox") and "area" in completed):
        if has_mask(annotation):
            size = (image["height"], image["width"])
            code = segmentation_to_rle(annotation["segmentation"], size)
            completed["segmentation"] = code
            completed["bbox"] = completed.get("bbox") or rle_tools.toBbox(code).tolist()
            completed.setdefault("area", float(rle_tools.area(code)))
        else:
            completed["area"] = completed["bbox"][2] * completed["bbox"][3]
    return completed
