"""Convolutions at chosen locations of a feature map, instead of on all of it.

The feature map is divided into square tiles. The tiles that contain a location are gathered, with a
border as wide as the convolutions reach, and convolved as a batch. The result equals that of the
whole feature map, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tensormask.layers.masks import to_device
from tensormask.layers.plain import PlainLayer
from tensormask.layers.winograd import conv2d

_SIDE = 8  # of a tile: the least work for clusters of a few locations, as windows form them
# Many small convolutions take longer than a few large ones with as many operations.
_MAX_WORK = 0.7  # of that of the whole feature map
MIN_LOCATIONS = 1500  # of a feature map: on smaller ones tiles save no time on a CPU
# On a GPU, tiles take about 60 more launches in training, 0.1 ms or more. This many multiplications
# take as long at 400 TFLOP/s. This is a count, not a measurement.
MIN_SAVED_ON_GPU = 25e9


class Tiles(NamedTuple):
    """P tiles of a feature map; int64 (P,) each, on one device."""

    n: Tensor
    row: Tensor  # of tiles
    column: Tensor

    @staticmethod
    def grid(x: Tensor) -> tuple[int, int, int]:
        """Return the number of images, of rows and of columns of tiles of ``x`` (N, C, H, W)."""
        return len(x), -(-x.shape[2] // _SIDE), -(-x.shape[3] // _SIDE)

    @classmethod
    def touching(cls, x: Tensor, n: Tensor, boxes: Tensor) -> Tiles:
        """Return the tiles that overlap any of K boxes.

        Args:
            x: the feature map (N, C, H, W).
            n (Tensor[K]): the image of each box.
            boxes (Tensor[K, 4]): first and last row and column, ``(y0, x0, y1, x1)``, int64; each
                overlaps the feature map, and may leave it.
        """
        num, rows, columns = cls.grid(x)
        limit = n.new_tensor([rows, columns] * 2) * _SIDE - 1
        y0, x0, y1, x1 = (boxes.clamp(min=0).minimum(limit) // _SIDE).unbind(1)
        # Signs at the corners, summed over rows and columns, count the boxes over each tile.
        corners = n.new_zeros(num, rows + 1, columns + 1)
        y1, x1 = y1 + 1, x1 + 1
        for row, column, sign in (y0, x0, 1), (y0, x1, -1), (y1, x0, -1), (y1, x1, 1):
            corners.index_put_((n, row, column), n.new_tensor(sign), accumulate=True)
        num_boxes = corners.cumsum(1).cumsum(2)[:, :rows, :columns]
        return cls(*num_boxes.nonzero().unbind(1))

    def convolve(self, layers: Sequence[PlainLayer], x: Tensor) -> Tensor:
        """Apply the layers of a `plain_tower` at the tiles: (P, C', side, side)."""
        x, inside = self._gather(x, border=len(layers))
        for i, (conv, norm) in enumerate(layers):
            if i > 0:
                # Every convolution pads its own input with zeros.
                x = F.relu(x, inplace=True) * inside
            x = conv2d(x, conv.weight, conv.bias)
            x = x if norm is None else norm(x)
            inside = inside[:, :, 1:-1, 1:-1]
        return x

    def to(self, device: torch.device) -> Tiles:
        return Tiles(*to_device_at_once(self, device))

    def are_faster(self, layers: Sequence[PlainLayer], x: Tensor) -> bool:
        """Return whether `convolve` takes less time than convolutions of all of ``x``."""
        convs = [layer.conv for layer in layers]
        sides = range(_SIDE + 2 * len(convs) - 2, 0, -2)  # after each convolution
        work = sum(conv.weight.numel() * side**2 for conv, side in zip(convs, sides, strict=False))
        whole_work = sum(conv.weight.numel() for conv in convs) * x[:, 0].numel()
        if x.device.type == "cpu":
            large = x.shape[2] * x.shape[3] >= MIN_LOCATIONS
        else:
            passes = 3 if torch.is_grad_enabled() else 1  # forward, and backward for two gradients
            large = passes * (whole_work - len(self.n) * work) >= MIN_SAVED_ON_GPU
        return large and len(self.n) * work <= _MAX_WORK * whole_work

    def scatter(self, tiles: Tensor, x: Tensor) -> Tensor:
        """Return a feature map (N, C', H, W), as large as ``x``, from tiles (P, C', side, side).

        It is 0 at all other tiles.
        """
        num, rows, columns = self.grid(x)
        cells = tiles.new_zeros(num, tiles.shape[1], rows, _SIDE, columns, _SIDE)
        cells[self.n, :, self.row, :, self.column] = tiles
        whole = cells.flatten(4, 5).flatten(2, 3)
        return whole[:, :, : x.shape[2], : x.shape[3]]

    def _gather(self, x: Tensor, border: int) -> tuple[Tensor, Tensor]:
        """Return the tiles with their borders, and where these are inside of the feature map.

        Returns:
            - (P, C, side, side), 0 outside of the feature map;
            - (P, 1, side, side), 1 inside of it and 0 outside.
        """
        reach = torch.arange(-border, _SIDE + border, device=x.device)
        row, column = self.row[:, None] * _SIDE + reach, self.column[:, None] * _SIDE + reach
        height, width = x.shape[-2:]
        row_inside, column_inside = (row >= 0) & (row < height), (column >= 0) & (column < width)
        inside = (row_inside[:, :, None] & column_inside[:, None, :])[:, None].to(x.dtype)
        row, column = row.clamp(0, height - 1), column.clamp(0, width - 1)
        tiles = x[self.n[:, None, None], :, row[:, :, None], column[:, None, :]]
        return tiles.permute(0, 3, 1, 2) * inside, inside


def convolve_at(
    layers: Sequence[PlainLayer], x: Tensor, n: Tensor, row: Tensor, column: Tensor
) -> Tensor:
    """Apply layers, with ReLUs in between, at K locations of a feature map.

    Args:
        layers: of a `plain_tower`.
        x: the feature map (N, C, H, W).
        n, row, column: the locations, int64 (K,) each; best on the CPU, where no GPU has to be
            waited for.

    Returns:
        Tensor[K, C'].
    """
    grid = Tiles.grid(x)
    number = (n * grid[1] + row // _SIDE) * grid[2] + column // _SIDE
    number, tile = number.unique(return_inverse=True)
    tiles = Tiles(number // (grid[1] * grid[2]), number // grid[2] % grid[1], number % grid[2])
    if tiles.are_faster(layers, x):
        within = to_device(torch.stack([tile, row % _SIDE, column % _SIDE]), x.device)
        tile, row, column = within
        return tiles.to(x.device).convolve(layers, x)[tile, :, row, column]
    n, row, column = to_device(torch.stack([n, row, column]), x.device)
    for i, (conv, norm) in enumerate(layers):
        x = conv(x if i == 0 else F.relu(x, inplace=True))
        x = x if norm is None else norm(x)
    return x[n, :, row, column]


def to_device_at_once(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Move tensors of one dtype, which differ in their first size only, in one copy.

    As with `to_device`, the host does not wait for a copy to a GPU.
    """
    if all(x.device.type == device.type for x in tensors):
        return list(tensors)
    return list(to_device(torch.cat(list(tensors)), device).split(list(map(len, tensors))))
