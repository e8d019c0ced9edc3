"""From the annotations of an image to the target of its transformed image.

Masks equal those of detectron2's mapper: the coordinates of polygons are transformed before they
are rasterized, and an RLE is resized to the nearest pixel. Boxes are those of the annotations; only
objects that a crop or window cuts get the boxes of their masks, as in detectron2 with INPUT.CROP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_utils

from tensormask.data.checks.annotations import Annotation
from tensormask.data.checks.segmentation import run_lengths, segmentation_to_rle, valid_polygons
from tensormask.data.geometry import (
    Geometry,
    Region,
    flipped_points,
    leave_image,
    nearest_pixels,
    transform_boxes,
)

# In detectron2 a box of at most this many pixels in height or width is empty.
_EMPTY_SIDE = 1e-5


def transform_polygons(
    polygons: Sequence[Sequence[float]], geometry: Geometry, out: np.ndarray
) -> None:
    """Transform polygons, then set the pixels inside any of them in `out`, bool `(H, W)`."""
    transformed = [
        flipped_points(np.reshape(polygon, (-1, 2)), geometry).ravel()
        for polygon in valid_polygons(polygons)
    ]
    x, y, part = _decode_extent(segmentation_to_rle(transformed, geometry.new_size))
    # Whole pixels from here on, so a mask moves as the pixels of the image.
    extent, frame = Region(y, x, *part.shape), geometry.frame
    shown = frame.intersection(extent)
    upright = _before_rotation(out, geometry)
    upright[shown.relative_to(frame).slices()] = part[shown.relative_to(extent).slices()]


def transform_rle(
    rle: dict[str, Any], geometry: Geometry, pixels: tuple[np.ndarray, np.ndarray], out: np.ndarray
) -> None:
    """Resize an RLE by `pixels = nearest_pixels(geometry)` and set its pixels in `out`.

    Args:
        rle: a valid RLE of the old size.
        geometry: the transform of the image.
        pixels: the source row and column of each new row and column.
        out: bool `(H, W)` of the output size.

    Raises:
        ValueError: the RLE has another size than the image.
    """
    x, y, part = _decode_extent(segmentation_to_rle(rle, geometry.old_size))
    rows = np.flatnonzero((pixels[0] >= y) & (pixels[0] < y + part.shape[0]))
    columns = np.flatnonzero((pixels[1] >= x) & (pixels[1] < x + part.shape[1]))
    if len(rows) and len(columns):
        region = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        source = np.ix_(pixels[0][rows] - y, pixels[1][columns] - x)
        _before_rotation(out, geometry)[region] = part[source]


def transform_annotations(
    annotations: Sequence[Annotation], labels: Sequence[int], geometry: Geometry
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Return the training target of an image.

    Args:
        annotations: COCO annotations with a box and a segmentation.
        labels: the label of each, from 0.
        geometry: the transform of the image.

    Returns:
        - the target: `boxes (K, 4)` float32, `labels (K,)` int64, `masks (K, H, W)` bool, in the
          order of the annotations; objects whose transformed box or mask is empty are left out, and
          those that a crop or window cuts have the boxes of what is left of their masks;
        - bool, per annotation: whether it is left out without being cut.
    """
    # Like detectron2: add in 32 bits, transform in 64, test for empty boxes in 32.
    old_boxes = np.array([a["bbox"] for a in annotations], dtype=np.float32).reshape(-1, 4)
    old_boxes[:, 2:] += old_boxes[:, :2]
    boxes = transform_boxes(old_boxes, geometry).astype(np.float32)
    has_area = np.logical_and.reduce(boxes[:, 2:] - boxes[:, :2] > _EMPTY_SIDE, axis=1)
    masks = np.zeros((len(annotations), *geometry.output_size), dtype=bool)
    pixels = nearest_pixels(geometry)
    for annotation, mask, rasterize in zip(annotations, masks, has_area, strict=True):
        segmentation = annotation["segmentation"]
        if not rasterize:
            continue
        if isinstance(segmentation, dict):
            transform_rle(segmentation, geometry, pixels, out=mask)
        else:
            transform_polygons(segmentation, geometry, out=mask)
    included = np.logical_and(has_area, masks.any(axis=(1, 2)))
    is_cut = leave_image(old_boxes, geometry)
    for k in np.flatnonzero(is_cut & included):
        boxes[k] = box_of_mask(masks[k])
    if not included.all():
        boxes, masks = boxes[included], masks[included]
    target = {
        "boxes": torch.from_numpy(boxes),
        "labels": torch.tensor(labels, dtype=torch.int64)[torch.from_numpy(included)],
        "masks": torch.from_numpy(masks),
    }
    return target, ~included & ~is_cut


def box_of_mask(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box (x0, y0, x1, y1) of a mask, bool `(H, W)` with a pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def image_to_tensor(image: np.ndarray) -> torch.Tensor:
    """Convert a uint8 image `(H, W, 3)` to a contiguous uint8 tensor `(3, H, W)`."""
    # Always a copy: for numpy a flipped axis of one pixel is contiguous, but torch rejects it.
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def _before_rotation(mask: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Return a view of a mask, bool `(H, W)`, as it is before the rotation."""
    return np.rot90(mask, -geometry.quarter_turns)


def _decode_extent(rle: dict[str, Any]) -> tuple[int, int, np.ndarray]:
    """Return first column, first row and pixels, bool `(h, w)`, of the extent of a valid RLE.

    Decoding the extent only costs a fraction of decoding the whole mask.
    """
    height = rle["size"][0]
    runs = run_lengths(rle["counts"])
    ends = runs.cumsum()
    foreground = np.flatnonzero(runs[1::2]) * 2 + 1  # the runs of foreground with a pixel
    if not len(foreground):
        return 0, 0, np.zeros((0, 0), dtype=bool)
    # Runs go down the columns, so only the columns from the first to the last run are decoded.
    first, last = foreground[[0, -1]].tolist()
    begin, end = int(ends[first - 1]), int(ends[last])
    left, right = begin // height, -(-end // height)
    counts = [begin - left * height, *runs[first : last + 1].tolist(), right * height - end]
    size = [height, right - left]
    columns = mask_utils.frPyObjects({"size": size, "counts": counts}, *size)
    _, y, _, h = mask_utils.toBbox(columns).astype(int).tolist()
    return left, y, mask_utils.decode(columns)[y : y + h].view(bool)
