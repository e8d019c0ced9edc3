"""Norm and ReLU whose result is computed again, against the plain graph."""

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tensormask.layers import _native, conv_norm, norm_relu
from tensormask.layers.norm import LayerNorm2d
from tensormask.layers.winograd import Conv2d
from tensormask.modeling import ResNet

NORMS = [nn.BatchNorm2d, LayerNorm2d]
FORMATS = [torch.contiguous_format, torch.channels_last]
needs_op = pytest.mark.skipif("cpu" not in _native.DEVICES, reason="no compiled op")


def example(norm: type[nn.Module], dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [Conv2d(3, 6, 3, bias=False), norm(6), nn.ReLU(inplace=True), Conv2d(6, 6, 3)]
    layers += [norm(6), nn.ReLU(inplace=True)]
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    return nn.Sequential(*layers).to(dtype)


def results(apply, layers: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the result, the gradients, and the statistics of batch norms."""
    layers, x = copy.deepcopy(layers), x.clone().requires_grad_()
    y = apply(layers, x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layers.parameters()), *layers.buffers()]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", NORMS)
def test_equals_the_plain_graph(norm, dtype, memory_format) -> None:
    layers = example(norm, dtype).to(memory_format=memory_format)
    x = torch.randn(2, 3, 9, 8, dtype=dtype).contiguous(memory_format=memory_format)
    actual = results(lambda layers, x: norm_relu.sequential(layers, x), layers, x)
    expected = results(lambda layers, x: layers(x), layers, x)
    assert_close(actual[0], expected[0], rtol=0, atol=0)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@needs_op
@pytest.mark.parametrize("norm", NORMS)
def test_keeps_the_inputs_only(norm) -> None:
    """The result of the ReLU is freed, and computed again for each backward pass."""
    layers, kept = example(norm), []
    layers[3].register_forward_pre_hook(lambda layer, given: kept.append(weakref.ref(given[0])))
    y = norm_relu.sequential(layers, torch.randn(1, 3, 9, 8)).sum()
    assert kept[0]() is None
    first = torch.autograd.grad(y, [*layers.parameters()], retain_graph=True)
    again = torch.autograd.grad(y, [*layers.parameters()])
    assert_close(first, again, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


@pytest.mark.parametrize("norm", NORMS)
def test_higher_derivatives(norm) -> None:
    layers = example(norm, torch.float64)
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return norm_relu.sequential(layers, x)

    assert torch.autograd.gradcheck(function, x, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("norm", NORMS)
def test_frozen_parameters(norm) -> None:
    """Gradients of some inputs only, and of the next layer's weight alone."""
    layers, x = example(norm), torch.randn(1, 3, 9, 8)
    for parameter in layers[1].parameters():
        parameter.requires_grad_(False)
    needed = [p for p in layers.parameters() if p.requires_grad]
    y, expected = norm_relu.sequential(layers, x).sum(), layers(x).sum()
    for of in (needed[1:2], needed):
        actual = torch.autograd.grad(y, of, retain_graph=True)
        assert_close(actual, torch.autograd.grad(expected, of, retain_graph=True))


@needs_op
@pytest.mark.parametrize("changed", [1, 3])
def test_changes_before_the_backward_pass_are_errors(changed: int) -> None:
    layers = example(LayerNorm2d)
    y = norm_relu.sequential(layers, torch.randn(1, 3, 9, 8)).sum()
    with torch.no_grad():
        layers[changed].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("norm", NORMS)
def test_plain_elsewhere(norm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference, hooks, transforms, half precision and checkpoints are calls of the modules."""
    monkeypatch.setattr(norm_relu._NormRelu, "apply", lambda *args: pytest.fail("not plain"))
    layers, x = example(norm), torch.randn(2, 3, 9, 8)

    def function(x: Tensor) -> Tensor:
        return norm_relu.sequential(layers, x).sum()

    expected = layers(x).sum()
    with torch.no_grad():
        assert_close(function(x), expected)
    if norm is LayerNorm2d:  # PyTorch's batch norm counts, which `torch.func` forbids
        assert torch.func.grad(function)(x).shape == x.shape
    assert_close(checkpoint(function, x, use_reentrant=False), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert function(x).isfinite()
    layers[1].register_forward_hook(lambda *given: None)
    layers[4].register_forward_hook(lambda *given: None)
    assert_close(function(x), expected)


@pytest.mark.parametrize("depth", [18, 50])
def test_trunk(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients and statistics of batch norms in residual blocks."""
    torch.manual_seed(0)
    trunk = ResNet(depth, norm="BN", freeze_at=1).double()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)

    def gradients() -> list[Tensor]:
        model = copy.deepcopy(trunk)
        sum(y.square().mean() for y in model(x)).backward()
        return [*(p.grad for p in model.parameters() if p.requires_grad), *model.buffers()]

    actual = gradients()
    for module in (norm_relu, conv_norm):
        monkeypatch.setattr(module, "can_recompute", lambda *given: False)
    assert_close(actual, gradients(), rtol=1e-9, atol=1e-9)
