"""swap_align2nat: a fine aligned tensor becomes a coarse natural one with larger masks.

Paper, sec. 5.2. The aligned input ``(N, V*U, H, W)`` has a place per fine unit. The natural output
``(N, lambda*V * lambda*U, ceil(H/lambda), ceil(W/lambda))`` has a window per coarse unit, and in it
a mask value per fine unit. The value ``(v, u)`` of the window ``(y, x)`` is interpolated at

    oy = y * lambda + v - lambda * V / 2 + 0.5,    ov = (v + 0.5) / lambda - 0.5,

and at ``ox, ou`` likewise. What lies outside of the input, on any of the four axes, reads
``pad_val``.

Here are the public functions and the registrations that PyTorch needs of a compiled op. The
kernels are in ``csrc``, the same in plain PyTorch in `swap_align2nat_reference`.
"""

import torch
from torch import Tensor, nn

from tensormask.layers import _native, swap_align2nat_reference
from tensormask.layers._checks import (
    check_grad,
    check_grad_at,
    check_input,
    check_inside,
    check_windows,
)


def swap_align2nat(x: Tensor, lambda_val: int, pad_val: float = -6.0) -> Tensor:
    """The operation at every window: the definition, and a tool for research.

    Args:
        x (Tensor[N, V*U, H, W]): aligned masks, V == U; float64, float32, float16 or bfloat16, in
            any memory format.
        lambda_val: ratio of the coarse unit to the fine one, an integer >= 1.
        pad_val: what is read outside of ``x``, a logit.

    Returns:
        Tensor[N, (lambda*V) * (lambda*U), ceil(H/lambda), ceil(W/lambda)]: natural masks, dtype of
        ``x``, contiguous; differentiable twice in ``x``.

    Raises:
        ValueError: ``x`` is not 4D of these dtypes, its channels are no square, or
            ``lambda_val`` < 1.
    """
    check_input(x, lambda_val)
    if _native.use_native(x.device.type):
        return torch.ops.tensormask.swap_align2nat(x, lambda_val, pad_val)
    return swap_align2nat_reference.swap_align2nat(x, lambda_val, pad_val)


def swap_align2nat_at(x: Tensor, windows: Tensor, lambda_val: int, pad_val: float = -6.0) -> Tensor:
    """The operation at chosen windows only: the same values as `swap_align2nat` at those places.

    Args:
        x (Tensor[N, V*U, H, W]): aligned masks, as for `swap_align2nat`.
        windows (Tensor[K, 3]): int64 rows ``(n, y, x)``: image, and row and column on the coarse
            grid.
        lambda_val: ratio of the coarse unit to the fine one, an integer >= 1.
        pad_val: what is read outside of ``x``, a logit.

    Returns:
        Tensor[K, lambda*V, lambda*U]: natural masks, dtype of ``x``; differentiable twice in ``x``.

    Raises:
        ValueError: as `swap_align2nat`; or ``windows`` is not (K, 3) int64 on the device of ``x``;
            or, on the CPU, a window lies outside of the grid. On a GPU, where a look would wait
            for the device, such a window reads ``pad_val`` and gets no gradient.
    """
    check_input(x, lambda_val)
    check_windows(x, windows)
    # In a compiled graph the values are not there to look at: the kernel looks.
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        check_inside(x, windows, lambda_val)
    if _native.use_native(x.device.type):
        return torch.ops.tensormask.swap_align2nat_at(x, windows, lambda_val, pad_val)
    return swap_align2nat_reference.swap_align2nat_at(x, windows, lambda_val, pad_val)


class SwapAlign2Nat(nn.Module):
    """`swap_align2nat` as a module, with detectron2's argument names."""

    def __init__(self, lambda_val: int, pad_val: float = -6.0) -> None:
        super().__init__()
        self.lambda_val = lambda_val
        self.pad_val = pad_val

    def forward(self, x: Tensor) -> Tensor:
        return swap_align2nat(x, self.lambda_val, self.pad_val)

    def extra_repr(self) -> str:
        return f"lambda_val={self.lambda_val}, pad_val={self.pad_val}"


# ---- shapes, for tracing ----


def _fake(x: Tensor, lambda_val: int, pad_val: float) -> Tensor:
    side = check_input(x, lambda_val) * lambda_val
    num_images, _, height, width = x.shape
    return x.new_empty(num_images, side * side, -(-height // lambda_val), -(-width // lambda_val))


def _fake_backward(grad: Tensor, lambda_val: int, height: int, width: int) -> Tensor:
    side = check_grad(grad, lambda_val, height, width)
    return grad.new_empty(grad.shape[0], side * side, height, width)


def _fake_at(x: Tensor, windows: Tensor, lambda_val: int, pad_val: float) -> Tensor:
    side = check_input(x, lambda_val) * lambda_val
    check_windows(x, windows)
    return x.new_empty(windows.shape[0], side, side)


def _fake_at_backward(
    grad: Tensor, windows: Tensor, lambda_val: int, num_images: int, height: int, width: int
) -> Tensor:
    side = check_grad_at(grad, lambda_val, height, width)
    check_windows(grad, windows)
    return grad.new_empty(num_images, side * side, height, width)


# ---- gradients: of the map its transpose, of the transpose the map without padding ----


def _setup(ctx, inputs, output) -> None:
    x, ctx.lambda_val, _ = inputs
    ctx.size = x.shape[2:]


def _grad(ctx, grad: Tensor):
    op = torch.ops.tensormask.swap_align2nat_backward
    return op(grad, ctx.lambda_val, *ctx.size), None, None


def _setup_backward(ctx, inputs, output) -> None:
    ctx.lambda_val = inputs[1]


def _grad_backward(ctx, grad: Tensor):
    return torch.ops.tensormask.swap_align2nat(grad, ctx.lambda_val, 0.0), None, None, None


def _setup_at(ctx, inputs, output) -> None:
    x, windows, ctx.lambda_val, _ = inputs
    ctx.save_for_backward(windows)
    ctx.size = (x.shape[0], *x.shape[2:])


def _grad_at(ctx, grad: Tensor):
    op = torch.ops.tensormask.swap_align2nat_at_backward
    return op(grad, *ctx.saved_tensors, ctx.lambda_val, *ctx.size), None, None, None


def _setup_at_backward(ctx, inputs, output) -> None:
    ctx.lambda_val = inputs[2]
    ctx.save_for_backward(inputs[1])


def _grad_at_backward(ctx, grad: Tensor):
    op = torch.ops.tensormask.swap_align2nat_at
    return op(grad, *ctx.saved_tensors, ctx.lambda_val, 0.0), None, None, None, None, None


if _native.LIBRARY is not None:
    for _name, _shape, _gradient, _context in (
        ("swap_align2nat", _fake, _grad, _setup),
        ("swap_align2nat_backward", _fake_backward, _grad_backward, _setup_backward),
        ("swap_align2nat_at", _fake_at, _grad_at, _setup_at),
        ("swap_align2nat_at_backward", _fake_at_backward, _grad_at_backward, _setup_at_backward),
    ):
        torch.library.register_fake(f"tensormask::{_name}", _shape)
        torch.library.register_autograd(f"tensormask::{_name}", _gradient, setup_context=_context)
