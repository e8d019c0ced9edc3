"""The sliding windows: where they are, how large, and how they are numbered.

A window is five numbers: image, level, size (an index into the sizes of its level), and row ``y``
and column ``x`` on the level's grid. It is a square centred on ``(x * stride, y * stride)`` pixels,
not clipped to the image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tensormask.modeling.inputs import padded_size
from tensormask.utils.errors import UserError


@dataclass(frozen=True)
class Windows:
    """The geometry of the windows of all levels.

    Args:
        strides: pixels between neighbouring windows, per level, fine to coarse.
        sizes: side of the square windows in pixels, per level; each level has as many.

    Raises:
        ValueError: the lists do not fit each other, or a size of the finest level is no multiple of
            its stride.
    """

    strides: tuple[int, ...]
    sizes: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if len(self.strides) != len(self.sizes) or len({len(s) for s in self.sizes}) != 1:
            raise UserError(
                f"{len(self.strides)} levels need as many lists of window sizes, of one length, "
                f"got {self.sizes}"
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
        """The pyramid level of each stride: 2 for 4 px, ..."""
        return [stride.bit_length() - 1 for stride in self.strides]

    @property
    def level_names(self) -> list[str]:
        """The levels as `MODEL.TENSOR_MASK.IN_FEATURES` names them: "p2", "p3", ..."""
        return [f"p{level}" for level in self.levels]

    @property
    def num_sizes(self) -> int:
        """Windows at each place."""
        return len(self.sizes[0])

    @property
    def mask_sizes(self) -> list[int]:
        """Side of the masks of the finest level, per window size, in mask pixels."""
        return [int(size) // self.strides[0] for size in self.sizes[0]]

    @property
    def min_size(self) -> float:
        """Objects smaller than half of this are assigned as if they were that large, in pixels."""
        return min(self.sizes[0]) - self.strides[0]

    def boxes(self, level: Tensor, size: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Boxes ``(x0, y0, x1, y1)`` of windows in pixels: four int64 (K,) to float32 (K, 4)."""
        strides = torch.tensor(self.strides, dtype=torch.float32, device=level.device)
        half = torch.tensor(self.sizes, dtype=torch.float32, device=level.device)[level, size] / 2
        center_x, center_y = x * strides[level], y * strides[level]
        return torch.stack(
            [center_x - half, center_y - half, center_x + half, center_y + half], dim=1
        )

    def grids(self, input_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Rows and columns of windows, per level, for an input of (height, width) pixels."""
        height, width = padded_size(*input_size)
        return [(-(-height // stride), -(-width // stride)) for stride in self.strides]
