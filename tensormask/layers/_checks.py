"""What swap_align2nat refuses, in one place: public functions, fake kernels and reference.

``csrc/swap_align2nat_checks.h`` says the same in the same words to who calls the operators
themselves.
"""

import math
import operator

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DTYPES_TEXT = "float64, float32, float16 or bfloat16"


def check_input(x: Tensor, lambda_val: int) -> int:
    """The side V == U of the input's masks.

    Raises:
        ValueError: ``x`` is not 4D of a supported dtype, its channels are no square, or
            ``lambda_val`` is no integer >= 1.
    """
    if x.dim() != 4 or x.dtype not in DTYPES:
        raise ValueError(
            f"x must be a floating tensor (N, V*U, H, W), {_DTYPES_TEXT}, "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )
    check_lambda(lambda_val)
    side = _square_root(x.shape[1])
    if side == 0 or side * side != x.shape[1]:
        raise ValueError(f"the channels of x must be a square V*U with V == U, got {x.shape[1]}")
    return side


def check_lambda(lambda_val: int) -> None:
    if not isinstance(lambda_val, int) or lambda_val < 1:
        raise ValueError(f"lambda_val must be an integer >= 1, got {lambda_val!r}")


def check_windows(x: Tensor, windows: Tensor) -> None:
    if windows.dim() != 2 or windows.shape[1] != 3 or windows.dtype != torch.int64:
        raise ValueError(
            "windows must be int64 of shape (K, 3), rows (n, y, x), "
            f"got {windows.dtype} of shape {tuple(windows.shape)}"
        )
    if windows.device != x.device:
        raise ValueError(f"windows are on {windows.device}, x is on {x.device}")


def check_inside(x: Tensor, windows: Tensor, lambda_val: int) -> None:
    """Looks at the windows' values: for windows in host memory."""
    num_images, _, height, width = x.shape
    limit = [num_images, -(-height // lambda_val), -(-width // lambda_val)]
    outside = ((windows < 0) | (windows >= torch.tensor(limit))).any(1)
    if outside.any():
        raise ValueError(
            f"window (n, y, x) = {windows[outside][0].tolist()} lies outside of the grid {limit}"
        )


def check_grad(grad: Tensor, lambda_val: int, height: int, width: int) -> int:
    """The side V == U of the input's masks, from the gradient of the dense result."""
    check_lambda(lambda_val)
    if grad.dim() != 4 or grad.dtype not in DTYPES:
        raise ValueError(
            f"grad must be a floating tensor (N, lambda*V * lambda*U, H', W'), {_DTYPES_TEXT}, "
            f"got {grad.dtype} of shape {tuple(grad.shape)}"
        )
    side = _square_root(grad.shape[1]) // lambda_val
    out_height, out_width = -(-height // lambda_val), -(-width // lambda_val)
    expected = ((side * lambda_val) ** 2, out_height, out_width)
    if side == 0 or tuple(grad.shape[1:]) != expected:
        raise _grad_error(grad, lambda_val, height, width)
    return side


def check_grad_at(grad: Tensor, lambda_val: int, height: int, width: int) -> int:
    """The side V == U of the input's masks, from the gradient of masks at windows."""
    check_lambda(lambda_val)
    if grad.dim() != 3 or grad.dtype not in DTYPES:
        raise ValueError(
            f"grad must be a floating tensor (K, lambda*V, lambda*U), {_DTYPES_TEXT}, "
            f"got {grad.dtype} of shape {tuple(grad.shape)}"
        )
    side = grad.shape[1] // lambda_val
    if side == 0 or side * lambda_val != grad.shape[1] or grad.shape[1] != grad.shape[2]:
        raise _grad_error(grad, lambda_val, height, width)
    return side


def _grad_error(grad: Tensor, lambda_val: int, height: int, width: int) -> ValueError:
    return ValueError(
        f"grad of shape {tuple(grad.shape)} is none of lambda_val {lambda_val} for a map of "
        f"height {height} and width {width}"
    )


def _square_root(value: int) -> int:
    """Rounded down. ``index`` fixes the number of channels in a traced graph: the op needs it."""
    return math.isqrt(operator.index(value))
