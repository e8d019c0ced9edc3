"""COCO's segmentations: polygons and run-length codes, checked before pycocotools sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pycocotools import mask as mask_utils


def usable_polygons(polygons: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """The polygons `[x0, y0, x1, y1, ...]` with at least three points and a y for every x."""
    return [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]


def segmentation_to_rle(
    segmentation: Sequence[Sequence[float]] | dict[str, Any], size: tuple[int, int]
) -> dict[str, Any]:
    """A COCO segmentation as a compressed RLE, which `pycocotools.mask.decode` takes.

    Args:
        segmentation: polygons in pixels, whose union is meant; or an RLE whose counts are a list
            of run lengths, a string or bytes.
        size: (height, width) of the picture in pixels.

    Raises:
        ValueError: the RLE is of another size.
    """
    if not isinstance(segmentation, dict):
        polygons = [list(polygon) for polygon in usable_polygons(segmentation)]
        return mask_utils.merge(mask_utils.frPyObjects(polygons, *size))
    if tuple(segmentation["size"]) != tuple(size):
        raise ValueError(
            f"the RLE of an object is {segmentation['size']} (height, width), "
            f"but its picture is {list(size)}."
        )
    if isinstance(segmentation["counts"], list):
        return mask_utils.frPyObjects(segmentation, *size)
    return segmentation
