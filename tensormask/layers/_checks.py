"""Argument checks of swap_align2nat, for its public functions, fake kernels and reference.

The operators in C++ make the same checks with the same messages, in
``csrc/swap_align2nat_checks.h``.
"""

import math
import operator

import torch
from torch import Tensor

from tensormask.layers._transforms import any_true, is_traced, is_wrapped

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DTYPES_TEXT = "float64, float32, float16 or bfloat16"


def check_input(x: Tensor, lambda_val: int) -> int:
    """Return the side V == U of the input's masks.

    Raises:
        ValueError: ``x`` is not 4D of a supported dtype, its number of channels is not a square, or
            ``lambda_val`` is not an integer >= 1.
    """
    if x.dim() != 4 or x.dtype not in DTYPES:
        raise ValueError(
            f"x must be a floating tensor (N, V*U, H, W), {_DTYPES_TEXT}, "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )
    _check_lambda(lambda_val)
    side = side_of(x.shape[1])
    if side == 0 or side * side != x.shape[1]:
        raise ValueError(f"the channels of x must be a square V*U with V == U, got {x.shape[1]}")
    return side


def check_windows(x: Tensor, windows: Tensor) -> None:
    """Check everything about the windows except their values."""
    if windows.dim() != 2 or windows.shape[1] != 3 or windows.dtype != torch.int64:
        raise ValueError(
            "windows must be int64 of shape (K, 3), rows (n, y, x), "
            f"got {windows.dtype} of shape {tuple(windows.shape)}"
        )
    if windows.device != x.device:
        raise ValueError(f"windows are on {windows.device}, x is on {x.device}")


def check_inside(x: Tensor, windows: Tensor, lambda_val: int) -> None:
    """Check that windows in host memory are on the coarse grid.

    A graph that is being compiled or traced has no values to check: the compiled op checks them.
    """
    if x.device.type != "cpu" or is_traced():
        return
    num_images, _, height, width = x.shape
    grid = [num_images, -(-height // lambda_val), -(-width // lambda_val)]
    outside = ((windows < 0) | (windows >= torch.tensor(grid))).any(1)
    if any_true(outside):
        window = "" if is_wrapped(windows) else f" = {windows[outside][0].tolist()}"
        raise ValueError(f"window (n, y, x){window} is outside of the grid {grid}")


def check_grad(grad: Tensor, lambda_val: int, height: int, width: int) -> int:
    """Return the side V == U of the input's masks, from the gradient of the dense result."""
    _check_lambda(lambda_val)
    if grad.dim() != 4 or grad.dtype not in DTYPES:
        raise ValueError(
            f"grad must be a floating tensor (N, lambda*V * lambda*U, H', W'), {_DTYPES_TEXT}, "
            f"got {grad.dtype} of shape {tuple(grad.shape)}"
        )
    side = side_of(grad.shape[1]) // lambda_val
    out_height, out_width = -(-height // lambda_val), -(-width // lambda_val)
    expected = ((side * lambda_val) ** 2, out_height, out_width)
    if side == 0 or tuple(grad.shape[1:]) != expected:
        raise _grad_error(grad, lambda_val, height, width)
    return side


def check_grad_at(grad: Tensor, lambda_val: int, height: int, width: int) -> int:
    """Return the side V == U of the input's masks, from the gradient of masks at windows."""
    _check_lambda(lambda_val)
    if grad.dim() != 3 or grad.dtype not in DTYPES:
        raise ValueError(
            f"grad must be a floating tensor (K, lambda*V, lambda*U), {_DTYPES_TEXT}, "
            f"got {grad.dtype} of shape {tuple(grad.shape)}"
        )
    side = grad.shape[1] // lambda_val
    if side == 0 or side * lambda_val != grad.shape[1] or grad.shape[1] != grad.shape[2]:
        raise _grad_error(grad, lambda_val, height, width)
    return side


def side_of(channels: int) -> int:
    """Return the square root of a number of channels, rounded down.

    ``index`` makes the number a constant of a traced graph, as the op needs it.
    """
    return math.isqrt(operator.index(channels))


def _check_lambda(lambda_val: int) -> None:
    if not isinstance(lambda_val, int) or lambda_val < 1:
        raise ValueError(f"lambda_val must be an integer >= 1, got {lambda_val!r}")


def _grad_error(grad: Tensor, lambda_val: int, height: int, width: int) -> ValueError:
    return ValueError(
        f"grad of shape {tuple(grad.shape)} does not fit lambda_val {lambda_val} and an input of "
        f"height {height} and width {width}"
    )
