"""Assign ground-truth objects to windows (paper, sec. 5.3, with detectron2's constants).

A window is positive for an object if it (1) contains the object's box, (2) is not much larger than
the object, and (3) has its center within one stride of the object's. A window that matches several
objects is background. Rule 3 leaves at most 16 locations per object, level and size, so only these
are tested.
"""

import math
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError

# Rule 3, |window - object| <= 1 stride, leaves floor(c) - 1 .. floor(c) + 2 on each axis.
_REACH = (-1, 0, 1, 2)


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


@torch.no_grad()
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
    boxes = torch.cat(boxes_per_image).float()
    device = boxes.device
    num_objects = torch.tensor([len(b) for b in boxes_per_image], device=device)
    image = torch.repeat_interleave(torch.arange(len(boxes_per_image), device=device), num_objects)
    row = torch.arange(len(boxes), device=device) - (num_objects.cumsum(0) - num_objects)[image]
    center = (boxes[:, 2:] + boxes[:, :2]) / 2
    longer_side = (boxes[:, 2:] - boxes[:, :2]).amax(1)
    size_limit = (2 * longer_side).clamp(min=windows.min_size)

    # Tested: (M objects, L levels, S sizes, 4 rows, 4 columns), flattened.
    strides = torch.tensor(windows.strides, dtype=torch.float32, device=device)
    first = (center[:, None] / strides[:, None]).floor().long()  # (M, L, 2) as (x, y)
    reach = torch.tensor(_REACH, device=device)
    shape = (len(boxes), windows.num_levels, windows.num_sizes, 4, 4)
    x = (first[:, :, None, None, None, 0] + reach).expand(shape).flatten()
    y = (first[:, :, None, None, None, 1] + reach[:, None]).expand(shape).flatten()
    index = torch.cartesian_prod(
        *(torch.arange(n, device=device) for n in shape[:3]), torch.arange(16, device=device)
    )
    obj, level, size = index[:, 0], index[:, 1], index[:, 2]

    window = windows.boxes(level, size, y, x)
    stride = strides[level]
    contains = (window[:, :2] <= boxes[obj, :2]) & (boxes[obj, 2:] <= window[:, 2:])
    small_enough = size_limit[obj] - (window[:, 2] - window[:, 0] - stride) >= 0
    offset = (center[obj] - (window[:, :2] + window[:, 2:]) / 2) / stride[:, None]
    central = (offset * offset).sum(1) <= 1
    height, width = torch.tensor(grids, device=device)[level].unbind(1)
    on_grid = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    matched = contains.all(1) & small_enough & central & on_grid

    # Count the objects of each window, which for this gets a number of its own.
    obj, level, size, y, x, window = (t[matched] for t in (obj, level, size, y, x, window))
    most_rows, most_columns = map(max, zip(*grids, strict=True))
    number = (image[obj] * windows.num_levels + level) * windows.num_sizes + size
    number = (number * most_rows + y) * most_columns + x
    _, inverse, num_matches = torch.unique(number, return_inverse=True, return_counts=True)
    keep = num_matches[inverse] == 1

    obj, level, size, y, x, window = (t[keep] for t in (obj, level, size, y, x, window))
    counted = windows.num_levels, windows.num_sizes, len(boxes_per_image)
    return Assignment._sorted(counted, image[obj], row[obj], level, size, y, x, window)
