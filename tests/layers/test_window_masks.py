"""Masks of windows from features: the compiled op against the aligned tensor that is swapped."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tensormask.layers import _native, op_backend, window_masks
from tensormask.layers.representation import align2nat, up_bilinear
from tensormask.layers.window_masks import is_faster, upsample_locations

native = pytest.mark.skipif("cpu" not in _native.DEVICES, reason="no compiled op")


def case(side: int, num_features: int, grid: tuple[int, int], steps: int) -> list[Tensor]:
    """Return features, weight and bias, seeded, and all windows of two images in another order."""
    torch.manual_seed(0)
    x = torch.randn(2, num_features, *grid, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(side**2, num_features, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(side**2, dtype=torch.float64, requires_grad=True)
    ranges = [torch.arange(2), *(torch.arange(-(-extent // steps)) for extent in grid)]
    windows = torch.cartesian_prod(*ranges)
    return [x, weight, bias, windows[torch.randperm(len(windows))]]


def results(inputs: list[Tensor], steps: int, zoom: int, backend: str = "auto") -> list[Tensor]:
    """Return the masks, and the gradients of the first three inputs for a seeded gradient."""
    with op_backend(backend):
        masks = window_masks.window_masks(*inputs, steps, zoom)
        grad = torch.randn(masks.shape, generator=torch.Generator().manual_seed(1))
        return [masks, *torch.autograd.grad(masks, inputs[:3], grad.to(masks.dtype))]


@native
@pytest.mark.parametrize(
    "side, steps, zoom",
    [
        *[(1, 1, 2), (3, 1, 2), (3, 1, 4), (6, 1, 2), (4, 1, 3), (3, 1, 3), (15, 1, 2)],
        *[(1, 1, 1), (3, 1, 1), (6, 1, 1), (15, 1, 1), (3, 2, 1), (6, 2, 1), (4, 16, 1)],
        *[(3, 2, 2), (6, 2, 4), (5, 2, 3), (3, 8, 2), (4, 16, 4)],
    ],
)
def test_masks_and_gradients_are_those_of_the_aligned_tensor(side: int, steps: int, zoom: int):
    """At all windows, also of coarse levels, most of which are outside of the feature map."""
    inputs = case(side, num_features=5 + side, grid=(20, 9), steps=steps)
    expected = results(inputs, steps, zoom, "reference")
    assert_close(results(inputs, steps, zoom), expected)
    in_float32 = [x.detach().float().requires_grad_() for x in inputs[:3]] + inputs[3:]
    for actual, exact in zip(results(in_float32, steps, zoom), expected, strict=True):
        assert_close(actual.double(), exact, rtol=1e-4, atol=1e-4)


def test_finer_masks_by_definition() -> None:
    """By the paper's operations, on features that are upsampled; inside of the feature map."""
    x, weight, bias, _ = case(side=3, num_features=4, grid=(12, 12), steps=1)
    fine = upsample_locations(x, 2)
    aligned = torch.einsum("dc,nchw->ndhw", weight, fine) + bias[:, None, None]
    aligned = up_bilinear(aligned.unflatten(1, (3, 3)), 2)
    natural = align2nat(aligned)[..., ::2, ::2]
    masks = window_masks.window_masks(x, weight, bias, torch.tensor([[1, 5, 6], [0, 4, 4]]), 1, 2)
    inner = slice(1, -1)  # around a mask, the op reads the padding
    for mask, (n, row, column) in zip(masks, ((1, 5, 6), (0, 4, 4)), strict=True):
        assert_close(mask[inner, inner], natural[n, inner, inner, row, column])


@native
def test_the_gradient_is_differentiable_and_repeatable() -> None:
    x, weight, bias, windows = case(side=3, num_features=2, grid=(4, 5), steps=2)
    few = windows[:3]
    torch.autograd.gradgradcheck(
        lambda *inputs: window_masks.window_masks(*inputs, few, 2, 2),
        (x, weight, bias),
        fast_mode=True,
    )
    x, weight, bias, windows = case(side=5, num_features=16, grid=(40, 40), steps=1)
    inputs = [each.detach().float().requires_grad_() for each in (x, weight, bias)] + [windows]
    for first, second in zip(results(inputs, 1, 2), results(inputs, 1, 2), strict=True):
        assert torch.equal(first, second)


@native
def test_no_windows_and_wrong_arguments() -> None:
    x, weight, bias, windows = case(side=3, num_features=4, grid=(4, 5), steps=1)
    masks = window_masks.window_masks(x, weight, bias, windows[:0], 1, 2)
    assert masks.shape == (0, 6, 6)
    assert all((g == 0).all() for g in torch.autograd.grad(masks.sum(), (x, weight, bias)))
    last = x.detach().permute(0, 2, 3, 1).contiguous()
    arguments = {"x": last, "weight": weight.detach(), "bias": bias.detach(), "windows": windows}
    for name, value, words in (
        ("x", last.float(), "x must be"),
        ("x", last.transpose(1, 2), "x must be"),
        ("weight", weight.detach()[:8], "square number of rows, got 8"),
        ("bias", bias.detach()[:8], "bias must be"),
        ("windows", windows.int(), "windows must be"),
        ("windows", torch.tensor([[0, 4, 0]]), r"\[0, 4, 0\] is outside of the grid"),
        ("windows", torch.tensor([[-1, 0, 0]]), r"\[-1, 0, 0\] is outside of the grid"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.tensormask.window_masks(*(arguments | {name: value}).values(), 1, 2, -6.0)
    grad = torch.zeros(3, 6, 6, dtype=torch.float64)
    del arguments["bias"]
    with pytest.raises(RuntimeError, match="grad must be"):
        torch.ops.tensormask.window_masks_backward(grad, *arguments.values(), 1, 2)


def test_when_the_op_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of 15 locations reads at most 17 x 17 of them, and less at the border."""
    monkeypatch.setattr(window_masks, "_TIME_OF_PRODUCT", 1.0)
    few, many = torch.tensor([[0, 50, 50]]), torch.tensor([[0, 50, 50]] * 500)
    assert is_faster(100 * 100, (100, 100), 15, few, 1, 2)
    assert not is_faster(100 * 100, (100, 100), 15, many, 1, 2)
    enough = 16 * 17 * 17 // 15**2 + 1  # locations of the convolution, or of its tiles
    assert is_faster(enough, (100, 100), 15, few, 1, 2)
    assert not is_faster(enough - 1, (100, 100), 15, few, 1, 2)
    assert is_faster(enough - 1, (100, 100), 15, torch.tensor([[0, 0, 0]]), 1, 2)
