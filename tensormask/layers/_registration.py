"""What PyTorch needs to know of the compiled op: shapes, batches, gradients and tangents.

But for its padding, each operator is linear in its first argument. So the tangent of a result is
the operator with padding 0. The gradient is the transposed operator, and the gradient of that is
the operator with padding 0 again. A batch of calls is one call with more images.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled, unpack_dual
from torch.autograd.function import Function, _SingleLevelFunction

from tensormask.layers._checks import check_grad, check_grad_at, check_input, check_windows

_ops = torch.ops.tensormask
_library = torch.library.Library("tensormask", "FRAGMENT")  # a registration lives as long as this


def register() -> None:
    """Register the operators, once the compiled library is loaded."""
    for name, shape, batch, gradient in (
        ("swap_align2nat", _shape, _batch, _gradient),
        ("swap_align2nat_backward", _shape_backward, _batch_backward, _gradient_backward),
        ("swap_align2nat_at", _shape_at, _batch_at, _gradient_at),
        (
            "swap_align2nat_at_backward",
            _shape_at_backward,
            _batch_at_backward,
            _gradient_at_backward,
        ),
    ):
        torch.library.register_fake(f"tensormask::{name}", shape)
        torch.library.register_vmap(f"tensormask::{name}", batch)
        _library.impl(name, _autograd(name, gradient), "Autograd", with_keyset=True)
    torch.library.register_fake("tensormask::paste_masks", _shape_pasted)  # bool: no gradient


# ---- shapes, for tracing ----


def _shape(x: Tensor, lambda_val: int, pad_val: float) -> Tensor:
    side = check_input(x, lambda_val) * lambda_val
    num_images, _, height, width = x.shape
    return x.new_empty(num_images, side * side, -(-height // lambda_val), -(-width // lambda_val))


def _shape_backward(grad: Tensor, lambda_val: int, height: int, width: int) -> Tensor:
    side = check_grad(grad, lambda_val, height, width)
    return grad.new_empty(grad.shape[0], side * side, height, width)


def _shape_at(x: Tensor, windows: Tensor, lambda_val: int, pad_val: float) -> Tensor:
    side = check_input(x, lambda_val) * lambda_val
    check_windows(x, windows)
    return x.new_empty(windows.shape[0], side, side)


def _shape_at_backward(
    grad: Tensor, windows: Tensor, lambda_val: int, num_images: int, height: int, width: int
) -> Tensor:
    side = check_grad_at(grad, lambda_val, height, width)
    check_windows(grad, windows)
    return grad.new_empty(num_images, side * side, height, width)


def _shape_pasted(
    values: Tensor, layout: Tensor, boxes: Tensor, largest: int, height: int, width: int
) -> Tensor:
    return values.new_empty(layout.shape[0], height, width, dtype=torch.bool)


# ---- batches, for torch.func.vmap: one call with more images ----


def _batch(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    x = _first(x, in_dims[0], info.batch_size)
    result = _ops.swap_align2nat(x.flatten(0, 1), *rest)
    return result.unflatten(0, x.shape[:2]), 0


def _batch_backward(
    info: Any, in_dims: tuple[int | None, ...], grad: Tensor, *rest: Any
) -> tuple[Tensor, int]:
    grad = _first(grad, in_dims[0], info.batch_size)
    result = _ops.swap_align2nat_backward(grad.flatten(0, 1), *rest)
    return result.unflatten(0, grad.shape[:2]), 0


def _batch_at(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    windows: Tensor,
    lambda_val: int,
    pad_val: float,
) -> tuple[Tensor, int]:
    windows = _first(windows, in_dims[1], info.batch_size)
    if in_dims[0] is not None:
        x = x.movedim(in_dims[0], 0)
        windows = _number_images(windows, x.shape[1])
        x = x.flatten(0, 1)
    result = _ops.swap_align2nat_at(x, windows.flatten(0, 1), lambda_val, pad_val)
    return result.unflatten(0, windows.shape[:2]), 0


def _batch_at_backward(
    info: Any,
    in_dims: tuple[int | None, ...],
    grad: Tensor,
    windows: Tensor,
    lambda_val: int,
    num_images: int,
    height: int,
    width: int,
) -> tuple[Tensor, int]:
    count = info.batch_size
    windows = _number_images(_first(windows, in_dims[1], count), num_images).flatten(0, 1)
    grad = _first(grad, in_dims[0], count).flatten(0, 1)
    result = _ops.swap_align2nat_at_backward(
        grad, windows, lambda_val, count * num_images, height, width
    )
    return result.unflatten(0, (count, num_images)), 0


def _first(x: Tensor, dim: int | None, count: int) -> Tensor:
    """Move the axis of a batch to the front, or add it."""
    return x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)


def _number_images(windows: Tensor, num_images: int) -> Tensor:
    """Number the images of windows (B, K, 3) through the batch; what was invalid stays so."""
    image = windows[..., :1]
    start = torch.arange(len(windows), device=windows.device)[:, None, None] * num_images
    image = torch.where((image >= 0) & (image < num_images), image + start, -1)
    return torch.cat([image, windows[..., 1:]], dim=-1)


# ---- gradients, from that of the result, the shape of the first argument, and the others ----


def _gradient(grad: Tensor, shape: torch.Size, lambda_val: int, pad_val: float) -> Tensor:
    return _ops.swap_align2nat_backward(grad, lambda_val, *shape[2:])


def _gradient_backward(
    grad: Tensor, shape: torch.Size, lambda_val: int, height: int, width: int
) -> Tensor:
    return _ops.swap_align2nat(grad, lambda_val, 0.0)


def _gradient_at(
    grad: Tensor, shape: torch.Size, windows: Tensor, lambda_val: int, pad_val: float
) -> Tensor:
    size = (shape[0], *shape[2:])
    return _ops.swap_align2nat_at_backward(grad, windows, lambda_val, *size)


def _gradient_at_backward(
    grad: Tensor, shape: torch.Size, windows: Tensor, lambda_val: int, *size: int
) -> Tensor:
    return _ops.swap_align2nat_at(grad, windows, lambda_val, 0.0)


def _autograd(name: str, gradient: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return what `torch.library.register_autograd` would register, with support of tangents.

    That raises under the gradients of `torch.func`, and gives tangents of 0 without a word.
    """
    op = getattr(_ops, name).default

    class Affine(_SingleLevelFunction):
        _compiled_autograd_key = staticmethod(Function._compiled_autograd_key)

        @staticmethod
        def forward(ctx: Any, keyset: Any, records: bool | None, x: Tensor, *rest: Any) -> Tensor:
            windows = [argument for argument in rest if isinstance(argument, Tensor)]
            ctx.save_for_backward(*windows)
            ctx.save_for_forward(*windows)
            ctx.shape, ctx.rest = x.shape, rest[len(windows) :]
            keyset = keyset & torch._C._after_autograd_keyset
            with torch._C._AutoDispatchBelowAutograd():
                if records is None:
                    return op.redispatch(keyset, x, *rest)
                # The outer transforms of torch.func record inside of this.
                with torch.set_grad_enabled(records), _set_fwd_grad_enabled(True):
                    return op.redispatch(keyset, x, *rest)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            windows = ctx.saved_tensors
            grad = gradient(grad, ctx.shape, *windows, *ctx.rest)
            return None, None, grad, *(None for _ in (*windows, *ctx.rest))

        @staticmethod
        def jvp(ctx: Any, keyset: None, records: None, tangent: Tensor, *_: None) -> Tensor:
            # The padding is the only float.
            rest = (0.0 if isinstance(value, float) else value for value in ctx.rest)
            return op(tangent, *ctx.saved_tensors, *rest)

    node: Any = Affine

    def autograd(keyset: Any, x: Tensor, *rest: Any) -> Tensor:
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return node.apply(keyset, torch.is_grad_enabled(), x, *rest)
        if x.requires_grad or unpack_dual(x).tangent is not None:
            return node.apply(keyset, None, x, *rest)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, x, *rest)

    return autograd
