"""swap_align2nat in plain PyTorch: the reference for the compiled op, used where that is missing.

The operation separates: ``op(X) = pad_val + L(X - pad_val)`` with ``L = L_y (x) L_x``, where
``L_y`` acts on (H, V) and ``L_x`` on (W, U). Each has at most four taps, those of `_axis_taps`;
everything below follows from them. Arguments are those of the public functions, already checked.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tensormask.layers._checks import side_of
from tensormask.layers._transforms import is_transformed

# Mask values gathered at once: limits the index tensors to a few dozen MB.
_MAX_VALUES_PER_CHUNK = 1 << 20


def swap_align2nat(x: Tensor, lambda_val: int, pad_val: float) -> Tensor:
    """Compute the operation at every window, one axis pair after the other."""
    num_images, channels, height, width = x.shape
    side = side_of(channels)
    out_height, out_width = -(-height // lambda_val), -(-width // lambda_val)
    out_side = side * lambda_val

    x = (x - pad_val).unflatten(1, (side, side))
    # L_x on (U, W), then L_y on (V, H); each time the two axes are moved to the end.
    x = x.permute(0, 1, 3, 2, 4)  # (N, V, H, U, W)
    x = _apply_axis(x, lambda_val, out_width)  # (N, V, H, U', W')
    x = x.permute(0, 3, 4, 1, 2)  # (N, U', W', V, H)
    x = _apply_axis(x, lambda_val, out_height)  # (N, U', W', V', H')
    x = x.permute(0, 3, 1, 4, 2).reshape(num_images, out_side * out_side, out_height, out_width)
    return x + pad_val


def swap_align2nat_at(x: Tensor, windows: Tensor, lambda_val: int, pad_val: float) -> Tensor:
    """Compute the operation at chosen windows, one tap after the other."""
    if is_transformed(x):
        return _gather(x, windows, lambda_val, pad_val)
    return _SwapAt.apply(x, windows, lambda_val, pad_val)


class _SwapAt(torch.autograd.Function):
    """Gather at windows. Only the windows are saved: the backward pass computes indices again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, windows: Tensor, lambda_val: int, pad_val: float) -> Tensor:
        ctx.save_for_backward(windows)
        ctx.shape, ctx.lambda_val = x.shape, lambda_val
        return _gather(x, windows, lambda_val, pad_val)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (windows,) = ctx.saved_tensors
        return _SwapAtAdjoint.apply(grad, windows, ctx.lambda_val, ctx.shape), None, None, None


class _SwapAtAdjoint(torch.autograd.Function):
    """The transposed operation, (K, lambda*V, lambda*U) to (N, V*U, H, W).

    Its own backward pass gathers with padding 0.
    """

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, windows: Tensor, lambda_val: int, shape: torch.Size
    ) -> Tensor:
        ctx.save_for_backward(windows)
        ctx.lambda_val = lambda_val
        return _scatter(grad, windows, lambda_val, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (windows,) = ctx.saved_tensors
        return _SwapAt.apply(grad, windows, ctx.lambda_val, 0.0), None, None, None


def _gather(x: Tensor, windows: Tensor, lambda_val: int, pad_val: float) -> Tensor:
    out_side = side_of(x.shape[1]) * lambda_val
    values = x.contiguous().view(-1)
    chunks = []
    for chunk in windows.split(_chunk_size(out_side)):
        masks = x.new_full((len(chunk), out_side, out_side), pad_val)
        for index, weight in _window_taps(x.shape, x.dtype, chunk, lambda_val):
            masks = masks + weight * (values[index] - pad_val)
        chunks.append(masks)
    return torch.cat(chunks)


def gather_region(
    x: Tensor,
    windows: Tensor,
    lambda_val: int,
    corners: Tensor,
    size: tuple[int, int],
    pad_val: float = -6.0,
) -> Tensor:
    """Compute a region of each mask of `swap_align2nat_at`, for exported graphs.

    The number of windows may be unknown in a graph, and they are not divided into chunks.

    Args:
        corners (Tensor[K, 2]): int64, first mask row and column of each region, within the mask.
        size: rows and columns of the regions.

    Returns:
        Tensor[K, *size].
    """
    _, channels, height, width = x.shape
    side, area = side_of(channels), height * width
    taps = _axis_taps(side, lambda_val, x.dtype, x.device)
    location, channel, weight = (torch.stack(part) for part in zip(*taps, strict=True))  # (T, side)

    def along(axis: int, extent: int, strides: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return index and weight of each tap of each line of the regions, (K, T, n)."""
        line = corners[:, axis, None] + torch.arange(size[axis], device=x.device)
        start = windows[:, axis + 1, None, None] * lambda_val
        place = start + location[:, line].movedim(0, 1)
        inside = (place >= 0) & (place < extent)
        index = (
            place.clamp(0, extent - 1) * strides[0] + channel[:, line].movedim(0, 1) * strides[1]
        )
        return index, weight[:, line].movedim(0, 1) * inside

    values = x.contiguous().view(-1)
    row_index, row_weight = along(0, height, (width, side * area))
    column_index, column_weight = along(1, width, (1, area))
    row_index = row_index + (windows[:, :1] * (channels * area))[:, :, None]
    masks = x.new_full((windows.shape[0], *size), pad_val)
    # All taps of a row at once, (K, rows, T, columns): a graph has an operation for each tap.
    for tap in range(len(taps)):
        index = row_index[:, tap, :, None, None] + column_index[:, None]
        line = ((values[index] - pad_val) * column_weight[:, None]).sum(2)
        masks = masks + line * row_weight[:, tap, :, None]
    return masks


def _scatter(grad: Tensor, windows: Tensor, lambda_val: int, shape: torch.Size) -> Tensor:
    out = grad.new_zeros(shape)
    values = out.view(-1)
    size = _chunk_size(grad.shape[1])
    for chunk, grad_chunk in zip(windows.split(size), grad.split(size), strict=True):
        for index, weight in _window_taps(shape, grad.dtype, chunk, lambda_val):
            values.index_add_(0, index.view(-1), (weight * grad_chunk).view(-1))
    return out


def _chunk_size(out_side: int) -> int:
    """Return how many windows have a limited number of mask values."""
    return max(1, _MAX_VALUES_PER_CHUNK // out_side**2)


# ---- the taps ----


def _axis_taps(
    side: int, lambda_val: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return what the mask rows of window 0 read along one axis pair, (H, V) or (W, U).

    Returns:
        One to four ``(location, channel, weight)``, each (lambda*side,): the location relative to
        ``y * lambda`` (int64), the mask row of the input (int64), and the weight (``dtype``), which
        is 0 where the mask row is outside of 0..side-1.
    """
    out_side = side * lambda_val
    row = torch.arange(out_side, device=device)
    weights = torch.float64 if dtype == torch.float64 else torch.float32
    locations = _linear(2 * row + 1 - out_side, 2, weights, whole=out_side % 2 == 1)
    channels = _linear(2 * row + 1 - lambda_val, 2 * lambda_val, weights, whole=lambda_val == 1)
    taps = []
    for location, location_weight in locations:
        for channel, channel_weight in channels:
            inside = (channel >= 0) & (channel < side)
            weight = (location_weight * channel_weight) * inside
            taps.append((location, channel.clamp(0, side - 1), weight.to(dtype)))
    return taps


def _linear(
    numerator: Tensor, denominator: int, dtype: torch.dtype, *, whole: bool
) -> list[tuple[Tensor, Tensor]]:
    """Return floor and ceil of a fraction with their weights; only the floor if it is whole."""
    low = numerator // denominator
    above = (numerator - low * denominator).to(dtype)
    if whole:
        return [(low, torch.ones_like(above))]
    return [(low, (denominator - above) / denominator), (low + 1, above / denominator)]


def _window_taps(
    shape: torch.Size,
    dtype: torch.dtype,
    windows: Tensor,
    lambda_val: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each tap's index into the flattened input and its weight, (K, lambda*V, lambda*U).

    A tap outside of the input has weight 0 and an arbitrary valid index.
    """
    _, channels, height, width = shape
    image, y, x = (column.view(-1, 1) for column in windows.unbind(1))
    taps = _axis_taps(side_of(channels), lambda_val, dtype, windows.device)

    def along(
        start: Tensor, extent: int, location_stride: int, channel_stride: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for location, channel, weight in taps:
            location = start * lambda_val + location  # (K, lambda*side)
            inside = (location >= 0) & (location < extent)
            index = location.clamp(0, extent - 1) * location_stride + channel * channel_stride
            yield index, weight * inside

    rows = list(along(y, height, width, side_of(channels) * height * width))
    columns = list(along(x, width, 1, height * width))
    base = (image * channels * height * width).view(-1, 1, 1)
    for row_index, row_weight in rows:
        for column_index, column_weight in columns:
            index = base + row_index[:, :, None] + column_index[:, None, :]
            yield index, row_weight[:, :, None] * column_weight[:, None, :]


def _apply_axis(x: Tensor, lambda_val: int, num_windows: int) -> Tensor:
    """Apply ``L`` to one axis pair: (..., side, extent) to (..., lambda*side, num_windows)."""
    side, extent = x.shape[-2:]
    x = x.flatten(-2)
    start = torch.arange(num_windows, device=x.device) * lambda_val
    out = x.new_zeros(())
    for location, channel, weight in _axis_taps(side, lambda_val, x.dtype, x.device):
        location = location[:, None] + start  # (lambda*side, num_windows)
        inside = (location >= 0) & (location < extent)
        index = channel[:, None] * extent + location.clamp(0, extent - 1)
        tap = x.index_select(-1, index.flatten()).unflatten(-1, index.shape)
        out = out + tap * (weight[:, None] * inside)
    return out
