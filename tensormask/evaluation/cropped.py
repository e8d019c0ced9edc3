"""Masks that are stored as bits inside their bounding boxes: for images of any size.

Letters: K masks, (h, w) a mask in its box.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from tensormask.layers import paste_regions


class Region(NamedTuple):
    """A rectangle of whole pixels; the second corner is outside."""

    x0: int
    y0: int
    x1: int
    y1: int

    def __and__(self, other: "Region") -> "Region | None":
        """Return what two regions have in common; None for nothing."""
        (x0, y0, x1, y1), (a0, b0, a1, b1) = self, other
        common = Region(max(x0, a0), max(y0, b0), min(x1, a1), min(y1, b1))
        return common if common.x0 < common.x1 and common.y0 < common.y1 else None

    def contains(self, other: "Region") -> bool:
        (x0, y0, x1, y1), (a0, b0, a1, b1) = self, other
        return x0 <= a0 and y0 <= b0 and a1 <= x1 and b1 <= y1


class CroppedMask:
    """A mask of an image: one bit a pixel inside of `extent`, and background outside.

    Example:
        >>> mask = CroppedMask(5, 7, np.array([[False, True], [False, True]]))
        >>> mask.extent, mask.area
        (Region(x0=6, y0=7, x1=7, y1=9), 2)
        >>> mask.within(Region(0, 8, 10, 10)).tolist()[0]
        [False, False, False, False, False, False, True, False, False, False]

    Args:
        x0, y0: the corner of `mask` in the image, in pixels.
        mask: bool `(h, w)`; its empty borders are cut off.
    """

    __slots__ = ("_bits", "area", "extent")

    def __init__(self, x0: int, y0: int, mask: np.ndarray) -> None:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        top, bottom = (rows[0], rows[-1] + 1) if len(rows) else (0, 0)
        left, right = (columns[0], columns[-1] + 1) if len(columns) else (0, 0)
        corners = (x0 + left, y0 + top, x0 + right, y0 + bottom)
        self.extent = Region(*map(int, corners))
        mask = mask[top:bottom, left:right]
        self.area = int(np.count_nonzero(mask))
        # Not an array: small ones, between the large tensors of tiles, keep freed memory apart.
        self._bits = np.packbits(mask, axis=1).tobytes()

    def array(self) -> np.ndarray:
        """Return the bool mask `(h, w)` inside of `extent`."""
        return self._rows(0, self.extent.y1 - self.extent.y0)

    def within(self, region: Region) -> np.ndarray:
        """Return the bool mask inside of a region, which may extend beyond the mask."""
        inside = np.zeros((region.y1 - region.y0, region.x1 - region.x0), bool)
        if common := self.extent & region:
            left, top = self.extent[:2]
            rows = self._rows(common.y0 - top, common.y1 - top)
            y, x = common.y0 - region.y0, common.x0 - region.x0
            part = rows[:, common.x0 - left : common.x1 - left]
            inside[y : y + part.shape[0], x : x + part.shape[1]] = part
        return inside

    def area_within(self, region: Region) -> int:
        """Return the number of pixels inside of a region."""
        if region.contains(self.extent):
            return self.area
        common = self.extent & region
        return int(np.count_nonzero(self.within(common))) if common else 0

    def overlap(self, other: "CroppedMask") -> int:
        """Return the number of pixels that two masks have in common."""
        common = self.extent & other.extent
        if common is None:
            return 0
        return int(np.count_nonzero(self.within(common) & other.within(common)))

    def _rows(self, start: int, end: int) -> np.ndarray:
        width = self.extent.x1 - self.extent.x0
        if not width:
            return np.zeros((end - start, 0), bool)
        bits = np.frombuffer(self._bits, np.uint8).reshape(-1, -(-width // 8))
        return np.unpackbits(bits[start:end], axis=1, count=width).view(bool)


def unite(masks: Sequence[CroppedMask]) -> CroppedMask:
    """Return the union of masks, of which there is at least one."""
    x0, y0 = (min(mask.extent[i] for mask in masks) for i in (0, 1))
    x1, y1 = (max(mask.extent[i] for mask in masks) for i in (2, 3))
    united = np.zeros((y1 - y0, x1 - x0), bool)
    for mask in masks:
        left, top, right, bottom = mask.extent
        united[top - y0 : bottom - y0, left - x0 : right - x0] |= mask.array()
    return CroppedMask(x0, y0, united)


class CroppedMasks(Sequence[Tensor]):
    """Masks of one image. An item is a Tensor[h, w] bool; several items are `CroppedMasks`.

    As `window_masks` of a detection they go with `windows`, which are their `extents`.
    """

    def __init__(self, masks: Sequence[CroppedMask]) -> None:
        self.masks = list(masks)

    def __len__(self) -> int:
        return len(self.masks)

    @overload
    def __getitem__(self, rows: int) -> Tensor: ...
    @overload
    def __getitem__(self, rows: "slice | Tensor") -> "CroppedMasks": ...
    def __getitem__(self, rows: Any) -> "Tensor | CroppedMasks":
        if isinstance(rows, slice):
            return CroppedMasks(self.masks[rows])
        if isinstance(rows, Tensor) and rows.dim():
            rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
            return CroppedMasks([self.masks[row] for row in rows.tolist()])
        return torch.from_numpy(self.masks[rows].array())

    @property
    def extents(self) -> Tensor:
        """Tensor[K, 4] int64, the boxes around the masks in pixels, x0, y0, x1, y1."""
        return torch.tensor([mask.extent for mask in self.masks]).view(-1, 4)

    def regions(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield `(x0, y0, region)` per mask, as `layers.paste_regions` does."""
        for mask in self.masks:
            yield mask.extent.x0, mask.extent.y0, torch.from_numpy(mask.array())


def mask_regions(
    detection: Mapping[str, Any], size: tuple[int, int]
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield `(x0, y0, region)` per mask: a bool region, outside of which the mask is empty.

    Args:
        detection: with `masks (K, H, W)`, or `windows` and `window_masks`.
        size: `(height, width)` of the image.
    """
    if "masks" in detection:
        return ((0, 0, mask) for mask in detection["masks"])
    masks = detection["window_masks"]
    if isinstance(masks, CroppedMasks):
        return masks.regions()
    return paste_regions(masks, detection["windows"], size)
