"""The geometry of the sliding windows: strides, sizes, indices and boxes.

A window has five indices: image, level, size (into the sizes of its level), and row ``y`` and
column ``x`` on the level's grid. It is a square centered at ``(x * stride, y * stride)`` pixels,
not clipped to the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensormask.layers._constants import constant
from tensormask.modeling.inputs import padded_size
from tensormask.utils.errors import UserError


@dataclass(frozen=True)
class Windows:
    """The geometry of the windows of all levels.

    Args:
        strides: pixels between neighboring windows, per level, fine to coarse.
        sizes: sides of the square windows in pixels, per level; equally many on each level.

    Raises:
        UserError: the lengths differ, or a size of the finest level is not a multiple of its
            stride.

    Example:
        >>> Windows(strides=(4, 8), sizes=((44, 60), (88, 120))).mask_sizes
        [11, 15]
    """

    strides: tuple[int, ...]
    sizes: tuple[tuple[float, ...], ...]

    @classmethod
    def of_strides(cls, strides: Sequence[int], mask_sizes: Sequence[int] = (11, 15)) -> "Windows":
        """Return windows whose sides are multiples of their strides, by default the paper's."""
        sizes = tuple(tuple(float(stride * side) for side in mask_sizes) for stride in strides)
        return cls(tuple(strides), sizes)

    def __post_init__(self) -> None:
        if len(self.strides) != len(self.sizes) or len({len(s) for s in self.sizes}) != 1:
            raise UserError(
                f"{len(self.strides)} levels need {len(self.strides)} lists of window sizes, all "
                f"of one length, got {self.sizes}"
            )
        if any(size % self.strides[0] or size <= self.strides[0] for size in self.sizes[0]):
            raise UserError(
                f"window sizes of the finest level must be multiples of its stride, "
                f"{self.strides[0]} px, and larger than it, got {self.sizes[0]}"
            )

    @property
    def num_levels(self) -> int:
        return len(self.strides)

    @property
    def levels(self) -> list[int]:
        """Pyramid level of each stride: 2 for 4 px, ..."""
        return [stride.bit_length() - 1 for stride in self.strides]

    @property
    def level_names(self) -> list[str]:
        """Names of the levels in `MODEL.TENSOR_MASK.IN_FEATURES`: "p2", "p3", ..."""
        return [f"p{level}" for level in self.levels]

    @property
    def num_sizes(self) -> int:
        """Number of windows at each location."""
        return len(self.sizes[0])

    @property
    def mask_sizes(self) -> list[int]:
        """Side of the masks on the finest level, per window size, in mask pixels."""
        return [int(size) // self.strides[0] for size in self.sizes[0]]

    @property
    def min_size(self) -> float:
        """Lower bound, in the assignment, of twice the longer side of an object, in pixels."""
        return min(self.sizes[0]) - self.strides[0]

    def boxes(self, level: Tensor, size: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Return boxes ``(x0, y0, x1, y1)`` in pixels (K, 4) of K windows, int64 (K,) each."""
        strides = constant(self.strides, torch.float32, level.device)
        half = constant(self.sizes, torch.float32, level.device)[level, size] / 2
        center_x, center_y = x * strides[level], y * strides[level]
        return torch.stack(
            [center_x - half, center_y - half, center_x + half, center_y + half], dim=1
        )

    def grids(self, input_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return rows and columns of windows, per level, for an input of (height, width) pixels."""
        height, width = padded_size(*input_size)
        return [(-(-height // stride), -(-width // stride)) for stride in self.strides]
