"""Convolutions at the places that are asked for, and not on the whole map.

A map is cut into square tiles. Those that hold a place are gathered with as much of their
surroundings as the convolutions reach, and are convolved as a batch. The result is that of the
whole map, but for the order in which sums are added up.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.masks import to_device

_SIDE = 8  # of a tile: the least work where places stand in clusters of a few, as windows do
# Many small convolutions take longer than few large ones of as many operations.
_WORTH_IT = 0.7


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
    height, width = x.shape[-2:]
    rows_of_tiles, columns_of_tiles = (-(-length // _SIDE) for length in (height, width))
    number = (n * rows_of_tiles + row // _SIDE) * columns_of_tiles + column // _SIDE
    number, tile = number.unique(return_inverse=True)
    number = to_device(number, x.device)
    tile, n, row, column = to_device(torch.stack([tile, n, row, column]), x.device)
    sides = range(_SIDE + 2 * len(convs) - 2, 0, -2)  # after each convolution
    work = sum(conv.weight.numel() * side**2 for conv, side in zip(convs, sides, strict=False))
    work_of_map = sum(conv.weight.numel() for conv in convs) * len(x) * height * width
    if len(number) * work > _WORTH_IT * work_of_map:
        for conv in convs[:-1]:
            x = F.relu(conv(x), inplace=True)
        return convs[-1](x)[n, :, row, column]
    at = torch.unravel_index(number, (len(x), rows_of_tiles, columns_of_tiles))
    x, inside = _gather(x, *at, halo=len(convs))
    for i, conv in enumerate(convs):
        if i > 0:
            # Beyond its border a map is zero for each convolution anew.
            x = F.relu(x, inplace=True) * inside
        x = F.conv2d(x, conv.weight, conv.bias)
        inside = inside[:, :, 1:-1, 1:-1]
    return x[tile, :, row % _SIDE, column % _SIDE]


def _gather(x: Tensor, n: Tensor, row: Tensor, column: Tensor, halo: int) -> tuple[Tensor, Tensor]:
    """P tiles of a map and the places around them: (P, C, side, side), 0 beyond the border.

    Returns:
        the tiles, and (P, 1, side, side) with 1 for what is on the map and 0 for what is not.
    """
    reach = torch.arange(-halo, _SIDE + halo, device=x.device)
    row, column = row[:, None] * _SIDE + reach, column[:, None] * _SIDE + reach
    height, width = x.shape[-2:]
    row_inside, column_inside = (row >= 0) & (row < height), (column >= 0) & (column < width)
    inside = (row_inside[:, :, None] & column_inside[:, None, :])[:, None].to(x.dtype)
    row, column = row.clamp(0, height - 1), column.clamp(0, width - 1)
    tiles = x[n[:, None, None], :, row[:, :, None], column[:, None, :]]
    return tiles.permute(0, 3, 1, 2) * inside, inside
