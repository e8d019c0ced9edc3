"""Assign ground-truth objects to windows (paper, sec. 5.3, with detectron2's constants).

A window is positive for an object if it (1) contains the object's box, (2) is not much larger than
the object, and (3) has its center within one stride of the object's. A window that matches several
objects is background. Rule 3 leaves at most 16 locations per object, level and size, so only these
are tested.
"""

import math
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError

# Rule 3, |window - object| <= 1 stride, leaves floor(c) - 1 .. floor(c) + 2 on each axis.
_REACH = np.arange(-1, 3)


class Assignment(NamedTuple):
    """F positive windows and their objects; int64 (F,) unless stated.

    Sorted by (level, size, image). `make` and `select` keep the order and the counts right.

    Example:
        >>> windows = Windows.of_strides([4, 8])
        >>> level, zeros = torch.tensor([1, 0]), torch.zeros(2, dtype=torch.int64)
        >>> made = Assignment.make(windows, 1, zeros, zeros, level, zeros, zeros, zeros)
        >>> made.level, made.select(made.level == 1).counts
        (tensor([0, 1]), [[[0], [0]], [[1], [0]]])
    """

    image: Tensor
    object: Tensor  # row in the targets of its image
    level: Tensor
    size: Tensor
    y: Tensor
    x: Tensor
    boxes: Tensor  # (F, 4) float, the windows, pixels
    counts: list[list[list[int]]]  # windows per level, size and image

    @classmethod
    def make(
        cls,
        windows: Windows,
        num_images: int,
        image: Tensor,
        object: Tensor,
        level: Tensor,
        size: Tensor,
        y: Tensor,
        x: Tensor,
    ) -> "Assignment":
        """Return the assignment of F windows in any order, int64 (F,) each.

        Raises:
            UserError: a window occurs twice, or an index is negative.
        """
        indices = torch.stack([image, level, size, y, x])
        if (indices < 0).any() or torch.unique(indices, dim=1).shape[1] < len(object):
            raise UserError(
                "an assignment has each window at most once, and no negative indices: keep one "
                "object for a window, and leave out windows outside of the grid"
            )
        shape = windows.num_levels, windows.num_sizes, num_images
        boxes = windows.boxes(level, size, y, x)
        return cls._sorted(shape, image, object, level, size, y, x, boxes)

    def select(self, rows: Tensor) -> "Assignment":
        """Return the assignment at an index or a bool mask (F,)."""
        shape = len(self.counts), len(self.counts[0]), len(self.counts[0][0])
        return self._sorted(shape, *(column[rows] for column in self[:-1]))

    @classmethod
    def _sorted(cls, shape: tuple[int, int, int], *columns: Tensor) -> "Assignment":
        """Sort the columns before ``counts``, whose (levels, sizes, images) are the shape."""
        image, _, level, size, *_ = columns
        group = (level * shape[1] + size) * shape[2] + image
        order = torch.argsort(group, stable=True)
        counts = torch.bincount(group, minlength=math.prod(shape)).view(shape).tolist()
        image, object, level, size, y, x, boxes = (column[order] for column in columns)
        return cls(image, object, level, size, y, x, boxes, counts)

    def levels(self) -> list[slice]:
        """Return the slice of each level, empty for a level without positive windows."""
        ends = list(accumulate(sum(map(sum, sizes)) for sizes in self.counts))
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def groups(self) -> list[tuple[int, int, slice]]:
        """Return ``(level, size, slice)`` of each level and size with positive windows."""
        groups, end = [], 0
        for level, sizes in enumerate(self.counts):
            for size, per_image in enumerate(sizes):
                start, end = end, end + sum(per_image)
                if end > start:
                    groups.append((level, size, slice(start, end)))
        return groups


@torch.compiler.disable  # it would translate NumPy's functions
@torch.no_grad()
@np.errstate(over="ignore", invalid="ignore")  # of boxes that are not finite: they match nothing
def assign(
    boxes_per_image: list[Tensor], windows: Windows, grids: list[tuple[int, int]]
) -> Assignment:
    """Find the positive windows and their objects.

    Args:
        boxes_per_image: per image, Tensor[K, 4] of objects ``(x0, y0, x1, y1)`` in pixels, K >= 0.
        windows: their geometry.
        grids: per level ``(H, W)``, rows and columns of windows.

    Example:
        >>> box = torch.tensor([[36.0, 36.0, 44.0, 44.0]])  # its center is that of window (10, 10)
        >>> assignment = assign([box], Windows((4,), ((44, 60),)), [(20, 20)])
        >>> list(zip(assignment.y.tolist(), assignment.x.tolist()))
        [(9, 10), (10, 9), (10, 10), (10, 11), (11, 10)]
    """
    # In NumPy, whose operations on small arrays take half the time.
    boxes = torch.cat(boxes_per_image).float().numpy(force=True)
    num_objects = [len(boxes) for boxes in boxes_per_image]
    image = np.repeat(np.arange(len(num_objects)), num_objects)
    row = np.concatenate([np.arange(0), *map(np.arange, num_objects)])
    strides, sides = (np.array(x, dtype=np.float32) for x in (windows.strides, windows.sizes))
    center = (boxes[:, 2:] + boxes[:, :2]) / 2
    longer_side = (boxes[:, 2:] - boxes[:, :2]).max(1)
    size_limit = np.maximum(2 * longer_side, np.float32(windows.min_size))

    # P candidates: an object, and a level and size whose windows may be neither too small nor too
    # large. With a pixel to spare: rounding depends on the location, where both are tested exactly.
    largest, smallest = size_limit[:, None, None] + strides[:, None], longer_side[:, None, None]
    fits = (sides <= largest + 1) & (sides >= smallest - 1)  # (M objects, L levels, S sizes)
    obj, level, size = fits.nonzero()

    # Locations are tested on each axis: (P, 4, 2), the last as (x, y).
    stride, half = strides[level, None, None], sides[level, size, None, None] / 2
    box, of_box = boxes[obj, None], center[obj, None]
    index = np.floor(of_box / stride).astype(np.int64) + _REACH[:, None]
    middle = index.astype(np.float32) * stride
    low, high = middle - half, middle + half
    inside = (low <= box[..., :2]) & (box[..., 2:] <= high)
    inside &= (index >= 0) & (index < np.array(grids)[level, None, ::-1])
    small_enough = size_limit[obj, None] - ((high - low)[..., 0] - stride[..., 0]) >= 0
    offset = (of_box - (low + high) / 2) / stride
    square = offset * offset
    central = square[:, None, :, 0] + square[:, :, None, 1] <= 1  # (P, 4 rows, 4 columns)
    matched = central & inside[:, :, None, 1] & (inside[..., 0] & small_enough)[:, None]

    candidate, y, x = matched.nonzero()
    y, x = index[candidate, y, 1], index[candidate, x, 0]
    obj, level, size = obj[candidate], level[candidate], size[candidate]

    # Sort by level, size and image, and drop windows of several objects.
    group = (level * windows.num_sizes + size) * len(num_objects) + image[obj]
    most_rows, most_columns = map(max, zip(*grids, strict=True))
    number = (group * most_rows + y) * most_columns + x
    _, inverse, num_matches = np.unique(number, return_inverse=True, return_counts=True)
    keep = (num_matches[inverse] == 1).nonzero()[0]
    keep = keep[group[keep].argsort(kind="stable")]
    shape = windows.num_levels, windows.num_sizes, len(num_objects)
    counts = np.bincount(group[keep], minlength=math.prod(shape)).reshape(shape).tolist()
    obj, level, size, y, x = (column[keep] for column in (obj, level, size, y, x))
    columns = torch.from_numpy(np.stack([image[obj], row[obj], level, size, y, x]))
    of_image, rows, *window = columns.to(boxes_per_image[0].device).unbind()
    return Assignment._make([of_image, rows, *window, windows.boxes(*window), counts])
