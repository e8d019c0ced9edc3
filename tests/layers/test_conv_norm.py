"""A 1x1 convolution and its norm, computed again in the backward pass, against calls of both."""

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tensormask.layers import conv_norm
from tensormask.layers.conv_norm import norm_of_conv
from tensormask.layers.norm_relu import norm_relu
from tensormask.modeling import FPN


def example(dtype: torch.dtype = torch.float32, stride: int = 1) -> nn.ModuleList:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Conv2d(3, 8, 1, stride, bias=False), nn.BatchNorm2d(8)])
    for parameter in layers.parameters():
        nn.init.normal_(parameter)
    return layers.to(dtype)


def results(apply, layers: nn.ModuleList, x: Tensor) -> list[Tensor]:
    """Return the result, the gradients, and the statistics."""
    layers, x = copy.deepcopy(layers), x.clone().requires_grad_()
    y = apply(*layers, x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layers.parameters()), *layers.buffers()]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_as_calls(dtype, stride, memory_format) -> None:
    layers = example(dtype, stride)
    x = torch.randn(2, 3, 9, 8, dtype=dtype).contiguous(memory_format=memory_format)
    actual = results(norm_of_conv, layers, x)
    expected = results(lambda conv, norm, x: norm(conv(x)), layers, x)
    assert_close(actual, expected, rtol=0, atol=0)


def test_keeps_the_input_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the result of the convolution nor that of the ReLU before is kept."""
    kept: list[weakref.ref] = []
    forward = conv_norm.norm_forward

    def recorded(norm, x, *rest, **options):
        kept.append(weakref.ref(x))
        return forward(norm, x, *rest, **options)

    monkeypatch.setattr(conv_norm, "norm_forward", recorded)
    conv, norm = example()
    before, x = nn.BatchNorm2d(3), torch.randn(1, 3, 9, 8, requires_grad=True)
    y, recomputed = norm_relu(before, x * 1)
    kept.append(weakref.ref(y))
    y = norm_of_conv(conv, norm, y, recomputed).square().sum()
    assert [each() for each in kept] == [None, None]
    inputs = [x, *before.parameters(), *conv.parameters(), *norm.parameters()]
    actual = torch.autograd.grad(y, inputs)
    expected = torch.autograd.grad(norm(conv(before(x).relu())).square().sum(), inputs)
    assert_close(actual, expected)


def test_higher_derivatives() -> None:
    conv, norm = example(torch.float64)
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return norm_of_conv(conv, norm, x)

    inputs = (x, *conv.parameters(), *norm.parameters())
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("frozen", [[0], [1], [0, 1]])
def test_frozen_parameters(frozen: list[int]) -> None:
    layers, x = example(), torch.randn(2, 3, 9, 8, requires_grad=True)
    for number in frozen:
        layers[number].requires_grad_(False)
    needed = [x, *(p for p in layers.parameters() if p.requires_grad)]
    conv, norm = layers
    actual = torch.autograd.grad(norm_of_conv(conv, norm, x).square().sum(), needed)
    expected = torch.autograd.grad(norm(conv(x)).square().sum(), needed)
    assert_close(actual, expected, rtol=0, atol=0)


def test_calls_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference, hooks, half precision, checkpoints and other layers are calls of the modules."""
    monkeypatch.setattr(conv_norm._ConvNorm, "apply", lambda *args: pytest.fail("not plain"))
    (conv, norm), x = example(), torch.randn(2, 3, 9, 8)
    expected = norm(conv(x))
    with torch.no_grad():
        assert_close(norm_of_conv(conv, norm, x), expected)
    assert_close(checkpoint(norm_of_conv, conv, norm, x, use_reentrant=False), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm_of_conv(conv, norm, x).isfinite().all()
    assert_close(norm_of_conv(conv, copy.deepcopy(norm).eval(), x), norm.eval()(conv(x)))
    norm.train()
    for other in (nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(3, 8, 1)):
        assert_close(norm_of_conv(other, norm, x), norm(other(x)))
    assert_close(norm_of_conv(conv, nn.GroupNorm(2, 8), x), nn.GroupNorm(2, 8)(conv(x)))
    conv.register_forward_hook(lambda *given: None)
    assert_close(norm_of_conv(conv, norm, x), expected)


def test_one_value_of_a_channel_is_an_error() -> None:
    conv, norm = example(stride=2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_of_conv(conv, norm, torch.zeros(1, 3, 2, 2))


def test_pyramid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients and statistics of the lateral convolutions' norms."""
    torch.manual_seed(0)
    features = [torch.randn(2, 4, 32 // 2**i, 48 // 2**i, requires_grad=True) for i in range(4)]
    fpn = FPN([4] * 4, 8, norm="BN")

    def gradients() -> list[Tensor]:
        model = copy.deepcopy(fpn)
        loss = sum(y.square().mean() for y in model(features))
        return [*torch.autograd.grad(loss, [*features, *model.parameters()]), *model.buffers()]

    actual = gradients()
    monkeypatch.setattr(conv_norm, "_can_recompute", lambda *given: False)
    assert_close(actual, gradients(), rtol=0, atol=0)
