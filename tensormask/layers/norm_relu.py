"""Norm and ReLU between two layers, of which training on a CPU keeps the norm's input only.

PyTorch keeps the input of the norm and the result of the ReLU, which the gradients of the ReLU and
of the next layer's weights need. Here that result is computed again from the input, which costs
less than 2 % of a step's time and saves about half of the memory of both.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormask.layers._transforms import differentiate, is_eager
from tensormask.layers.norm import (
    LayerNorm2d,
    differentiable_layer_norm,
    has_kernels,
    layer_norm,
    layer_norm_backward,
)
from tensormask.layers.plain import is_plain

Norm = nn.BatchNorm2d | LayerNorm2d


class _Kept(NamedTuple):
    """A tensor that must not change until the backward pass."""

    tensor: Tensor
    version: int

    def __call__(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor of {tuple(self.tensor.shape)}"
            )
        return self.tensor


def _keep(x: Tensor) -> _Kept:
    return _Kept(x.detach(), x._version)


class Recomputed:
    """The result of `norm_relu`, which the layer that reads it need not keep.

    Args:
        result: of the call.
        inputs: of the norm: x, weight and bias.
        shared: gets the result when it is computed again, for the backward pass of the call.
    """

    def __init__(
        self, norm: Norm, result: Tensor, inputs: Iterable[Tensor], shared: list[Tensor]
    ) -> None:
        self.norm, self.shared, self.inputs = norm, shared, [*map(_keep, inputs)]
        self.place = result.data_ptr(), result.shape, result.stride()

    def __call__(self) -> Tensor:
        if not self.shared:
            with torch.no_grad():
                self.shared.append(norm_forward(self.norm, *(x() for x in self.inputs))[0].relu_())
        return self.shared[0]

    def instead(self) -> AbstractContextManager[Any]:
        """Keep this instead of the result, in layers that are called within."""

        def pack(x: Tensor) -> Any:
            if (x.data_ptr(), x.shape, x.stride()) == self.place:
                return self
            return _keep(x)

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed())


def norm_relu(norm: nn.Module, x: Tensor) -> tuple[Tensor, Recomputed | None]:
    """Return ``relu(norm(x))``, and what `instead_of` takes for the layer that reads it.

    The latter is None where more than reverse-mode autograd follows the call, where something else
    decides what is kept (`torch.utils.checkpoint`, ...), and for other norms than layer norms and
    batch norms in train mode: then this is a call of both.

    Args:
        norm: a plain one (`is_plain`) of `torch.nn`, or `LayerNorm2d`.
        x (Tensor[N, C, H, W]): its input, which must not be changed in place afterwards.
    """
    if not (x.requires_grad and can_recompute(norm, x, nn.BatchNorm2d, LayerNorm2d)):
        return F.relu(norm(x), inplace=True), None
    known = cast(Norm, norm)
    shared: list[Tensor] = []
    inputs = x, known.weight, known.bias
    if isinstance(known, nn.BatchNorm2d) and known.num_batches_tracked is not None:
        known.num_batches_tracked.add_(1)
    result = _NormRelu.apply(*inputs, known, shared)
    return result, Recomputed(known, result, inputs, shared)


def instead_of(recomputed: Recomputed | None) -> AbstractContextManager[Any]:
    """`Recomputed.instead`, if there is one."""
    return nullcontext() if recomputed is None else recomputed.instead()


def sequential(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Return ``nn.Sequential(*layers)(x)``, with `norm_relu` for plain norms before plain ReLUs."""
    rest, recomputed = list(layers), None
    while rest:
        layer = rest.pop(0)
        if rest and is_plain(rest[0], nn.ReLU) and is_plain(layer, nn.BatchNorm2d, LayerNorm2d):
            rest.pop(0)
            x, recomputed = norm_relu(layer, x)
            continue
        with instead_of(recomputed):
            x = layer(x)
        recomputed = None
    return x


def can_recompute(norm: nn.Module, x: Tensor, *norms: type[nn.Module]) -> bool:
    """Return whether a norm is a plain one of `norms`, and what it keeps of ``x`` can be chosen."""
    if not torch.is_grad_enabled() or not is_plain(norm, *norms):
        return False
    weight, bias = cast(Norm, norm).weight, cast(Norm, norm).bias
    if weight is None or not is_eager(x, weight, bias):
        return False
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return False
    if isinstance(norm, LayerNorm2d):
        return has_kernels(x, weight, bias)
    return (
        isinstance(norm, nn.BatchNorm2d)
        and norm.training
        and norm.momentum is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and x[:, 0].numel() > 1  # else PyTorch's error
    )


def norm_forward(
    norm: Norm, x: Tensor, weight: Tensor, bias: Tensor, *, track: bool = False
) -> tuple[Tensor, ...]:
    """Return the result, and the norm's statistics; ``track`` updates the running ones."""
    if isinstance(norm, LayerNorm2d):
        return layer_norm(x, weight, bias, norm.eps)
    running = (norm.running_mean, norm.running_var) if track else (None, None)
    return torch.native_batch_norm(x, weight, bias, *running, True, norm.momentum or 0.0, norm.eps)


def norm_backward(
    norm: Norm, grad: Tensor, x: Tensor, weight: Tensor, statistics: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return the gradients of x, weight and bias, with the statistics of `norm_forward`."""
    if isinstance(norm, LayerNorm2d):
        return layer_norm_backward(grad, x, weight, *statistics)
    return torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, None, None, *statistics, True, norm.eps, [True] * 3
    )


class _NormRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: Norm, shared: list[Tensor]
    ) -> Tensor:
        result, *statistics = norm_forward(norm, x, weight, bias, track=True)
        ctx.save_for_backward(x, weight, bias, *statistics)
        ctx.norm, ctx.shared = norm, shared
        return result.relu_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *statistics = ctx.saved_tensors
        norm, inputs, y = ctx.norm, (x, weight, bias), ctx.shared.pop() if ctx.shared else None

        def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            if isinstance(norm, LayerNorm2d):
                return differentiable_layer_norm(x, weight, bias, norm.eps).relu()
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, norm.eps).relu()

        # To be differentiated again, or a batch of gradients.
        if torch.is_grad_enabled() or not is_eager(grad):
            return *differentiate(plain, inputs, grad), None, None
        y = norm_forward(norm, *inputs)[0].relu_() if y is None else y
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        del y
        return *norm_backward(norm, grad, x, weight, statistics), None, None
