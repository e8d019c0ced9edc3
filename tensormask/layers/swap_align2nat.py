"""swap_align2nat: turn a fine aligned tensor into a coarse natural one with larger masks.

Paper, sec. 5.2. The aligned input ``(N, V*U, H, W)`` has a location per fine unit. The natural
output ``(N, lambda*V * lambda*U, ceil(H/lambda), ceil(W/lambda))`` has a window per coarse unit,
and each window has a mask value per fine unit. The value ``(v, u)`` of the window ``(y, x)`` is
interpolated at

    oy = y * lambda + v - lambda * V / 2 + 0.5,    ov = (v + 0.5) / lambda - 0.5,

and at ``ox, ou`` likewise. Outside of the input, on any of the four axes, ``pad_val`` is read.

This file has the public functions. The kernels are in ``csrc``, and `_registration` tells PyTorch
about them; `swap_align2nat_reference` computes the same in plain PyTorch.
"""

import torch
from torch import Tensor, nn

from tensormask.layers import _native, _registration, swap_align2nat_reference
from tensormask.layers._checks import check_input, check_inside, check_windows


def swap_align2nat(x: Tensor, lambda_val: int, pad_val: float = -6.0) -> Tensor:
    """Compute the masks of every window (dense). The model uses `swap_align2nat_at` instead.

    Args:
        x (Tensor[N, V*U, H, W]): aligned masks, V == U; float64, float32, float16 or bfloat16, in
            any memory format.
        lambda_val: ratio of the coarse unit to the fine one, an integer >= 1.
        pad_val: the logit that is read outside of ``x``.

    Returns:
        Tensor[N, (lambda*V) * (lambda*U), ceil(H/lambda), ceil(W/lambda)]: natural masks, dtype of
        ``x``, contiguous; differentiable in ``x`` any number of times, with `torch.func` too.

    Raises:
        ValueError: ``x`` is not 4D of these dtypes, its number of channels is not a square, or
            ``lambda_val`` is not an integer >= 1.

    Example:
        >>> x = torch.zeros(1, 225, 40, 64)  # masks of 15x15 pixels, at 40x64 locations
        >>> swap_align2nat(x, 2).shape  # masks of 30x30 pixels, at 20x32 locations
        torch.Size([1, 900, 20, 32])
    """
    check_input(x, lambda_val)
    if _native.use_native(x.device.type):
        return torch.ops.tensormask.swap_align2nat(x, lambda_val, pad_val)
    return swap_align2nat_reference.swap_align2nat(x, lambda_val, pad_val)


def swap_align2nat_at(x: Tensor, windows: Tensor, lambda_val: int, pad_val: float = -6.0) -> Tensor:
    """Compute the masks of chosen windows only: the values of `swap_align2nat` at these windows.

    Args:
        x (Tensor[N, V*U, H, W]): aligned masks, as for `swap_align2nat`.
        windows (Tensor[K, 3]): int64 rows ``(n, y, x)``: image, row and column on the coarse grid.
        lambda_val: ratio of the coarse unit to the fine one, an integer >= 1.
        pad_val: the logit that is read outside of ``x``.

    Returns:
        Tensor[K, lambda*V, lambda*U]: natural masks, dtype of ``x``; differentiable as those.

    Raises:
        ValueError: as `swap_align2nat`; or ``windows`` is not (K, 3) int64 on the device of ``x``;
            or, on the CPU, a window is outside of the grid. On a GPU, where this check would wait
            for the device, such a window reads ``pad_val`` and gets no gradient.

    Example:
        >>> x = torch.zeros(1, 225, 40, 64)
        >>> windows = torch.tensor([[0, 0, 0], [0, 19, 31]])  # the first and the last of 20x32
        >>> swap_align2nat_at(x, windows, 2).shape
        torch.Size([2, 30, 30])
    """
    check_input(x, lambda_val)
    check_windows(x, windows)
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


if _native.LIBRARY is not None:
    _registration.register()
