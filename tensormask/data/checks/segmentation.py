"""Checks COCO segmentations, polygons and run-length codes (RLE), before pycocotools reads them.

pycocotools trusts its input: run lengths with a wrong sum make it read and write outside of its
buffers, and a polygon with a coordinate of a billion fills the memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from tensormask.utils.errors import UserError

# Compressed counts store a number in groups of 5 bits; seven groups exceed the 32 bits of a run.
_MAX_GROUPS = 7
_FIRST_CHARACTER, _CONTINUES, _SIGN, _VALUE_BITS = 48, 0x20, 0x10, 5
# Limits on how far a polygon may leave its image and on the length of its outline, in longer sides
# of the image: the memory of rasterizing grows with both.
_MAX_DISTANCE, _MAX_OUTLINE = 16, 512

Polygons = Sequence[Sequence[float] | np.ndarray]


def valid_polygons(polygons: Polygons) -> list[Sequence[float] | np.ndarray]:
    """Return the polygons `[x0, y0, x1, y1, ...]` of three points or more, with a y for each x."""
    return [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]


def polygon_issue(polygon: Any, size: tuple[int, int]) -> str | None:
    """Return what is wrong with a polygon `[x0, y0, x1, y1, ...]`, or None if it is valid.

    Args:
        size: (height, width) of the image in pixels.

    Example:
        >>> polygon_issue([0, 0, 4, 0, 4, 4], (8, 8))
        >>> polygon_issue([0, 0, 4, 4], (8, 8))
        'fewer than three points'
    """
    try:
        total = math.fsum(polygon)
    except (TypeError, OverflowError, ValueError):  # fsum refuses inf - inf by a ValueError
        numbers = isinstance(polygon, list) and all(isinstance(x, int | float) for x in polygon)
        return "NaN or infinity" if numbers else "not a list of numbers"
    if len(polygon) % 2:
        return "an x without a y"
    if len(polygon) < 6:
        return "fewer than three points"
    if not math.isfinite(total):
        return "NaN or infinity"
    lowest, highest, side = min(polygon), max(polygon), max(size)
    if lowest < -_MAX_DISTANCE * side or highest > (1 + _MAX_DISTANCE) * side:
        return f"more than {_MAX_DISTANCE} of the image's longer sides outside of it"
    # No edge is longer than the extent, so few polygons are measured.
    if len(polygon) / 2 * (highest - lowest) > _MAX_OUTLINE * side:
        points = np.reshape(np.asarray(polygon, dtype=np.float64), (-1, 2))
        # The length of an edge is measured along its longer side.
        if np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum() > _MAX_OUTLINE * side:
            return f"outline longer than {_MAX_OUTLINE} of the image's longer sides"
    return None


def run_lengths(counts: str | bytes | Sequence[int]) -> np.ndarray:
    """Return the run lengths, int64 `(R,)`, of an RLE's counts: a list, or COCO's compressed form.

    Raises:
        ValueError: the counts have another type or are not such a code.

    Example:
        >>> run_lengths(b"13").tolist()
        [1, 3]
    """
    if isinstance(counts, str | bytes):
        return _decompressed(counts.encode("utf-8") if isinstance(counts, str) else counts)
    if not isinstance(counts, Sequence | np.ndarray):
        raise UserError(f"the counts of an RLE are a list, str or bytes, not {type(counts)}.")
    if any(isinstance(run, bool) or not isinstance(run, int | np.integer) for run in counts):
        raise UserError("the counts of an RLE hold something that is not an integer.")
    try:
        return np.array(counts, dtype=np.int64)
    except OverflowError:
        raise UserError("the counts of an RLE hold a number beyond 64 bits.") from None


def check_rle(rle: Any, size: tuple[int, int]) -> np.ndarray:
    """Check that an RLE is safe to pass to pycocotools, and return its run lengths.

    Args:
        rle: a dict with `size`, [height, width], and `counts`, a list of run lengths, or a str or
            bytes in COCO's compressed form.
        size: the (height, width) in pixels that the RLE must have.

    Returns:
        The run lengths, int64 `(R,)`: background first, down the columns.

    Raises:
        ValueError: it is not such a dict, it has another size, or a run is negative or their sum is
            not height * width.
    """
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise UserError("an RLE is a dict with size and counts.")
    stated = rle["size"]
    if not isinstance(stated, Sequence | np.ndarray) or list(stated) != list(size):
        raise UserError(
            f"the RLE of an object is {stated} (height, width), but its image is {list(size)}."
        )
    if size[0] * size[1] >= 2**32:
        raise UserError(f"an RLE of {list(size)} pixels is too large: its runs have 32 bits.")
    runs = run_lengths(rle["counts"])
    if len(runs) and runs.min() < 0:
        raise UserError("the counts of an RLE hold a negative run.")
    # In floats first: the sum of 64-bit integers may wrap around to the expected one.
    if runs.sum(dtype=np.float64) > 2.0**53 or int(runs.sum()) != size[0] * size[1]:
        raise UserError(
            f"the counts of an RLE add up to {runs.sum(dtype=np.float64):.0f} pixels, "
            f"but height * width is {size[0] * size[1]}."
        )
    return runs


def segmentation_to_rle(
    segmentation: Polygons | dict[str, Any], size: tuple[int, int]
) -> dict[str, Any]:
    """Return a COCO segmentation as a compressed RLE, which `pycocotools.mask.decode` takes.

    Args:
        segmentation: polygons in pixels, of which the union is taken; or an RLE whose counts are a
            list of run lengths, a string or bytes.
        size: (height, width) of the image in pixels.

    Raises:
        ValueError: the RLE is not valid (`check_rle`).

    Example:
        >>> rle = segmentation_to_rle([[1, 1, 4, 1, 4, 3, 1, 3]], (6, 8))
        >>> int(mask_utils.area(rle))
        6
    """
    if not isinstance(segmentation, dict):
        polygons = [list(polygon) for polygon in valid_polygons(segmentation)]
        return mask_utils.merge(mask_utils.frPyObjects(polygons, *size))
    check_rle(segmentation, size)
    counts = segmentation["counts"]
    if isinstance(counts, str | bytes):
        return {"size": list(size), "counts": counts}
    return mask_utils.frPyObjects({"size": list(size), "counts": list(counts)}, *size)


def _decompressed(code: bytes) -> np.ndarray:
    """Decode COCO's compressed counts to run lengths.

    Each number is a few characters of 5 bits, low bits first, in two's complement. From the fourth
    number on it is the difference from the run two before.
    """
    characters = np.frombuffer(code, dtype=np.uint8).astype(np.int64) - _FIRST_CHARACTER
    if not len(characters):
        return characters
    if characters.min() < 0 or characters.max() > 0x3F:
        raise UserError("the counts of an RLE hold a character that COCO's code does not use.")
    last = np.flatnonzero(characters & _CONTINUES == 0)
    if not len(last) or last[-1] != len(characters) - 1:
        raise UserError("the counts of an RLE end within a number.")
    first = np.concatenate([[0], last[:-1] + 1])
    num_groups = last - first + 1
    if num_groups.max() > _MAX_GROUPS:
        raise UserError("the counts of an RLE hold a number beyond 32 bits.")
    position = np.arange(len(characters)) - np.repeat(first, num_groups)  # within its number
    values = np.add.reduceat((characters & 0x1F) << (_VALUE_BITS * position), first)
    values -= (characters[last] & _SIGN != 0) * (1 << (_VALUE_BITS * num_groups))
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values
