"""Convolutions at the places that are asked for, and not on the whole map.

A map is cut into square tiles. Those that hold a place are gathered with as much of their
surroundings as the convolutions reach, and are convolved as a batch. The result is that of the
whole map, but for the order in which sums are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormask.layers.masks import to_device
from tensormask.layers.winograd import conv2d

_SIDE = 8  # of a tile: the least work where places stand in clusters of a few, as windows do
# Many small convolutions take longer than few large ones of as many operations.
_WORTH_IT = 0.7
_LEAST_CELLS = 1500  # of a map: on smaller ones nothing is won


class Tiles(NamedTuple):
    """P tiles of a map; int64 (P,) each."""

    n: Tensor
    row: Tensor  # of tiles
    column: Tensor

    @staticmethod
    def grid(x: Tensor) -> tuple[int, int, int]:
        """Images, and rows and columns of tiles, of a map (N, C, H, W)."""
        return len(x), -(-x.shape[2] // _SIDE), -(-x.shape[3] // _SIDE)

    @classmethod
    def touching(cls, x: Tensor, n: Tensor, boxes: Tensor) -> Tiles:
        """The tiles of a map that K boxes have cells of.

        Args:
            x: the map (N, C, H, W).
            n (Tensor[K]): the image of each box.
            boxes (Tensor[K, 4]): first and last row and column, ``(y0, x0, y1, x1)``, int64; may
                reach beyond the map, but not lie there.
        """
        num, rows, columns = cls.grid(x)
        limit = n.new_tensor([rows, columns] * 2) * _SIDE - 1
        y0, x0, y1, x1 = (boxes.clamp(min=0).minimum(limit) // _SIDE).unbind(1)
        # Ones at the corners add up, row by row and column by column, to the boxes over each tile.
        corners = n.new_zeros(num, rows + 1, columns + 1)
        for row, column, sign in (
            *((y0, x0, 1), (y0, x1 + 1, -1)),
            *((y1 + 1, x0, -1), (y1 + 1, x1 + 1, 1)),
        ):
            corners.index_put_((n, row, column), n.new_tensor(sign), accumulate=True)
        boxes_over = corners.cumsum(1).cumsum(2)[:, :rows, :columns]
        return cls(*boxes_over.nonzero().unbind(1))

    def convolve(self, convs: Sequence[nn.Conv2d], x: Tensor) -> Tensor:
        """A chain of convolutions of a map, with a ReLU between each two: (P, C', side, side)."""
        x, inside = self._gather(x, halo=len(convs))
        for i, conv in enumerate(convs):
            if i > 0:
                # Beyond its border a map is zero for each convolution anew.
                x = F.relu(x, inplace=True) * inside
            x = conv2d(x, conv.weight, conv.bias)
            inside = inside[:, :, 1:-1, 1:-1]
        return x

    def spare_work(self, convs: Sequence[nn.Conv2d], x: Tensor) -> bool:
        """Whether `convolve` takes less time than convolutions of the whole map."""
        sides = range(_SIDE + 2 * len(convs) - 2, 0, -2)  # after each convolution
        work = sum(conv.weight.numel() * side**2 for conv, side in zip(convs, sides, strict=False))
        work_of_map = sum(conv.weight.numel() for conv in convs) * x[:, 0].numel()
        large = x.shape[2] * x.shape[3] >= _LEAST_CELLS
        return large and len(self.n) * work <= _WORTH_IT * work_of_map

    def put(self, tiles: Tensor, x: Tensor) -> Tensor:
        """A map (N, C', H, W) of the size of ``x`` of tiles (P, C', side, side), 0 elsewhere."""
        num, rows, columns = self.grid(x)
        cells = tiles.new_zeros(num, tiles.shape[1], rows, _SIDE, columns, _SIDE)
        cells[self.n, :, self.row, :, self.column] = tiles
        whole = cells.flatten(4, 5).flatten(2, 3)
        return whole[:, :, : x.shape[2], : x.shape[3]]

    def _gather(self, x: Tensor, halo: int) -> tuple[Tensor, Tensor]:
        """The tiles and the places around them: (P, C, side, side), 0 beyond the border.

        Returns:
            them, and (P, 1, side, side) with 1 for what is on the map and 0 for what is not.
        """
        reach = torch.arange(-halo, _SIDE + halo, device=x.device)
        row, column = self.row[:, None] * _SIDE + reach, self.column[:, None] * _SIDE + reach
        height, width = x.shape[-2:]
        row_inside, column_inside = (row >= 0) & (row < height), (column >= 0) & (column < width)
        inside = (row_inside[:, :, None] & column_inside[:, None, :])[:, None].to(x.dtype)
        row, column = row.clamp(0, height - 1), column.clamp(0, width - 1)
        tiles = x[self.n[:, None, None], :, row[:, :, None], column[:, None, :]]
        return tiles.permute(0, 3, 1, 2) * inside, inside


def convolve_at(
    convs: Sequence[nn.Conv2d], x: Tensor, n: Tensor, row: Tensor, column: Tensor
) -> Tensor:
    """A chain of convolutions, with a ReLU between each two, at chosen places of a map.

    Args:
        convs: of 3 x 3, stride 1 and padding 1.
        x: the map (N, C, H, W).
        n, row, column: K places, int64 (K,) each. On the host they spare a GPU from being waited
            for.

    Returns:
        Tensor[K, C'] of what the chain gives there.
    """
    grid = Tiles.grid(x)
    number = (n * grid[1] + row // _SIDE) * grid[2] + column // _SIDE
    number, tile = number.unique(return_inverse=True)
    tiles = Tiles(*torch.unravel_index(to_device(number, x.device), grid))
    tile, n, row, column = to_device(torch.stack([tile, n, row, column]), x.device)
    if tiles.spare_work(convs, x):
        return tiles.convolve(convs, x)[tile, :, row % _SIDE, column % _SIDE]
    for conv in convs[:-1]:
        x = F.relu(conv(x), inplace=True)
    return convs[-1](x)[n, :, row, column]
