"""Regions of an image as polygons and run-length codes (RLE)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

Polygon = list[float]  # x0, y0, x1, y1, ... in pixels
Rle = dict[str, Any]

_NUM_CORNERS = 72  # of the polygon of a circle: 0.1 % less area


def ellipse(x: float, y: float, radius_x: float, radius_y: float, degrees: float = 0) -> Polygon:
    """Return the polygon of an ellipse around (x, y), rotated clockwise on the image.

    Example:
        >>> [round(v) for v in ellipse(5, 5, 4, 2)[:2]], len(ellipse(5, 5, 4, 2)) // 2
        ([9, 5], 72)
    """
    angles = np.arange(_NUM_CORNERS) * (2 * np.pi / _NUM_CORNERS)
    turn = math.radians(degrees)
    along, across = radius_x * np.cos(angles), radius_y * np.sin(angles)
    xs = x + along * math.cos(turn) - across * math.sin(turn)
    ys = y + along * math.sin(turn) + across * math.cos(turn)
    result: list[float] = np.stack([xs, ys], axis=1).ravel().tolist()
    return result


def pasted_rle(part: np.ndarray, left: int, top: int, size: tuple[int, int]) -> Rle:
    """Return the RLE of a mask `(h, w)` at a location of an image of `size`, clipped to it."""
    mask = np.zeros(size, np.uint8)
    inside = part[max(0, -top) :, max(0, -left) :]
    target = mask[max(0, top) :, max(0, left) :]
    rows, columns = (min(a, b) for a, b in zip(inside.shape, target.shape, strict=True))
    target[:rows, :columns] = inside[:rows, :columns]
    return mask_utils.encode(np.asfortranarray(mask))


def number_image_to_rles(numbers: np.ndarray) -> Iterator[tuple[int, Rle]]:
    """Yield the number and the RLE, its counts a list, of each object of a label image.

    Its cost does not grow with the number of objects, as that of a mask for each would.

    Args:
        numbers: integers `(H, W)`; 0 is background.

    Example:
        >>> list(number_image_to_rles(np.array([[0, 7], [2, 7]])))
        [(2, {'size': [2, 2], 'counts': [1, 1, 2]}), (7, {'size': [2, 2], 'counts': [2, 2]})]
    """
    flat = numbers.ravel(order="F")
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.append(starts[1:], flat.size)
    values = flat[starts]
    order = np.argsort(values, kind="stable")
    found, first = np.unique(values[order], return_index=True)
    for number, runs in zip(found.tolist(), np.split(order, first[1:]), strict=True):
        if number == 0:
            continue
        borders = np.stack([starts[runs], ends[runs]], axis=1).ravel()
        counts = np.diff(borders, prepend=0, append=flat.size).tolist()
        yield number, {"size": list(numbers.shape), "counts": counts[: None if counts[-1] else -1]}


def as_json(code: Rle) -> Rle:
    """Return a compressed RLE whose counts are text."""
    counts = code["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in code["size"]], "counts": text}
