"""COCO's segmentations, polygons and run-length codes, checked before pycocotools sees them.

pycocotools trusts what it is given: run lengths that do not add up make it read and write outside
of its buffers, and a polygon with a coordinate of a billion fills the memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from tensormask.utils.errors import UserError

# Compressed counts hold numbers in groups of 5 bits: seven of them pass 32 bits, all that a
# count can have.
_MAX_GROUPS = 7
_FIRST_CHARACTER, _CONTINUES, _SIGN, _VALUE_BITS = 48, 0x20, 0x10, 5
# How far a polygon may leave its image, and how long its outline may be, in longer sides of the
# image: the memory of rasterising grows with both.
_MAX_DISTANCE, _MAX_OUTLINE = 16, 512


def usable_polygons(polygons: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """The polygons `[x0, y0, x1, y1, ...]` with at least three points and a y for every x."""
    return [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]


def polygon_issue(polygon: Any, size: tuple[int, int]) -> str | None:
    """The kind of issue (see `issues`) of a polygon `[x0, y0, x1, y1, ...]`, None if it has none.

    Args:
        size: (height, width) of the image in pixels.
    """
    try:
        total = math.fsum(polygon)
    except (TypeError, OverflowError, ValueError):  # fsum refuses inf - inf by a ValueError
        numbers = isinstance(polygon, list) and all(isinstance(x, int | float) for x in polygon)
        return "polygon_not_finite" if numbers else "polygon_malformed"
    if len(polygon) % 2:
        return "polygon_odd"
    if len(polygon) < 6:
        return "polygon_short"
    if not math.isfinite(total):
        return "polygon_not_finite"
    lowest, highest, side = min(polygon), max(polygon), max(size)
    if lowest < -_MAX_DISTANCE * side or highest > (1 + _MAX_DISTANCE) * side:
        return "polygon_far_outside"
    # No edge is longer than the extent, so few polygons are measured.
    if len(polygon) / 2 * (highest - lowest) > _MAX_OUTLINE * side:
        if _outline(polygon) > _MAX_OUTLINE * side:
            return "polygon_far_outside"
    return None


def _outline(polygon: Sequence[float]) -> float:
    """The length of a polygon's outline in pixels, along the longer side of each edge."""
    points = np.reshape(np.asarray(polygon, dtype=np.float64), (-1, 2))
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())


def run_lengths(counts: str | bytes | Sequence[int]) -> np.ndarray:
    """The run lengths, int64 `(R,)`, of an RLE's counts: a list of them, or COCO's compressed form.

    Raises:
        ValueError: the counts are of another type, or no such code.
    """
    if isinstance(counts, str | bytes):
        return _decompressed(counts.encode("utf-8") if isinstance(counts, str) else counts)
    if not isinstance(counts, Sequence | np.ndarray):
        raise UserError(f"the counts of an RLE are a list, str or bytes, not {type(counts)}.")
    if any(isinstance(run, bool) or not isinstance(run, int | np.integer) for run in counts):
        raise UserError("the counts of an RLE hold something that is no integer.")
    try:
        return np.array(counts, dtype=np.int64)
    except OverflowError:
        raise UserError("the counts of an RLE hold a number beyond 64 bits.") from None


def check_rle(rle: Any, size: tuple[int, int]) -> np.ndarray:
    """Makes sure that pycocotools can be given an RLE.

    Args:
        rle: a dict with `size`, [height, width], and `counts`, a list of run lengths, or a str or
            bytes in COCO's compressed form.
        size: (height, width) in pixels that the RLE must have.

    Returns:
        The run lengths, int64 `(R,)`: background first, down the columns.

    Raises:
        ValueError: it is no such dict, is of another size, or its runs are negative or do not add
            up to height * width.
    """
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise UserError("an RLE is a dict with size and counts.")
    if not has_size(rle, size):
        raise UserError(
            f"the RLE of an object is {rle['size']} (height, width), but its image is {list(size)}."
        )
    if size[0] * size[1] >= 2**32:
        raise UserError(f"an RLE of {list(size)} pixels is too large: its runs have 32 bits.")
    runs = run_lengths(rle["counts"])
    if len(runs) and runs.min() < 0:
        raise UserError("the counts of an RLE hold a negative run.")
    # In floats first: the sum of 64-bit integers may wrap around to the wanted one.
    if runs.sum(dtype=np.float64) > 2.0**53 or int(runs.sum()) != size[0] * size[1]:
        raise UserError(
            f"the counts of an RLE add up to {runs.sum(dtype=np.float64):.0f} pixels, "
            f"but height * width is {size[0] * size[1]}."
        )
    return runs


def has_size(rle: dict[str, Any], size: tuple[int, int]) -> bool:
    """Whether an RLE states this (height, width)."""
    stated = rle["size"]
    return isinstance(stated, Sequence | np.ndarray) and list(stated) == list(size)


def segmentation_to_rle(
    segmentation: Sequence[Sequence[float]] | dict[str, Any], size: tuple[int, int]
) -> dict[str, Any]:
    """A COCO segmentation as a compressed RLE, which `pycocotools.mask.decode` takes.

    Args:
        segmentation: polygons in pixels, whose union is meant; or an RLE whose counts are a list
            of run lengths, a string or bytes.
        size: (height, width) of the image in pixels.

    Raises:
        ValueError: the RLE is not sound (`check_rle`).
    """
    if not isinstance(segmentation, dict):
        polygons = [list(polygon) for polygon in usable_polygons(segmentation)]
        return mask_utils.merge(mask_utils.frPyObjects(polygons, *size))
    check_rle(segmentation, size)
    counts = segmentation["counts"]
    if isinstance(counts, str | bytes):
        return {"size": list(size), "counts": counts}
    return mask_utils.frPyObjects({"size": list(size), "counts": list(counts)}, *size)


def _decompressed(code: bytes) -> np.ndarray:
    """Run lengths of COCO's compressed counts.

    Each number is a few characters of 5 bits, low ones first, in two's complement; from the fourth
    number on it is the difference from the run two before.
    """
    characters = np.frombuffer(code, dtype=np.uint8).astype(np.int64) - _FIRST_CHARACTER
    if not len(characters):
        return characters
    if characters.min() < 0 or characters.max() > 0x3F:
        raise UserError("the counts of an RLE hold a character that is none of COCO's.")
    last = np.flatnonzero(characters & _CONTINUES == 0)
    if not len(last) or last[-1] != len(characters) - 1:
        raise UserError("the counts of an RLE end within a number.")
    first = np.concatenate([[0], last[:-1] + 1])
    num_groups = last - first + 1
    if num_groups.max() > _MAX_GROUPS:
        raise UserError("the counts of an RLE hold a number beyond 32 bits.")
    place = np.arange(len(characters)) - np.repeat(first, num_groups)
    values = np.add.reduceat((characters & 0x1F) << (_VALUE_BITS * place), first)
    values -= (characters[last] & _SIGN != 0) * (1 << (_VALUE_BITS * num_groups))
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values
