"""Which window owns which object (paper, sec. 5.3, with detectron2's constants).

A window owns an object when the object's box lies inside of it, when it is not much larger than the
object, and when the two centres are within one stride. A window that several objects claim is
background. The last rule leaves at most a handful of places per object, level and size, so only
those are looked at, and not every window against every object.
"""

import math
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from tensormask.modeling.windows import Windows

# The centre rule, |window - object| <= 1 stride, leaves floor(c) - 1 .. floor(c) + 2 on each axis.
_REACH = (-1, 0, 1, 2)


class Assignment(NamedTuple):
    """F windows and their objects, sorted by (level, size, image); int64 (F,) unless said."""

    image: Tensor
    object: Tensor  # row in the targets of its image
    level: Tensor
    size: Tensor
    y: Tensor
    x: Tensor
    boxes: Tensor  # (F, 4) float, the windows, pixels
    counts: list[list[list[int]]]  # windows per level, size and image

    def levels(self) -> list[slice]:
        """Where the windows of each level are, also where there are none."""
        ends = list(accumulate(sum(map(sum, sizes)) for sizes in self.counts))
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def groups(self) -> list[tuple[int, int, slice]]:
        """``(level, size, slice)`` of each level and size that has windows."""
        groups, start = [], 0
        for level, sizes in enumerate(self.counts):
            for size, per_image in enumerate(sizes):
                end = start + sum(per_image)
                if end > start:
                    groups.append((level, size, slice(start, end)))
                start = end
        return groups


@torch.no_grad()
def assign(
    boxes_per_image: list[Tensor], windows: Windows, grids: list[tuple[int, int]]
) -> Assignment:
    """Find the windows that own an object.

    Args:
        boxes_per_image: per image, Tensor[K, 4] of objects ``(x0, y0, x1, y1)`` in pixels. K may be
            0.
        windows: their geometry.
        grids: per level ``(H, W)``, rows and columns of windows.
    """
    boxes = torch.cat(boxes_per_image).float()
    device = boxes.device
    num_objects = torch.tensor([len(b) for b in boxes_per_image], device=device)
    image = torch.repeat_interleave(torch.arange(len(boxes_per_image), device=device), num_objects)
    row = torch.arange(len(boxes), device=device) - (num_objects.cumsum(0) - num_objects)[image]
    center = (boxes[:, 2:] + boxes[:, :2]) / 2
    longer_side = (boxes[:, 2:] - boxes[:, :2]).amax(1)
    size_limit = (2 * longer_side).clamp(min=windows.min_size)

    # Candidates (M objects, L levels, S sizes, 4 rows, 4 columns), flattened.
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
    contained = (window[:, :2] <= boxes[obj, :2]) & (boxes[obj, 2:] <= window[:, 2:])
    small_enough = size_limit[obj] - (window[:, 2] - window[:, 0] - stride) >= 0
    offset = (center[obj] - (window[:, :2] + window[:, 2:]) / 2) / stride[:, None]
    central = (offset * offset).sum(1) <= 1
    height, width = torch.tensor(grids, device=device)[level].unbind(1)
    on_grid = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    owned = contained.all(1) & small_enough & central & on_grid

    # A window claimed twice is background. Each window gets a number of its own to be counted by.
    obj, level, size, y, x, window = (t[owned] for t in (obj, level, size, y, x, window))
    most_rows, most_columns = map(max, zip(*grids, strict=True))
    number = (image[obj] * windows.num_levels + level) * windows.num_sizes + size
    number = (number * most_rows + y) * most_columns + x
    _, inverse, claims = torch.unique(number, return_inverse=True, return_counts=True)
    shape = (windows.num_levels, windows.num_sizes, len(boxes_per_image))
    group = (level * windows.num_sizes + size) * len(boxes_per_image) + image[obj]
    keep = torch.where(claims[inverse] == 1)[0]
    keep = keep[torch.argsort(group[keep], stable=True)]
    counts = torch.bincount(group[keep], minlength=math.prod(shape)).view(shape)
    obj = obj[keep]
    return Assignment(
        image[obj],
        row[obj],
        level[keep],
        size[keep],
        y[keep],
        x[keep],
        window[keep],
        counts.tolist(),
    )
