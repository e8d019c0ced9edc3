"""Norms of the towers: over the channels of a location, or with statistics per feature level."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from tensormask.layers import _native
from tensormask.layers._transforms import is_eager, is_transformed

_AFFINE = ("weight", "bias")
_recomputes = ContextVar("_recomputes", default=False)
_PARTS = 16  # of a feature map, whose gradients of weight and bias are summed on their own


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of each location of a feature map (N, C, H, W).

    The results of a location depend on that location only, in training as in inference. In half
    precision, also within `torch.autocast`, sums are in float32 and results in the dtype of ``x``.

    Args:
        channels: C; ``weight`` and ``bias`` (C,) are 1 and 0 at first.
        eps: added to the variance.

    Example:
        >>> x = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)
        >>> LayerNorm2d(2, eps=0.0)(x).flatten().tolist()
        [-1.0, 1.0]
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if is_eager(x, weight, bias) and has_kernels(x, weight, bias):
            return _LayerNorm.apply(x, weight, bias, self.eps)
        if is_transformed(x, weight, bias):  # PyTorch's operator lacks higher derivatives
            return differentiable_layer_norm(x, weight, bias, self.eps)
        y = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, self.eps)
        return y.to(x.dtype).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def has_kernels(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Return whether `layer_norm` computes the norm without a copy of the feature map."""
    return (
        x.device.type == "cpu"
        and x.dim() == 4
        and x.dtype in (torch.float32, torch.float64)
        and x.dtype == weight.dtype == bias.dtype
        and not torch.is_autocast_enabled("cpu")
        and (_has_channels_last(x) or (x.is_contiguous() and _native.use_native("cpu")))
    )


def _has_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Return the norm, with the strides of ``x``, and mean and factor of each location.

    PyTorch's operator reads the channels of a location in sequence. With channels first, the copies
    that it makes for that take several times as long as the norm: there it is the compiled op.
    """
    if _has_channels_last(x):
        rows, *statistics = torch.native_layer_norm(
            x.permute(0, 2, 3, 1), weight.shape, weight, bias, eps
        )
        # No view for autograd, which would copy the gradients of a change in place.
        return rows.permute(0, 3, 1, 2).data, *statistics
    out, mean = torch.empty_like(x), x.new_empty(len(x), 1, *x.shape[2:])
    rstd = torch.empty_like(mean)
    torch.ops.tensormask.layer_norm(x, weight, bias, eps, out=out, mean=mean, rstd=rstd)
    return out, mean, rstd


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of x, weight and bias, with the statistics of `layer_norm`."""
    if _has_channels_last(x):
        rows, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
            *(each.permute(0, 2, 3, 1) for each in (grad, x)),
            # The second weight stands for the bias, whose values do not count.
            *(weight.shape, mean, rstd, weight, weight, [True] * 3),
        )
        return rows.permute(0, 3, 1, 2), of_weight, of_bias
    out, sums = torch.empty_like(x), x.new_empty(_PARTS, 2, len(weight))
    backward = torch.ops.tensormask.layer_norm_backward
    backward(grad.contiguous(), x, mean, rstd, weight, out=out, sums=sums)
    return out, *sums.sum(0)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out, *statistics = layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, *statistics)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *statistics = ctx.saved_tensors
        # To be differentiated again, or a batch of gradients.
        if torch.is_grad_enabled() or not is_eager(grad):
            return *_backward(grad, x, weight, ctx.eps), None
        return *layer_norm_backward(grad, x, weight, *statistics), None


def differentiable_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute the norm in operations that have all derivatives."""
    y, _ = _normalize(x.to(torch.promote_types(x.dtype, torch.float32)), eps)
    return (y * weight[:, None, None] + bias[:, None, None]).to(x.dtype)


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x (N, C, H, W) with mean 0 and variance 1 at each location, and the factor for it."""
    centered = x - x.mean(1, keepdim=True)
    rstd = (centered.square().mean(1, keepdim=True) + eps).rsqrt()
    return centered * rstd, rstd


def _backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Return the gradients of x, weight and bias, in operations that have all derivatives.

    PyTorch's own operator has them up to the second.
    """
    x, rstd = _normalize(x, eps)
    scaled = grad * weight[:, None, None]
    of_x = scaled - scaled.mean(1, keepdim=True) - x * (scaled * x).mean(1, keepdim=True)
    return rstd * of_x, (grad * x).sum((0, 2, 3)), grad.sum((0, 2, 3))


class LevelNorms(nn.ModuleList):
    """A batch norm per feature level, of a tower that is shared by the levels."""

    def __init__(self, channels: int, num_levels: int) -> None:
        super().__init__(nn.BatchNorm2d(channels) for _ in range(num_levels))

    def forward(self, x: Tensor, level: int) -> Tensor:
        """Return the normalized features (N, C, H, W) of a level."""
        norm: Any = self[level]
        is_plain = type(norm) is nn.BatchNorm2d
        if torch.compiler.is_compiling() or not (norm.training and is_plain):
            return norm(x)
        # Levels that are not computed, because they have no windows, get gradients of 0:
        # DistributedDataParallel waits for those of all parameters.
        norms = [norm, *(n for n in self if n is not norm and type(n) is nn.BatchNorm2d)]
        weight, bias = (torch.stack([getattr(n, name) for n in norms])[0] for name in _AFFINE)
        mean, var = norm.running_mean, norm.running_var
        if _recomputes.get():
            mean, var = mean.clone(), var.clone()
        else:
            norm.num_batches_tracked.add_(1)
        return F.batch_norm(x, mean, var, weight, bias, True, norm.momentum, norm.eps)


@contextlib.contextmanager
def recomputation() -> Iterator[None]:
    """Compute again what was computed before: `LevelNorms` count the statistics only once."""
    token = _recomputes.set(True)
    try:
        yield
    finally:
        _recomputes.reset(token)


class LevelTower(nn.Sequential):
    """Layers in sequence, of which `LevelNorms` depend on the feature level."""

    def forward(self, input: Tensor, level: int = 0) -> Tensor:
        for layer in self:
            input = layer(input, level) if isinstance(layer, LevelNorms) else layer(input)
        return input


def is_local(norm: nn.Module) -> bool:
    """Return whether a norm's result at a location depends on that location only."""
    if isinstance(norm, nn.BatchNorm2d):
        return not norm.training and norm.running_mean is not None
    return isinstance(norm, LayerNorm2d | FrozenBatchNorm2d)
