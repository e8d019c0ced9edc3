"""Assign ground-truth objects to windows (paper, sec. 5.3, with detectron2's constants).

A window is positive for an object if it (1) contains the object's box, (2) is not much larger than
the object, and (3) has its center within one stride of the object's. A window that matches several
objects is background. Rule 3 leaves at most 16 locations per object, level and size, so only these
are tested. Other ways to choose among the claims are in `assigners`.
"""

import math
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError


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


class Claims(NamedTuple):
    """P pairs of a window and an object that it may be positive for; NumPy arrays (P,).

    Ordered by object, level, size, y and x. A window can occur several times.
    """

    image: np.ndarray
    object: np.ndarray  # row in the targets of its image
    level: np.ndarray
    size: np.ndarray
    y: np.ndarray
    x: np.ndarray
    owner: np.ndarray  # the object's row in the targets of the batch
    group: np.ndarray  # number of (level, size, image), in this order
    window: np.ndarray  # number of (level, size, image, y, x), in this order
    distance: np.ndarray  # float32: of the two centers, squared, in strides of the level
    area: np.ndarray  # float32: of the object, square pixels

    def select(self, rows: np.ndarray) -> "Claims":
        """Return the claims at indices or a bool mask."""
        return Claims._make(column[rows] for column in self)

    def to_assignment(self, windows: Windows, num_images: int, device: torch.device) -> Assignment:
        """Return the assignment of all claims, whose windows must differ; indices on `device`."""
        claims = self.select(self.group.argsort(kind="stable"))
        shape = windows.num_levels, windows.num_sizes, num_images
        counts = np.bincount(claims.group, minlength=math.prod(shape)).reshape(shape).tolist()
        columns = torch.from_numpy(np.stack(claims[:6])).to(device)
        image, row, *window = columns.unbind()
        return Assignment._make([image, row, *window, windows.boxes(*window), counts])


@torch.compiler.disable  # it would translate NumPy's functions
@torch.no_grad()
@np.errstate(over="ignore", invalid="ignore")  # of boxes that are not finite: they match nothing
def find_claims(
    boxes_per_image: list[Tensor],
    windows: Windows,
    grids: list[tuple[int, int]],
    *,
    radius: float = 1.0,
    num_nearest: int = 0,
) -> Claims:
    """Find the windows that satisfy rules 1 to 3 for each object.

    Args:
        boxes_per_image, windows, grids: as of `assign`.
        radius: of rule 3, in strides.
        num_nearest: rule 3 also holds for this number of nearest locations of each level, and for
            those at the same distance as the last of them.
    """
    # In NumPy, whose operations on small arrays take half the time.
    boxes = torch.cat(boxes_per_image).float().numpy(force=True)
    num_objects = [len(boxes) for boxes in boxes_per_image]
    image = np.repeat(np.arange(len(num_objects)), num_objects)
    row = np.concatenate([np.arange(0), *map(np.arange, num_objects)])
    strides, sides = (np.array(x, dtype=np.float32) for x in (windows.strides, windows.sizes))
    center = (boxes[:, 2:] + boxes[:, :2]) / 2
    extent = boxes[:, 2:] - boxes[:, :2]
    longer_side, area = extent.max(1), extent.prod(1)
    size_limit = np.maximum(2 * longer_side, np.float32(windows.min_size))

    # P candidates: an object, and a level and size whose windows may be neither too small nor too
    # large. With a pixel to spare: rounding depends on the location, where both are tested exactly.
    largest, smallest = size_limit[:, None, None] + strides[:, None], longer_side[:, None, None]
    fits = (sides <= largest + 1) & (sides >= smallest - 1)  # (M objects, L levels, S sizes)
    obj, level, size = fits.nonzero()

    # Locations are tested on each axis: (P, R, 2), the last as (x, y). A circle of this reach
    # contains floor(c) - floor(reach) .. floor(c) + floor(reach) + 1. It has `num_nearest`
    # locations or more: the unit squares around them cover the circle that is sqrt(0.5) smaller.
    reach = max(radius, math.sqrt(num_nearest / math.pi) + math.sqrt(0.5) if num_nearest else 0.0)
    steps = np.arange(-math.floor(reach), math.floor(reach) + 2)
    stride, half = strides[level, None, None], sides[level, size, None, None] / 2
    box, of_box = boxes[obj, None], center[obj, None]
    index = np.floor(of_box / stride).astype(np.int64) + steps[:, None]
    middle = index.astype(np.float32) * stride
    low, high = middle - half, middle + half
    inside = (low <= box[..., :2]) & (box[..., 2:] <= high)
    inside &= (index >= 0) & (index < np.array(grids)[level, None, ::-1])
    small_enough = size_limit[obj, None] - ((high - low)[..., 0] - stride[..., 0]) >= 0
    offset = (of_box - (low + high) / 2) / stride
    square = offset * offset
    distance = square[:, None, :, 0] + square[:, :, None, 1]  # (P, R rows, R columns)
    central = distance <= radius * radius
    if num_nearest:
        of_pair = distance.reshape(len(obj), len(steps) ** 2)
        central |= (
            distance <= np.partition(of_pair, num_nearest - 1)[:, num_nearest - 1, None, None]
        )
    matched = central & inside[:, :, None, 1] & (inside[..., 0] & small_enough)[:, None]

    candidate, v, u = matched.nonzero()
    y, x = index[candidate, v, 1], index[candidate, u, 0]
    obj, level, size = obj[candidate], level[candidate], size[candidate]
    group = (level * windows.num_sizes + size) * len(num_objects) + image[obj]
    most_rows, most_columns = map(max, zip(*grids, strict=True))
    number = (group * most_rows + y) * most_columns + x
    place = image[obj], row[obj], level, size, y, x
    return Claims(*place, obj, group, number, distance[candidate, v, u], area[obj])


@torch.compiler.disable
def assign(
    boxes_per_image: list[Tensor],
    windows: Windows,
    grids: list[tuple[int, int]],
    *,
    radius: float = 1.0,
) -> Assignment:
    """Find the positive windows and their objects.

    Args:
        boxes_per_image: per image, Tensor[K, 4] of objects ``(x0, y0, x1, y1)`` in pixels, K >= 0.
        windows: their geometry.
        grids: per level ``(H, W)``, rows and columns of windows.
        radius: of rule 3, in strides; the paper has 1.

    Example:
        >>> box = torch.tensor([[36.0, 36.0, 44.0, 44.0]])  # its center is that of window (10, 10)
        >>> assignment = assign([box], Windows((4,), ((44, 60),)), [(20, 20)])
        >>> list(zip(assignment.y.tolist(), assignment.x.tolist()))
        [(9, 10), (10, 9), (10, 10), (10, 11), (11, 10)]
    """
    claims = find_claims(boxes_per_image, windows, grids, radius=radius)
    _, inverse, num_claims = np.unique(claims.window, return_inverse=True, return_counts=True)
    alone = claims.select(num_claims[inverse] == 1)
    return alone.to_assignment(windows, len(boxes_per_image), boxes_per_image[0].device)
