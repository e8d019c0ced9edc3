"""Layer norms over the channels of a location, and batch norms per level."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from tensormask.layers import _native, op_backend
from tensormask.layers.norm import LayerNorm2d, LevelNorms, LevelTower, is_local

needs_op = pytest.mark.skipif("cpu" not in _native.DEVICES, reason="no compiled op")


def example(channels: int, dtype: torch.dtype = torch.float64) -> LayerNorm2d:
    torch.manual_seed(0)
    norm = LayerNorm2d(channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.to(dtype)


def results(norm: LayerNorm2d, x: torch.Tensor) -> list[torch.Tensor]:
    """Return results and gradients, behind a ReLU that overwrites what the norm returns."""
    x = x.detach().requires_grad_()
    y = F.relu(norm(x), inplace=True)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y, *torch.autograd.grad(y, [x, norm.weight, norm.bias], grad.to(y.dtype))]


@needs_op
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 5, 1, 1),
        (1, 3, 8, 8),
        (2, 7, 13, 11),  # the last block of an image is smaller, and ends within a vector
        (3, 64, 32, 24),
        (1, 4, 70, 90),  # several blocks in a part of the gradients
        (0, 4, 3, 3),
    ],
)
def test_compiled_equals_pytorchs(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    norm, x = example(shape[1], dtype), (3 * torch.randn(shape, dtype=torch.float64) + 5).to(dtype)
    actual = results(norm, x)
    with op_backend("reference"):
        expected = results(norm, x)
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    by_pytorch = F.layer_norm(x.permute(0, 2, 3, 1), shape[1:2], norm.weight, norm.bias).relu()
    assert_close(actual[0].permute(0, 2, 3, 1), by_pytorch, rtol=tolerance, atol=tolerance)


@needs_op
def test_compiled_where_channels_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    op = torch.ops.tensormask.layer_norm
    monkeypatch.setattr(
        torch.ops.tensormask, "layer_norm", lambda *args, **out: calls.append(op(*args, **out))
    )
    norm, x = example(6, torch.float32), torch.randn(2, 6, 9, 7)
    expected = norm(x)
    assert len(calls) == 1
    assert_close(norm(x.contiguous(memory_format=torch.channels_last)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(norm(x), expected)
    assert len(calls) == 1


@needs_op
def test_second_derivatives() -> None:
    norm = example(3)
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradgradcheck(norm, (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    norm, x = example(6, torch.float32), torch.randn(2, 6, 9, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x.to(torch.bfloat16)).dtype == torch.bfloat16
    assert_close(norm.to(dtype)(x.to(dtype)).float(), norm.float()(x), rtol=0.02, atol=0.02)


def test_batch_norms_of_a_level_see_that_level_only() -> None:
    tower = LevelTower(nn.Conv2d(1, 2, 1), LevelNorms(2, 3), nn.ReLU())
    tower(torch.randn(4, 1, 5, 5), 1)
    counts = [norm.num_batches_tracked.item() for norm in tower[1]]
    assert counts == [0, 1, 0]
    x = torch.randn(1, 1, 5, 5)
    tower.eval()
    assert_close(tower(x, 1), tower[1][1](tower[0](x)).relu())
    assert not torch.allclose(tower(x, 1), tower(x, 2))


def test_local_norms() -> None:
    assert is_local(LayerNorm2d(2))
    assert is_local(nn.BatchNorm2d(2).eval())
    assert not is_local(nn.BatchNorm2d(2))
    assert not is_local(nn.BatchNorm2d(2, track_running_stats=False).eval())
    assert not is_local(nn.GroupNorm(1, 2).eval())
