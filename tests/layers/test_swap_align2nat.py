"""The op on both backends: by hand, against the formula, gradients, and invalid arguments."""

import importlib
import itertools
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tensormask.layers import SwapAlign2Nat, op_backend, swap_align2nat, swap_align2nat_at


@pytest.fixture(scope="module", autouse=True, params=["native", "reference"])
def backend(request):
    """Both backends must give the same values and messages."""
    if request.param == "native" and "TENSORMASK_WITHOUT_EXT" in os.environ:
        pytest.skip("TENSORMASK_WITHOUT_EXT: nothing is compiled")
    with op_backend(request.param):
        yield request.param


def sixteen_taps(x: Tensor, lambda_val: int, pad_val: float) -> Tensor:
    """Compute the paper's formula in loops: every output value from its sixteen taps."""
    num_images, channels, height, width = x.shape
    side = math.isqrt(channels)
    values = x.view(num_images, side, side, height, width).numpy()
    out_side, extents = side * lambda_val, (side, side, height, width)
    out = np.zeros((num_images, out_side, out_side, *grid_of(x, lambda_val)[1:]))
    for n, v, u, row, column in itertools.product(*map(range, out.shape)):
        at = (
            (v + 0.5) / lambda_val - 0.5,
            (u + 0.5) / lambda_val - 0.5,
            row * lambda_val + v - out_side / 2 + 0.5,
            column * lambda_val + u - out_side / 2 + 0.5,
        )
        # Per axis, the two neighbors of the coordinate with their weights.
        pairs = [[(t := math.floor(a), t + 1 - a), (t + 1, a - t)] for a in at]
        for corner in itertools.product(*pairs):
            tap, weights = zip(*corner, strict=True)
            inside = all(0 <= t < extent for t, extent in zip(tap, extents, strict=True))
            value = values[(n, *tap)] if inside else pad_val
            out[n, v, u, row, column] += math.prod(weights) * value
    return torch.from_numpy(out).flatten(1, 2)


def grid_of(x: Tensor, lambda_val: int) -> tuple[int, int, int]:
    return (x.shape[0], *(math.ceil(extent / lambda_val) for extent in x.shape[2:]))


def every_window(x: Tensor, lambda_val: int) -> Tensor:
    return torch.cartesian_prod(*map(torch.arange, grid_of(x, lambda_val)))


def as_dense(masks: Tensor, x: Tensor, lambda_val: int) -> Tensor:
    """Arrange the masks (K, V, U) of `every_window` like the dense result."""
    return masks.flatten(1).unflatten(0, grid_of(x, lambda_val)).permute(0, 3, 1, 2)


def test_lambda_1_shifts_each_mask_pixel() -> None:
    """3x3 masks at 2x3 locations: pixel (v, u) of window (y, x) reads (y + v - 1, x + u - 1)."""
    x = torch.arange(54.0).view(1, 9, 2, 3)
    # Window (0, 1): row v = 0 is above the input; pixel (v, u) is channel 3v + u at (v - 1, u).
    expected = torch.tensor([[-6.0, -6, -6], [18 + 0, 24 + 1, 30 + 2], [36 + 3, 42 + 4, 48 + 5]])
    assert_close(swap_align2nat(x, 1)[0, :, 0, 1].view(3, 3), expected)
    assert_close(swap_align2nat_at(x, torch.tensor([[0, 0, 1]]), 1)[0], expected)


def test_lambda_2_averages_locations_and_pads_borders() -> None:
    """1x1 masks of ones at 4x4 locations, padding 0.

    Along one axis, mask pixel v = 0 of window 1 reads the locations 1 and 2 with weight 1/2 each,
    and the channels -1 (padding) and 0 with weights 1/4 and 3/4: 3/4. Window 0 reads the locations
    -1 (padding) and 0: half of that.
    """
    x = torch.ones(1, 1, 4, 4)
    along = torch.tensor([[3 / 8, 3 / 4], [3 / 4, 3 / 4]])  # (v, window)
    expected = torch.einsum("vy,ux->vuyx", along, along).flatten(0, 1)
    assert_close(swap_align2nat(x, 2, 0.0)[0], expected)
    # Another padding gets the missing weight.
    assert_close(swap_align2nat(x, 2, -2.0)[0], expected - 2 * (1 - expected))


@settings(max_examples=25, deadline=None)
@given(
    side=st.integers(1, 4),
    lambda_val=st.integers(1, 4),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    pad_val=st.floats(-8, 8),
    seed=st.integers(0, 2**31),
)
def test_equals_the_formula(side, lambda_val, height, width, pad_val, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, side**2, height, width, dtype=torch.float64, generator=generator)
    expected = sixteen_taps(x, lambda_val, pad_val)
    assert_close(swap_align2nat(x, lambda_val, pad_val), expected)
    masks = swap_align2nat_at(x, every_window(x, lambda_val), lambda_val, pad_val)
    assert_close(as_dense(masks, x, lambda_val), expected)


@pytest.mark.parametrize("side, lambda_val", [(3, 1), (2, 2), (3, 2), (2, 3)])
def test_gradients(side: int, lambda_val: int) -> None:
    x = torch.randn(2, side**2, 4, 5, dtype=torch.float64, requires_grad=True)
    windows = every_window(x, lambda_val)[::2].repeat(2, 1)  # windows that overlap, each twice

    def at(x: Tensor) -> Tensor:
        return swap_align2nat_at(x, windows, lambda_val)

    # fast_mode compares random projections of the Jacobians.
    for function in (at, lambda x: swap_align2nat(x, lambda_val)):
        assert torch.autograd.gradcheck(function, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, x, fast_mode=True)


def test_the_reference_gathers_many_windows_in_chunks(monkeypatch, backend) -> None:
    if backend != "reference":
        return  # the compiled op has no chunks
    module = importlib.import_module("tensormask.layers.swap_align2nat_reference")
    x = torch.randn(1, 9, 6, 6, requires_grad=True)
    windows = every_window(x, 2)
    whole = swap_align2nat_at(x, windows, 2)
    grad = torch.randn_like(whole)
    (whole_grad,) = torch.autograd.grad(whole, x, grad)
    monkeypatch.setattr(module, "_MAX_VALUES_PER_CHUNK", 100)  # two windows of 6x6
    parts = swap_align2nat_at(x, windows, 2)
    assert torch.equal(parts, whole)
    assert_close(torch.autograd.grad(parts, x, grad)[0], whole_grad)


@pytest.mark.parametrize("shape", [(0, 9, 4, 6), (1, 9, 0, 6), (1, 9, 4, 0), (1, 9, 4, 6)])
def test_empty_tensors_and_no_windows(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    out, masks = swap_align2nat(x, 2), swap_align2nat_at(x, torch.zeros(0, 3).long(), 2)
    assert out.shape == (shape[0], 36, shape[2] // 2, shape[3] // 2)
    assert masks.shape == (0, 6, 6)
    masks.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.autograd.grad(out.sum(), x)[0].shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_memory_formats(dtype: torch.dtype) -> None:
    x = torch.randn(2, 9, 5, 6).to(dtype)
    expected = swap_align2nat(x.double(), 2)
    for layout in (torch.contiguous_format, torch.channels_last):
        dense = swap_align2nat(x.contiguous(memory_format=layout), 2)
        masks = swap_align2nat_at(x.contiguous(memory_format=layout), every_window(x, 2), 2)
        assert dense.dtype == masks.dtype == dtype
        tolerance = 16 * torch.finfo(dtype).eps
        assert_close(dense.double(), expected, rtol=tolerance, atol=tolerance)
        assert_close(as_dense(masks, x, 2).double(), expected, rtol=tolerance, atol=tolerance)


def test_module_is_detectron2s() -> None:
    x = torch.randn(1, 9, 4, 4)
    assert torch.equal(SwapAlign2Nat(2, pad_val=1.0)(x), swap_align2nat(x, 2, 1.0))
    assert torch.equal(SwapAlign2Nat(2)(x), swap_align2nat(x, 2, -6.0))


def test_lambda_is_an_integer() -> None:
    """test_swap_align2nat_op.py has the other invalid arguments."""
    with pytest.raises(ValueError, match=r"lambda_val must be an integer >= 1, got 1\.5"):
        swap_align2nat(torch.zeros(1, 9, 4, 4), 1.5)
