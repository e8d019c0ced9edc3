"""The paper's natural and aligned 4D tensors, and the conversions between them (sec. 3 to 5).

A 4D tensor ``(..., V, U, H, W)`` holds a mask of (V, U) pixels for each of (H, W) windows. One step
of (H, W) is ``sigma_HW`` pixels of the image, one step of (V, U) is ``sigma_VU``, and ``alpha =
sigma_VU / sigma_HW``. With offsets v and u counted from the center of the mask,

- natural: ``F(v, u, y, x)`` is the value at ``(y + alpha v, x + alpha u)`` in the window centered
  at ``(y, x)``;
- aligned: ``A(v, u, y, x)`` is the value at the pixel ``(y, x)`` in the window centered at
  ``(y - alpha v, x - alpha u)``.

These functions are the definitions: plain PyTorch, differentiable, for any floating dtype, device
and number of leading axes. `swap_align2nat` here is the composition that the compiled operation of
the same name computes in one pass; its docstring says where the two differ.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tensormask.layers._checks import check_input, check_inside, check_windows
from tensormask.layers._constants import constant

UPSCALE_MODES = ("bilinear", "nearest")


def align2nat(x: Tensor, alpha: float = 1.0, pad_val: float = -6.0) -> Tensor:
    """Convert aligned to natural: ``F(v, u, y, x) = A(v, u, y + alpha v, x + alpha u)`` (sec. 4.2).

    Args:
        x (Tensor[..., V, U, H, W]): the aligned tensor, floating.
        alpha: ratio of the units, ``sigma_VU / sigma_HW``. Locations between windows are
            interpolated bilinearly.
        pad_val: the logit that is read outside of (H, W).

    Returns:
        Tensor[..., V, U, H, W]: the natural tensor.

    Raises:
        ValueError: ``x`` has less than four axes or is not floating.

    Example:
        >>> x = torch.arange(4.0).expand(1, 3, 1, 4)  # each window reads its number
        >>> align2nat(x)[0, :, 0, 1]  # window 1 and its two neighbors
        tensor([0., 1., 2.])
    """
    _check(x)
    x = x - pad_val
    for mask_axis, window_axis in ((-4, -2), (-3, -1)):
        x = _shift(x, alpha, mask_axis, window_axis)
    return x + pad_val


def nat2align(x: Tensor, alpha: float = 1.0, pad_val: float = -6.0) -> Tensor:
    """Convert natural to aligned: ``A(v, u, y, x) = F(v, u, y - alpha v, x - alpha u)`` (sec. 4.2).

    The inverse of `align2nat`: exact where ``alpha v`` and ``alpha u`` are integers and the
    locations are inside of (H, W). Arguments, result and errors are those of `align2nat`.

    Example:
        >>> x = torch.arange(576.0).view(3, 3, 8, 8)
        >>> inner = (..., slice(1, -1), slice(1, -1))  # what left the grid is lost
        >>> torch.equal(nat2align(align2nat(x))[inner], x[inner])
        True
    """
    return align2nat(x, -alpha, pad_val)


def up_bilinear(x: Tensor, lambda_val: float) -> Tensor:
    """Upscale the masks ``lambda_val`` times, bilinearly (sec. 5.1); outside, border values repeat.

    Args:
        x (Tensor[..., V, U, H, W]): natural or aligned, floating.
        lambda_val: at least 1; ``lambda_val * V`` and ``lambda_val * U`` are integers.

    Returns:
        Tensor[..., lambda*V, lambda*U, H, W]: ``sigma_VU`` is ``lambda_val`` times smaller.

    Raises:
        ValueError: ``x`` has less than four axes or is not floating, or ``lambda_val`` does not
            fit.
    """
    return _upscale(x, lambda_val, "bilinear")


def up_nearest(x: Tensor, lambda_val: float) -> Tensor:
    """Upscale the masks ``lambda_val`` times, to the nearest value; otherwise as `up_bilinear`."""
    return _upscale(x, lambda_val, "nearest")


def up_align2nat(
    x: Tensor,
    lambda_val: float,
    alpha: float = 1.0,
    *,
    mode: str = "bilinear",
    pad_val: float = -6.0,
) -> Tensor:
    """Upscale the masks of an aligned tensor, then convert it to natural (sec. 5.1).

    Args:
        x (Tensor[..., V, U, H, W]): the aligned tensor, floating.
        lambda_val: as for `up_bilinear`.
        alpha: ratio of the units of the result; that of ``x`` is ``lambda_val * alpha``.
        mode: "bilinear" or "nearest".
        pad_val: as for `align2nat`.

    Returns:
        Tensor[..., lambda*V, lambda*U, H, W]: the natural tensor.

    Raises:
        ValueError: as `up_bilinear`, or ``mode`` is unknown.

    Example:
        >>> up_align2nat(torch.zeros(15, 15, 40, 64), 2).shape
        torch.Size([30, 30, 40, 64])
    """
    return align2nat(_upscale(x, lambda_val, mode), alpha, pad_val)


def subsample(x: Tensor, lambda_val: int) -> Tensor:
    """Return a view of every ``lambda_val``-th window: (..., ceil(H/lambda), ceil(W/lambda)).

    ``sigma_HW`` becomes ``lambda_val`` times larger (sec. 5.2).
    """
    _check(x)
    return x[..., ::lambda_val, ::lambda_val]


def swap_align2nat(x: Tensor, lambda_val: int, alpha: float = 1.0, pad_val: float = -6.0) -> Tensor:
    """Apply `up_align2nat`, then `subsample`: swap units ``(lambda s, s)`` (sec. 5.2).

    `tensormask.layers.swap_align2nat` computes this for ``alpha`` 1 without the large intermediate
    tensor. It differs in one detail, which detectron2's checkpoints require: outside of a mask it
    reads ``pad_val``, where `up_bilinear` repeats the border values. So both agree at each pixel
    that is between the centers of two pixels of the input's masks. They agree everywhere if the
    input's masks are first padded by a border of ``pad_val``, and the result is cropped.

    Args:
        x (Tensor[..., V, U, H, W]): the aligned tensor, floating.
        lambda_val: ratio of the coarse unit to the fine one, an integer >= 1.
        alpha, pad_val: as for `up_align2nat`.

    Returns:
        Tensor[..., lambda*V, lambda*U, ceil(H/lambda), ceil(W/lambda)]: the natural tensor.

    Raises:
        ValueError: as `up_align2nat`.
    """
    return subsample(up_align2nat(x, lambda_val, alpha, pad_val=pad_val), lambda_val)


def up_align2nat_at(
    x: Tensor, windows: Tensor, lambda_val: float, *, mode: str = "bilinear", pad_val: float = -6.0
) -> Tensor:
    """Compute `up_align2nat` with ``alpha`` 1 at chosen windows only, without a large tensor.

    Args:
        x (Tensor[N, V*U, H, W]): aligned masks, V == U; float64, float32, float16 or bfloat16.
        windows (Tensor[K, 3]): int64 rows ``(n, y, x)``: image, row and column.
        lambda_val, mode, pad_val: as for `up_align2nat`.

    Returns:
        Tensor[K, lambda*V, lambda*U]: natural masks.

    Raises:
        ValueError: as `up_align2nat`; or ``x`` is not 4D of these dtypes with a square number of
            channels; or ``windows`` is not (K, 3) int64 on the device of ``x``; or, on the CPU, a
            window is outside of the grid.
    """
    side = check_input(x, 1)
    check_windows(x, windows)
    check_inside(x, windows, 1)
    matrix = _upscale_matrix(x, side, lambda_val, mode)
    out_side = len(matrix)

    # All channels at every pixel of a mask, (K, V', U', V*U). The center of an even mask is between
    # two pixels, so each of its pixels is the mean of four.
    reach, is_even = out_side // 2, out_side % 2 == 0
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, reach, reach, reach, reach), value=pad_val)
    step = torch.arange(out_side + is_even, device=x.device)
    n, row, column = windows.unbind(1)
    pixels = padded[
        n[:, None, None], (row[:, None] + step)[:, :, None], (column[:, None] + step)[:, None, :]
    ]
    if is_even:
        pixels = (pixels[:, 1:] + pixels[:, :-1]) / 2
        pixels = (pixels[:, :, 1:] + pixels[:, :, :-1]) / 2
    pixels = pixels.unflatten(-1, (side, side))
    return torch.einsum("av,bu,kabvu->kab", matrix, matrix, pixels)


def _check(x: Tensor) -> None:
    if x.dim() < 4 or not x.is_floating_point():
        raise ValueError(
            f"x must be a floating tensor (..., V, U, H, W), got {x.dtype} of {tuple(x.shape)}"
        )


def _shift(x: Tensor, alpha: float, mask_axis: int, window_axis: int) -> Tensor:
    """Read each mask row at ``alpha`` times its offset along the windows; read 0 outside."""
    x = x.movedim((mask_axis, window_axis), (-2, -1))
    side, extent = x.shape[-2:]
    offsets = [alpha * (row - (side - 1) / 2) for row in range(side)]
    low = [math.floor(offset) for offset in offsets]
    above = [offset - first for offset, first in zip(offsets, low, strict=True)]
    out = torch.zeros_like(x)
    for step, weights in ((0, [1 - weight for weight in above]), (1, above)):
        if any(weights):
            location = constant(low, torch.int64, x.device)[:, None] + step
            location = location + torch.arange(extent, device=x.device)
            inside = (location >= 0) & (location < extent)
            weight = constant(weights, x.dtype, x.device)[:, None] * inside
            out = out + x.gather(-1, location.clamp(0, extent - 1).expand(x.shape)) * weight
    return out.movedim((-2, -1), (mask_axis, window_axis))


def _upscale(x: Tensor, lambda_val: float, mode: str) -> Tensor:
    _check(x)
    rows, columns = (_upscale_matrix(x, side, lambda_val, mode) for side in x.shape[-4:-2])
    x = torch.einsum("av,...vuhw->...auhw", rows, x)
    return torch.einsum("bu,...auhw->...abhw", columns, x)


def _upscale_matrix(x: Tensor, side: int, lambda_val: float, mode: str) -> Tensor:
    """Return the matrix (lambda*side, side) that upscales a row of mask pixels of ``x``.

    A mask extends half a pixel beyond the centers of its outer pixels (``align_corners`` is off).
    """
    if mode not in UPSCALE_MODES:
        raise ValueError(f"mode must be one of {', '.join(UPSCALE_MODES)}, got {mode!r}")
    out_side = round(side * lambda_val)
    if lambda_val < 1 or abs(out_side - side * lambda_val) > 1e-6:
        raise ValueError(
            f"lambda_val must be >= 1 with an integer lambda_val * {side}, got {lambda_val}"
        )
    matrix = [[0.0] * side for _ in range(out_side)]
    for row, weights in enumerate(matrix):
        # The center of the row is at `center / unit` rows of the input's masks.
        center, unit = (2 * row + 1) * side, 2 * out_side
        if mode == "nearest":
            weights[center // unit] = 1.0
        else:
            low, above = divmod(max(0, center - out_side), unit)  # outside, border values repeat
            weights[low] += (unit - above) / unit
            weights[min(low + 1, side - 1)] += above / unit
    return constant(matrix, x.dtype, x.device)
