"""A 1x1 convolution and its batch norm, of which training on a CPU keeps only the input.

PyTorch keeps the result of the convolution for the gradients of the norm. That of the last one of
a bottleneck has four times as many channels as its input. Here it is computed again, which costs
about 1 % of a step's time.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormask.layers._transforms import differentiate, is_eager
from tensormask.layers.norm_relu import (
    Recomputed,
    can_recompute,
    instead_of,
    norm_backward,
    norm_forward,
)
from tensormask.layers.plain import is_plain_conv


def norm_of_conv(conv: Any, norm: Any, x: Tensor, recomputed: Recomputed | None = None) -> Tensor:
    """Return ``norm(conv(x))``, which can be changed in place.

    A call of both, unless the convolution is a plain one of 1x1 without bias (`is_plain_conv`), the
    norm a plain batch norm in train mode, and nothing but reverse-mode autograd follows the call.

    Args:
        x (Tensor[N, C, H, W]): must not be changed in place afterwards.
        recomputed: of `norm_relu`, if it returned ``x``.
    """
    can = _can_recompute(conv, norm, x)
    with instead_of(recomputed):
        if not can:
            return norm(conv(x))
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        return _ConvNorm.apply(x, conv.weight, norm.weight, norm.bias, conv.stride, norm)


def _can_recompute(conv: Any, norm: Any, x: Tensor) -> bool:
    if not is_plain_conv(conv) or conv.kernel_size != (1, 1) or conv.padding != (0, 0):
        return False
    return (
        conv.bias is None
        and x.dim() == 4
        and x.dtype == conv.weight.dtype
        and is_eager(x, conv.weight)
        and (x.requires_grad or conv.weight.requires_grad)
        and can_recompute(norm, x, nn.BatchNorm2d)
        and not torch.is_autocast_enabled("cpu")
        # Values of a channel; PyTorch refuses to normalize one.
        and len(x) * math.prod(-(-n // s) for n, s in zip(x.shape[2:], conv.stride, strict=True))
        > 1
    )


class _ConvNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: Tensor,
        weight: Tensor,
        bias: Tensor,
        stride: tuple[int, int],
        norm: nn.BatchNorm2d,
    ) -> Tensor:
        y = F.conv2d(x, kernel, None, stride)
        result, *statistics = norm_forward(norm, y, weight, bias, track=True)
        ctx.save_for_backward(x, kernel, weight, bias, *statistics)
        ctx.stride, ctx.norm = stride, norm
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel, weight, bias, *statistics = ctx.saved_tensors

        def plain(x: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y = F.conv2d(x, kernel, None, ctx.stride)
            return F.batch_norm(y, None, None, weight, bias, True, 0.0, ctx.norm.eps)

        # To be differentiated again, or a batch of gradients.
        if torch.is_grad_enabled() or not is_eager(grad):
            return *differentiate(plain, (x, kernel, weight, bias), grad), None, None
        y = F.conv2d(x, kernel, None, ctx.stride)
        grad, *of_norm = norm_backward(ctx.norm, grad, y, weight, statistics)
        del y
        of_x, of_kernel, _ = torch.ops.aten.convolution_backward(
            *(grad, x, kernel, None, ctx.stride, (0, 0), (1, 1), False, (0, 0), 1),
            [*ctx.needs_input_grad[:2], False],
        )
        return of_x, of_kernel, *of_norm, None, None
