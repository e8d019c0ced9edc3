"""The paper's vocabulary for 4D tensors: natural, aligned, and the ways between (sec. 3 to 5).

A 4D tensor ``(..., V, U, H, W)`` holds a mask of (V, U) pixels for each of (H, W) windows. One step
of (H, W) is ``sigma_HW`` pixels of the image, one step of (V, U) is ``sigma_VU``, and ``alpha =
sigma_VU / sigma_HW``. With offsets v and u counted from the middle of the mask,

- natural: ``F(v, u, y, x)`` is the value at ``(y + alpha v, x + alpha u)`` in the window centred at
  ``(y, x)``;
- aligned: ``A(v, u, y, x)`` is the value at the pixel ``(y, x)`` in the window centred at
  ``(y - alpha v, x - alpha u)``.

These functions are the definitions: plain PyTorch, any floating dtype and device, differentiable,
leading axes of any number. `swap_align2nat` here is the composition that the compiled operation of
the same name does in one pass; its docstring says where the two differ.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tensormask.layers._checks import check_input, check_inside, check_windows

UPSCALE_MODES = ("bilinear", "nearest")


def align2nat(x: Tensor, alpha: float = 1.0, pad_val: float = -6.0) -> Tensor:
    """Aligned to natural (sec. 4.2): ``F(v, u, y, x) = A(v, u, y + alpha v, x + alpha u)``.

    Args:
        x (Tensor[..., V, U, H, W]): the aligned tensor, floating.
        alpha: ratio of the units, ``sigma_VU / sigma_HW``. Places between windows are interpolated
            bilinearly.
        pad_val: what is read outside of (H, W); a logit.

    Returns:
        Tensor[..., V, U, H, W]: the natural tensor.

    Raises:
        ValueError: ``x`` has less than four axes or is not floating.
    """
    _check(x)
    x = x - pad_val
    for mask_axis, window_axis in ((-4, -2), (-3, -1)):
        x = _shift(x, alpha, mask_axis, window_axis)
    return x + pad_val


def nat2align(x: Tensor, alpha: float = 1.0, pad_val: float = -6.0) -> Tensor:
    """Natural to aligned (sec. 4.2): ``A(v, u, y, x) = F(v, u, y - alpha v, x - alpha u)``.

    The inverse of `align2nat`: exact where ``alpha v`` and ``alpha u`` are whole and the places lie
    inside of (H, W). Arguments, result and errors are those of `align2nat`.
    """
    return align2nat(x, -alpha, pad_val)


def up_bilinear(x: Tensor, lambda_val: float) -> Tensor:
    """Upscale the masks ``lambda_val`` times, bilinearly (sec. 5.1); beyond its rim a mask goes on.

    Args:
        x (Tensor[..., V, U, H, W]): natural or aligned, floating.
        lambda_val: at least 1; ``lambda_val * V`` and ``lambda_val * U`` are whole.

    Returns:
        Tensor[..., lambda*V, lambda*U, H, W]: a mask pixel is ``lambda_val`` times smaller, and so
        is ``sigma_VU``.

    Raises:
        ValueError: ``x`` has less than four axes or is not floating, or ``lambda_val`` does not
            fit.
    """
    return _upscale(x, lambda_val, "bilinear")


def up_nearest(x: Tensor, lambda_val: float) -> Tensor:
    """Upscale the masks ``lambda_val`` times by the nearest value; otherwise as `up_bilinear`."""
    return _upscale(x, lambda_val, "nearest")


def up_align2nat(
    x: Tensor,
    lambda_val: float,
    alpha: float = 1.0,
    *,
    mode: str = "bilinear",
    pad_val: float = -6.0,
) -> Tensor:
    """Upscale the masks of an aligned tensor, then make it natural (sec. 5.1).

    Args:
        x (Tensor[..., V, U, H, W]): the aligned tensor, floating.
        lambda_val: as of `up_bilinear`.
        alpha: ratio of the units of the result; that of ``x`` is ``lambda_val * alpha``.
        mode: "bilinear" or "nearest".
        pad_val: as of `align2nat`.

    Returns:
        Tensor[..., lambda*V, lambda*U, H, W]: the natural tensor.

    Raises:
        ValueError: as `up_bilinear`, or there is no such ``mode``.
    """
    return align2nat(_upscale(x, lambda_val, mode), alpha, pad_val)


def subsample(x: Tensor, lambda_val: int) -> Tensor:
    """Every ``lambda_val``-th window: (..., V, U, H, W) to (..., ceil(H/lambda), ceil(W/lambda)).

    ``sigma_HW`` becomes ``lambda_val`` times larger (sec. 5.2). A view, not a copy.
    """
    _check(x)
    return x[..., ::lambda_val, ::lambda_val]


def swap_align2nat(x: Tensor, lambda_val: int, alpha: float = 1.0, pad_val: float = -6.0) -> Tensor:
    """`up_align2nat`, then `subsample` (sec. 5.2): units ``(s, lambda s)`` from ``(lambda s, s)``.

    `tensormask.layers.swap_align2nat` computes this for ``alpha`` 1 without the large tensor in
    between, with one difference, which detectron2's checkpoints fix: beyond the rim of a mask it
    reads ``pad_val``, where `up_bilinear` goes on with the rim. So the two agree wherever a pixel
    lies between the centres of two pixels of the input's masks; and everywhere, when the input's
    masks get a border of ``pad_val`` first, whose pixels are cut off the result.

    Args:
        x (Tensor[..., V, U, H, W]): the aligned tensor, floating.
        lambda_val: ratio of the coarse unit to the fine one, an integer >= 1.
        alpha, pad_val: as of `up_align2nat`.

    Returns:
        Tensor[..., lambda*V, lambda*U, ceil(H/lambda), ceil(W/lambda)]: the natural tensor.

    Raises:
        ValueError: as `up_align2nat`.
    """
    return subsample(up_align2nat(x, lambda_val, alpha, pad_val=pad_val), lambda_val)


def up_align2nat_at(
    x: Tensor,
    windows: Tensor,
    lambda_val: float,
    *,
    mode: str = "bilinear",
    pad_val: float = -6.0,
) -> Tensor:
    """`up_align2nat` with ``alpha`` 1 at chosen windows only: neither large tensor is made.

    Args:
        x (Tensor[N, V*U, H, W]): aligned masks, V == U; float64, float32, float16 or bfloat16.
        windows (Tensor[K, 3]): int64 rows ``(n, y, x)``: image, row and column.
        lambda_val, mode, pad_val: as of `up_align2nat`.

    Returns:
        Tensor[K, lambda*V, lambda*U]: natural masks.

    Raises:
        ValueError: as `up_align2nat`; or ``x`` is not 4D of these dtypes with a square number of
            channels; or ``windows`` is not (K, 3) int64 on the device of ``x``; or, on the CPU, a
            window lies outside of the grid.
    """
    side = check_input(x, 1)
    check_windows(x, windows)
    if x.device.type == "cpu":
        check_inside(x, windows, 1)
    matrix = _upscale_matrix(side, lambda_val, mode).to(x)
    out_side = len(matrix)

    # All channels of every pixel of a mask, (K, V', U', V*U). An even mask has its middle between
    # two pixels, and each of its pixels is the mean of four.
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
    """Read each row of a mask ``alpha`` times its offset further along the windows; 0 outside."""
    x = x.movedim((mask_axis, window_axis), (-2, -1))
    side, extent = x.shape[-2:]
    offset = alpha * (torch.arange(side, dtype=torch.float64) - (side - 1) / 2)
    low = offset.floor()
    out = torch.zeros_like(x)
    for first, weight in ((low, 1 - (offset - low)), (low + 1, offset - low)):
        if weight.any():
            place = first.long()[:, None] + torch.arange(extent)
            weight = weight[:, None] * ((place >= 0) & (place < extent))
            index = place.clamp(0, extent - 1).to(x.device)
            out = out + x.gather(-1, index.expand(x.shape)) * weight.to(x)
    return out.movedim((-2, -1), (mask_axis, window_axis))


def _upscale(x: Tensor, lambda_val: float, mode: str) -> Tensor:
    _check(x)
    rows, columns = (_upscale_matrix(side, lambda_val, mode).to(x) for side in x.shape[-4:-2])
    x = torch.einsum("av,...vuhw->...auhw", rows, x)
    return torch.einsum("bu,...auhw->...abhw", columns, x)


def _upscale_matrix(side: int, lambda_val: float, mode: str) -> Tensor:
    """How a row of ``side`` mask pixels is upscaled, (lambda*side, side) float64.

    Half a pixel of the mask lies before its first centre and after its last one (``align_corners``
    off).
    """
    if mode not in UPSCALE_MODES:
        raise ValueError(f"mode must be one of {', '.join(UPSCALE_MODES)}, got {mode!r}")
    out_side = round(side * lambda_val)
    if lambda_val < 1 or abs(out_side - side * lambda_val) > 1e-6:
        raise ValueError(
            f"lambda_val must be >= 1 and make whole masks of {side} pixels, got {lambda_val}"
        )
    identity = torch.eye(side, dtype=torch.float64)[None]
    # "nearest" alone rounds places down, which shifts fractional scales.
    interpolation = {"bilinear": "linear", "nearest": "nearest-exact"}[mode]
    return F.interpolate(identity, size=out_side, mode=interpolation)[0].T
