"""The paper's operations on 4D tensors: by hand, and against formulas and the compiled op."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from pretended_cuda import pretend
from torch import Tensor
from torch.testing import assert_close

from tensormask import layers
from tensormask.layers import (
    align2nat,
    nat2align,
    representation,
    subsample,
    up_align2nat,
    up_align2nat_at,
    up_bilinear,
    up_nearest,
)


def tensor4d(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def test_align2nat_by_hand() -> None:
    """Masks of three pixels in a row of four windows: pixel u of window x is pixel x + u - 1."""
    aligned = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40], [100, 200, 300, 400]])
    natural = align2nat(aligned.view(1, 3, 1, 4), pad_val=-6.0).view(3, 4)
    # The window left of x = 1 is centered at x = 0; outside, the padding is read.
    assert natural.tolist() == [[-6, 1, 2, 3], [10, 20, 30, 40], [200, 300, 400, -6]]


@pytest.mark.parametrize("alpha", [1.0, 2.0, 0.5, 1.25, -1.0])
def test_align2nat_is_its_formula(alpha: float) -> None:
    """Value by value, from up to four taps; outside of (H, W) a tap is the padding."""
    num_rows, num_columns, height, width = 3, 2, 5, 6
    x, pad_val = tensor4d(num_rows, num_columns, height, width), -6.0
    natural = align2nat(x, alpha, pad_val)

    def read(v: int, u: int, row: int, column: int) -> float:
        inside = 0 <= row < height and 0 <= column < width
        return float(x[v, u, row, column]) if inside else pad_val

    for v, u, y, x_ in itertools.product(*map(range, natural.shape)):
        row, column = y + alpha * (v - 1), x_ + alpha * (u - 0.5)
        top, left = int(row // 1), int(column // 1)
        down, right = row - top, column - left
        expected = (
            (1 - down) * (1 - right) * read(v, u, top, left)
            + (1 - down) * right * read(v, u, top, left + 1)
            + down * (1 - right) * read(v, u, top + 1, left)
            + down * right * read(v, u, top + 1, left + 1)
        )
        assert float(natural[v, u, y, x_]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_nat2align_undoes_align2nat(alpha: float) -> None:
    x = tensor4d(2, 3, 5, 9, 11)
    back = nat2align(align2nat(x, alpha), alpha)
    border = int(2 * alpha)  # values that left the grid are lost
    inside = (..., slice(border, -border), slice(border, -border))
    assert_close(back[inside], x[inside])
    assert not torch.allclose(align2nat(x, alpha)[inside], x[inside])


def test_up_bilinear_by_hand() -> None:
    row = torch.tensor([0.0, 4.0]).view(1, 2, 1, 1)
    assert up_bilinear(row.expand(2, 2, 1, 1), 2)[0, :, 0, 0].tolist() == [0, 1, 3, 4]
    assert up_nearest(row.expand(2, 2, 1, 1), 2)[:, 1, 0, 0].tolist() == [0, 0, 0, 0]
    assert up_nearest(row.expand(2, 2, 1, 1), 1.5)[0, :, 0, 0].tolist() == [0, 4, 4]


@pytest.mark.parametrize(
    "lambda_val, sides", [(1, (3, 2)), (1.5, (4, 2)), (3, (2, 5)), (5, (1, 3))]
)
@pytest.mark.parametrize("up, mode", [(up_bilinear, "bilinear"), (up_nearest, "nearest-exact")])
def test_upscaling_is_interpolate_on_the_masks(lambda_val, sides, up, mode) -> None:
    x = tensor4d(2, *sides, 3, 4)
    upscaled = up(x, lambda_val)
    size = tuple(round(side * lambda_val) for side in sides)
    assert upscaled.shape == (2, *size, 3, 4)
    masks = x.permute(0, 3, 4, 1, 2).flatten(0, 2)[:, None]
    expected = F.interpolate(masks, size=size, mode=mode)
    assert_close(upscaled.permute(0, 3, 4, 1, 2).flatten(0, 2), expected[:, 0])


def test_subsample_by_hand() -> None:
    x = torch.arange(35.0).view(1, 1, 5, 7)
    assert subsample(x, 3).tolist() == [[[[0, 3, 6], [21, 24, 27]]]]


@pytest.mark.parametrize("side", [3, 4])
@pytest.mark.parametrize("lambda_val", [1, 2, 3, 4])
def test_the_compiled_op_is_the_composition_except_for_borders(side: int, lambda_val: int) -> None:
    x = tensor4d(2, side, side, 17, 18)
    compiled = layers.swap_align2nat(x.flatten(1, 2), lambda_val)
    compiled = compiled.unflatten(1, (side * lambda_val, side * lambda_val))
    composed = representation.swap_align2nat(x, lambda_val)
    assert composed.shape == compiled.shape
    # Pixels between the centers of the outermost pixels of the input's masks.
    outer = lambda_val // 2
    inside = (slice(None), *2 * (slice(outer, side * lambda_val - outer),))
    assert_close(composed[inside], compiled[inside])
    if lambda_val > 1:  # border values against padding
        assert not torch.allclose(composed[:, 0], compiled[:, 0])

    # If the masks are padded first, they are equal.
    border = F.pad(x.permute(0, 3, 4, 1, 2), (1, 1, 1, 1), value=-6.0).permute(0, 3, 4, 1, 2)
    composed = representation.swap_align2nat(border, lambda_val)
    cut = (slice(None), *2 * (slice(lambda_val, -lambda_val),))
    assert_close(composed[cut], compiled)


@pytest.mark.parametrize("lambda_val, side", [(1, 3), (1.5, 2), (1.5, 4), (2, 2), (3, 5), (5, 3)])
@pytest.mark.parametrize("mode", representation.UPSCALE_MODES)
def test_windows_equal_the_dense_tensor(lambda_val: float, side: int, mode: str) -> None:
    """Values and gradients of odd masks, and of even masks, whose center is between pixels."""
    x = tensor4d(2, side * side, 4, 6).requires_grad_()
    windows = torch.cartesian_prod(*map(torch.arange, (2, 4, 6)))
    masks = up_align2nat_at(x, windows, lambda_val, mode=mode)
    dense = up_align2nat(x.unflatten(1, (side, side)), lambda_val, mode=mode)
    dense = dense.permute(0, 3, 4, 1, 2).flatten(0, 2)
    assert_close(masks, dense)
    weight = tensor4d(*masks.shape, seed=1)
    assert_close(*(torch.autograd.grad((m * weight).sum(), x)[0] for m in (masks, dense)))


@pytest.mark.parametrize("alpha", [1.0, 0.75])
def test_gradients(alpha: float) -> None:
    x = tensor4d(1, 2, 3, 3, 4).requires_grad_()
    # fast_mode compares random projections of the Jacobians.
    functions = (
        lambda x: align2nat(x, alpha),
        lambda x: up_nearest(x, 3),
        lambda x: representation.swap_align2nat(x, 2, alpha),
    )
    for function in functions:
        assert torch.autograd.gradcheck(function, (x,), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (x,), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_keeps_dtype_and_values(dtype: torch.dtype) -> None:
    x = tensor4d(3, 3, 6, 6)
    windows = torch.tensor([[0, 2, 2], [0, 5, 0]])
    bound = 0.05 if dtype != torch.float32 else 1e-5
    for function in (
        lambda x: up_align2nat(x, 3),
        lambda x: nat2align(x, 0.5),
        lambda x: up_align2nat_at(x.flatten(0, 1)[None], windows, 3),
    ):
        low = function(x.to(dtype))
        assert low.dtype == dtype
        assert_close(low.double(), function(x), rtol=bound, atol=bound)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: align2nat(torch.zeros(3, 3, 4)), "V, U, H, W"),
        (lambda: align2nat(torch.zeros(3, 3, 4, 4, dtype=torch.int64)), "floating"),
        (lambda: up_bilinear(torch.zeros(3, 3, 4, 4), 1.5), r"integer lambda_val \* 3"),
        (lambda: up_bilinear(torch.zeros(3, 3, 4, 4), 0.5), ">= 1"),
        (lambda: up_align2nat(torch.zeros(3, 3, 4, 4), 2, mode="cubic"), "bilinear, nearest"),
        (lambda: up_align2nat_at(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3).long(), 2), "square"),
        (lambda: up_align2nat_at(torch.zeros(1, 4, 4, 4), torch.zeros(1, 2).long(), 2), "windows"),
        (lambda: up_align2nat_at(torch.zeros(1, 4, 4, 4), torch.tensor([[0, 4, 0]]), 2), "outside"),
    ],
)
def test_invalid_arguments(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_no_windows() -> None:
    assert up_align2nat_at(torch.zeros(1, 4, 3, 3), torch.zeros(0, 3).long(), 3).shape == (0, 6, 6)


@pytest.mark.parametrize("function", [align2nat, nat2align, up_bilinear, up_nearest, up_align2nat])
def test_a_gpu_gets_constants_once(function) -> None:
    """The host waits for such a copy."""
    arguments = (2,) if function in (up_bilinear, up_nearest, up_align2nat) else ()
    x = tensor4d(1, 3, 3, 4, 5)
    with pretend() as record:
        on_gpu = x.cuda()
        function(on_gpu, *arguments)
        record.clear()
        again = function(on_gpu, *arguments)
        assert record.waits.total() == 0, record.waits
    assert_close(again, function(x, *arguments))
