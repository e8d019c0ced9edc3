"""Convolutions at chosen locations of a feature map, each layer only where the next one reads it.

The feature map is divided into cells of 4x4 locations, the tiles of Winograd's algorithm. A layer
computes the cells that contain a location that the next layer reads, from patches of 6x6 inputs,
which are gathered as a batch. Nothing is computed twice: neighboring cells share their borders.
`tiles` computes borders again for every tile, and suits a few locations of which one is as far from
the next as the convolutions reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tensormask.layers.plain import PlainLayer
from tensormask.layers.winograd import convolve_patches
from tensormask.modeling.tiles import to_device_at_once

SIDE = 4


class Cells(NamedTuple):
    """P cells of a feature map; int64 (P,) each, on the CPU."""

    n: Tensor
    row: Tensor  # of cells
    column: Tensor
    size: tuple[int, int, int]  # N, H, W of the feature map

    @classmethod
    def touching(cls, wanted: Tensor) -> Cells:
        """Return the cells with a True value in ``wanted``, bool (N, H, W), on the CPU."""
        any_in_cell = F.max_pool2d(wanted[:, None].float(), SIDE, ceil_mode=True)[:, 0] > 0
        num, height, width = wanted.shape
        return cls(*any_in_cell.nonzero().unbind(1), (num, height, width))

    def locations(self, border: int = 0) -> Tensor:
        """Return the numbers of the locations of each cell, row by row.

        Returns:
            int64 (P, 4 + 2 * border, 4 + 2 * border); -1 outside of the feature map.
        """
        _, height, width = self.size
        reach = torch.arange(-border, SIDE + border)
        y = (self.row[:, None] * SIDE + reach)[:, :, None]
        x = (self.column[:, None] * SIDE + reach)[:, None, :]
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        return torch.where(inside, (self.n[:, None, None] * height + y) * width + x, -1)


def dilate(wanted: Tensor, reach: int) -> Tensor:
    """Return the locations at most ``reach`` rows and columns from a True one; bool (N, H, W)."""
    if reach == 0:
        return wanted
    return F.max_pool2d(wanted[:, None].float(), 2 * reach + 1, 1, reach)[:, 0] > 0


def convolve_cells(layers: Sequence[PlainLayer], x: Tensor, wanted: Tensor) -> tuple[Tensor, Cells]:
    """Apply layers, with ReLUs in between, at chosen locations of a feature map.

    Args:
        layers: of a `plain_tower`.
        x: the feature map (N, C, H, W). It is read at the chosen locations and as far around them
            as the convolutions reach; elsewhere it must be finite.
        wanted: bool (N, H, W), on the CPU.

    Returns:
        - Tensor[16 * P, C'], the results at the locations of the cells, in order. They are those of
          the whole feature map at the chosen locations, up to the order of sums.
        - the P cells with a chosen location.
    """
    regions = [Cells.touching(dilate(wanted, len(layers) - 1 - i)) for i in range(len(layers))]
    num, _, height, width = x.shape
    number, indices = torch.full((num * height * width + 1,), -1), []
    for below, cells in zip([None, *regions], regions, strict=False):
        index = cells.locations(border=1).flatten()
        if below is not None:  # from numbers of locations to rows of the layer below
            of_below = below.locations().flatten()
            number.fill_(-1)
            number[of_below] = torch.arange(len(of_below))
            number[-1] = -1
            index = number[index]
        indices.append(index)
    rows = as_rows(x)
    on_device = to_device_at_once(indices, x.device)
    for i, ((conv, norm), index) in enumerate(zip(layers, on_device, strict=True)):
        x = convolve_patches(rows, index, conv.weight, conv.bias)
        x = x if norm is None else norm(x)
        rows = as_rows(F.relu(x, inplace=True) if i < len(layers) - 1 else x)
    return rows, regions[-1]


def as_rows(x: Tensor) -> Tensor:
    """Return a feature map (N, C, H, W) as rows (N * H * W, C); a view if in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)
