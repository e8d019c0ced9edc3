"""Convolutions in cells against the same convolutions of the whole feature map."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tensormask.layers.plain import plain_tower
from tensormask.layers.winograd import convolve_patches
from tensormask.modeling.cells import Cells, are_faster, as_rows, convolve_cells, dilate
from tensormask.modeling.head import conv_tower

_PLACES = {
    "one": [(0, 9, 9)],
    "corners, where cells leave the feature map": [(0, 0, 0), (1, 21, 17), (1, 0, 17)],
    "neighbors": [(1, 7, 7), (1, 8, 8), (0, 7, 8), (1, 7, 11)],
    "none": [],
}


def make_tower(channels: list[int], norm: str = "") -> nn.Sequential:
    torch.manual_seed(0)
    tower = conv_tower(*channels, norm=norm)
    for value in tower.parameters():
        if value.dim() == 1:  # makes values outside of the border nonzero, unless reset
            nn.init.normal_(value)
    return tower.double().eval()


def choose(places: list[tuple[int, int, int]], size: tuple[int, int, int]) -> torch.Tensor:
    wanted = torch.zeros(size, dtype=torch.bool)
    for place in places:
        wanted[place] = True
    return wanted


@pytest.mark.parametrize("places", _PLACES.values(), ids=_PLACES)
@pytest.mark.parametrize("num_convs, norm", [(1, ""), (4, ""), (3, "LN")])
def test_values_and_gradients(num_convs: int, norm: str, places) -> None:
    tower = make_tower([3, 5, num_convs], norm)
    x = torch.randn(2, 3, 22, 18, dtype=torch.float64, requires_grad=True)
    wanted = choose(places, (2, 22, 18))
    rows, cells = convolve_cells(plain_tower([*tower][:-1]), as_rows(x), wanted)
    y = nn.Sequential(*[*tower][:-1])(x).permute(0, 2, 3, 1).flatten(0, 2)
    at = cells.locations().flatten()
    chosen = (at >= 0) & wanted.flatten()[at]
    assert chosen.sum() == wanted.sum() == len(places)
    assert_close(rows[chosen], y[at[chosen]], rtol=1e-9, atol=1e-9)
    sources = [x, *tower.parameters()]
    grads = [torch.autograd.grad(v.square().sum(), sources) for v in (rows[chosen], y[at[chosen]])]
    assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_winograd_of_patches_equals_the_convolution() -> None:
    """More patches than a chunk takes, and zeros where an index is -1."""
    torch.manual_seed(0)
    rows = torch.randn(900, 128, dtype=torch.float64)
    index = torch.randint(-1, 900, (36 * 200,))
    conv = nn.Conv2d(128, 40, 3).double()
    patches = torch.cat([rows, rows.new_zeros(1, 128)])[index].view(200, 6, 6, 128)
    expected = conv(patches.permute(0, 3, 1, 2))
    with torch.no_grad():
        actual = convolve_patches(rows, index, conv.weight, conv.bias)
    assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_work_depends_on_the_number_of_cells() -> None:
    """A tenth of a level of 56 x 56 is faster in cells, its half with borders is not."""
    layers = plain_tower([*make_tower([3, 5, 4])])
    few, many = (torch.zeros(1, 56, 56, dtype=torch.bool) for _ in range(2))
    few[0, :12, :24], many[0, ::4, ::6] = True, True
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert are_faster(layers, few, cpu)
    assert not are_faster(layers, many, cpu)
    assert not are_faster(layers, few, cpu, max_work=0.1)
    assert not are_faster(layers, few[:, :24], cpu)  # a small level
    assert not are_faster(layers, few, gpu)  # saves few multiplications


def test_cells_and_their_locations() -> None:
    """A cell in the corner of a feature map of 6 x 6: with a border, 3 x 3 are inside."""
    cells = Cells.touching(choose([(0, 4, 5)], (1, 6, 6)))
    assert [x.tolist() for x in cells[:3]] == [[0], [1], [1]]
    (numbers,) = cells.locations(border=1)
    assert numbers[:3, :3].tolist() == [[21, 22, 23], [27, 28, 29], [33, 34, 35]]
    assert (numbers == -1).sum() == 36 - 9
    assert dilate(choose([(0, 4, 5)], (1, 6, 6)), 1).sum() == 6


def test_cells_begin_where_fewer_are_needed() -> None:
    """Rows 3 to 6, columns 3 to 5, in one cell instead of four."""
    cells = Cells.touching(dilate(choose([(0, y, 4) for y in (4, 5)], (1, 12, 12)), 1))
    assert (cells.shift, len(cells.n)) == (1, 1)
    assert cells.locations()[0, 0, 0] == 3 * 12 + 3
    assert cells.locations()[0, 3, 3] == 6 * 12 + 6
    corner = Cells.touching(choose([(0, 0, 0), (0, 3, 3), (0, 4, 4)], (1, 5, 5)))
    assert (corner.shift, len(corner.n)) == (0, 2)
