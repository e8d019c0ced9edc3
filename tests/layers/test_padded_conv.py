"""A 1x1 convolution with padded channels, against that of PyTorch."""

import pytest
import torch
from pretended_cuda import pretend
from torch import nn
from torch.testing import assert_close

from tensormask.layers import padded_conv
from tensormask.modeling.fpn import upsample


@pytest.mark.parametrize("side", [11, 15, 16])
def test_equals_the_convolution(side: int, monkeypatch) -> None:
    """The product that a GPU computes in half precision: values and gradients."""
    torch.manual_seed(0)
    pred = nn.Conv2d(6, side**2, 1, dtype=torch.float64)
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    monkeypatch.setattr(padded_conv, "_can_be_padded", lambda pred, x: True)
    results = []
    for function in (pred, lambda x: padded_conv.conv1x1(pred, x)):
        masks = function(x)
        grads = torch.autograd.grad(masks.sin().sum(), (x, pred.weight, pred.bias))
        results.append([masks, *grads])
    assert_close(*results)


def test_half_precision_on_a_gpu(monkeypatch) -> None:
    """Where the channels are padded; upsampling stays in half precision within autocast."""
    monkeypatch.setattr(padded_conv, "_MIN_LOCATIONS", 40)
    pred, autocast = nn.Conv2d(4, 9, 1), []
    interpolate = nn.functional.interpolate

    def recorded(*args, **kwargs):
        autocast.append(torch.is_autocast_enabled("cuda"))
        return interpolate(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "interpolate", recorded)
    for make, padded in (
        (lambda x: x, True),
        (lambda x: x.float(), False),
        (lambda x: x.contiguous(), False),
        (lambda x: x[:, :, :3], False),
    ):
        x = torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        assert not padded_conv._can_be_padded(pred, make(x))
        with pretend(), torch.autocast("cuda", torch.bfloat16):
            on_gpu = make(x.to("cuda"))
            assert padded_conv._can_be_padded(pred.to("cuda"), on_gpu) == padded
            assert torch.is_autocast_enabled("cuda")
            with torch.no_grad():
                assert not padded_conv._can_be_padded(pred, on_gpu)
                upsampled = upsample(on_gpu, 2.0, "bilinear")
            assert upsampled.dtype == on_gpu.dtype
            assert autocast.pop() == (on_gpu.dtype == torch.float32)
