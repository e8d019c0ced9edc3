"""Convolutions at chosen locations of a feature map, each layer only where the next one reads it.

The feature map is divided into cells of 4x4 locations, the tiles of Winograd's algorithm. A layer
computes the cells that contain a location that the next layer reads, from patches of 6x6 inputs,
which are gathered as a batch. Nothing is computed twice: neighboring cells share their borders.
`tiles` computes borders again for every tile, and suits a few locations of which one is as far from
the next as the convolutions reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tensormask.layers.masks import to_device
from tensormask.layers.plain import PlainLayer
from tensormask.layers.winograd import convolve_patches
from tensormask.modeling.tiles import MIN_LOCATIONS, MIN_SAVED_ON_GPU, to_device_at_once

SIDE = 4
# Of the multiplications of the whole feature map. Gathered patches take about 1.2 of the time.
_MAX_WORK = 0.8


class Cells(NamedTuple):
    """P cells of a feature map; int64 (P,) each, on the CPU."""

    n: Tensor
    row: Tensor  # of cells
    column: Tensor
    size: tuple[int, int, int]  # N, H, W of the feature map
    shift: int = 0  # rows and columns of the first cells that are outside of it

    @classmethod
    def touching(cls, wanted: Tensor) -> Cells:
        """Return the cells with a True value in ``wanted``, bool (N, H, W), on the CPU.

        Of cells that begin at location 0 and at -1, the fewer ones: a query asks for blocks of 2x2
        locations, whose borders begin at odd ones.
        """
        num, height, width = wanted.shape
        found = []
        for shift in (0, 1):
            padded = F.pad(wanted[:, None].float(), (shift, 0, shift, 0))
            found.append((F.max_pool2d(padded, SIDE, ceil_mode=True)[:, 0] > 0).nonzero())
        shift = int(len(found[1]) < len(found[0]))
        n, row, column = found[shift].unbind(1)
        return cls(n, row, column, (num, height, width), shift)

    def locations(self, border: int = 0) -> Tensor:
        """Return the numbers of the locations of each cell, row by row.

        Returns:
            int64 (P, 4 + 2 * border, 4 + 2 * border); -1 outside of the feature map.
        """
        _, height, width = self.size
        reach = torch.arange(-border, SIDE + border) - self.shift
        y = (self.row[:, None] * SIDE + reach)[:, :, None]
        x = (self.column[:, None] * SIDE + reach)[:, None, :]
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        return torch.where(inside, (self.n[:, None, None] * height + y) * width + x, -1)

    def rows_at(self) -> Tensor:
        """Return the row of each location among those of the cells, int64 (N * H * W + 1,).

        It is -1 outside of the cells, and for the number -1.
        """
        at = self.locations().flatten()
        row = torch.full((math.prod(self.size) + 1,), -1)
        row[at] = torch.arange(len(at))
        row[-1] = -1
        return row


def dilate(wanted: Tensor, reach: int) -> Tensor:
    """Return the locations at most ``reach`` rows and columns from a True one; bool (N, H, W)."""
    if reach == 0:
        return wanted
    x, side = wanted[:, None].float(), 2 * reach + 1
    x = F.max_pool2d(x, (side, 1), 1, (reach, 0))
    return F.max_pool2d(x, (1, side), 1, (0, reach))[:, 0] > 0


def convolve_cells(
    layers: Sequence[PlainLayer], rows: Tensor, wanted: Tensor, below: Cells | None = None
) -> tuple[Tensor, Cells]:
    """Apply layers, with ReLUs in between, at chosen locations of a feature map.

    Args:
        layers: of a `plain_tower`.
        rows: the features of all locations (N * H * W, C), as of `as_rows`, or of those of the
            cells ``below`` (16 * P, C). They are read at the chosen locations and as far around
            them as the convolutions reach; elsewhere they must be finite.
        wanted: bool (N, H, W), on the CPU.

    Returns:
        - Tensor[16 * P', C'], the results at the locations of the cells, in order. They are those
          of the whole feature map at the chosen locations, up to the order of sums.
        - the P' cells with a chosen location.
    """
    regions = cells_of_layers(len(layers), wanted)
    indices = []
    for source, cells in zip([below, *regions], regions, strict=False):
        index = cells.locations(border=1).flatten()
        if source is not None:  # from numbers of locations to rows of the layer below
            index = source.rows_at()[index]
        indices.append(index)
    on_device = to_device_at_once(indices, rows.device)
    for i, ((conv, norm), index) in enumerate(zip(layers, on_device, strict=True)):
        x = convolve_patches(rows, index, conv.weight, conv.bias)
        x = x if norm is None else norm(x)
        rows = as_rows(F.relu(x, inplace=True) if i < len(layers) - 1 else x)
    return rows, regions[-1]


def convolve_cells_at(
    layers: Sequence[PlainLayer], x: Tensor, n: Tensor, row: Tensor, column: Tensor
) -> Tensor | None:
    """Return the results (K, C') at K locations of a feature map, None if that is not faster.

    Args:
        layers: of a `plain_tower`.
        x: the feature map (N, C, H, W).
        n, row, column: the locations, int64 (K,) each, on the CPU.
    """
    height, width = x.shape[2:]
    wanted = torch.zeros(len(x), height, width, dtype=torch.bool)
    wanted_at = (n * height + row) * width + column
    wanted.view(-1)[wanted_at] = True
    if not are_faster(layers, wanted, x.device):
        return None
    rows, cells = convolve_cells(layers, as_rows(x), wanted)
    return rows[to_device(cells.rows_at()[wanted_at], x.device)]


def cells_of_layers(num_layers: int, wanted: Tensor) -> list[Cells]:
    """Return the cells that each layer of `convolve_cells` computes, the first layer's first."""
    return [Cells.touching(dilate(wanted, reach)) for reach in reversed(range(num_layers))]


def are_faster(
    layers: Sequence[PlainLayer],
    wanted: Tensor,
    device: torch.device,
    max_work: float | None = None,
) -> bool:
    """Return whether `convolve_cells` takes less time than convolutions of the feature map.

    ``max_work``: the largest share of the multiplications.
    """
    sizes = [layer.conv.weight.numel() for layer in layers]
    regions = cells_of_layers(len(layers), wanted)
    work = sum(size * SIDE**2 * len(cells.n) for size, cells in zip(sizes, regions, strict=True))
    whole = sum(sizes) * wanted.numel()
    if device.type != "cpu" and whole - work < MIN_SAVED_ON_GPU:
        return False
    return (
        wanted.numel() >= MIN_LOCATIONS
        and work <= (_MAX_WORK if max_work is None else max_work) * whole
    )


def as_rows(x: Tensor) -> Tensor:
    """Return a feature map (N, C, H, W) as rows (N * H * W, C); a view if in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)
