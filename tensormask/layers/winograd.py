"""3x3 convolutions on the CPU with a quarter of the multiplications: Winograd's F(4x4, 3x3).

Lavin and Gray (arXiv 1509.09308) compute a tile of 4x4 results from the 6x6 inputs ``d`` that it
reads: ``A^T [(G w G^T) * (B^T d B)] A``, where ``*`` multiplies 36 pairs of values instead of 144.
Summed over the channels, the 36 products are 36 matrix products. The same three matrices give the
gradients. The rounding error in float32 is at most about 1e-5 of the largest result, a few times
that of a direct convolution.

The operators in ``csrc/winograd_cpu.cpp`` cut a feature map into tiles and assemble it from them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormask.layers import _native
from tensormask.layers._transforms import is_eager

_TILE = 4  # side of a tile of results; it reads _TILE + 2 inputs in each direction
_TILES_AT_ONCE = 168  # 12 MB with 256 channels in and out: they stay in the caches
# Below these numbers of locations, of channels in and out, and of the larger of the two, a direct
# convolution is as fast.
_MIN_LOCATIONS, _MIN_CHANNELS, _MIN_LARGER_CHANNELS = 1500, 32, 128
_G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: str | Sequence[int] = (0, 0),
) -> Tensor:
    """Compute `torch.nn.functional.conv2d`, by Winograd's algorithm where that is faster.

    That is on the CPU, in float32 and float64 outside of autocast, for 3x3 kernels of stride 1 and
    padding 0 or 1, with at least 32 channels in and out, 128 on one side, and 1500 locations.
    Everything else gets PyTorch's convolution, and so do compiled, traced and exported models, the
    transforms of `torch.func`, and forward-mode differentiation.

    Results of Winograd's algorithm are in channels_last memory format, whatever the format of
    ``x``. Second derivatives are PyTorch's.
    """
    inputs = (x, weight) if bias is None else (x, weight, bias)
    if is_eager(*inputs) and _is_faster(x, weight, stride, padding):
        return _Winograd.apply(x, weight, bias, padding[0])
    return F.conv2d(x, weight, bias, stride, padding)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with one group and no dilation, computed by `conv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.bias, self.stride, self.padding)


def convolve_patches(rows: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve P patches of 6x6 locations to 4x4 results, a tile of Winograd's algorithm each.

    Args:
        rows (Tensor[M, C]): the features of M locations.
        index: int64 (36 * P,), the locations of the patches, row by row; -1 for one of zeros.
        weight (Tensor[C', C, 3, 3]), bias (Tensor[C']): of the convolution.

    Returns:
        Tensor[P, C', 4, 4], in channels_last.
    """
    side = _TILE + 2
    size = len(index) // side**2, len(weight), _TILE, _TILE
    inputs = (rows, weight) if bias is None else (rows, weight, bias)

    def patches(start: int, stop: int) -> Tensor:
        part = index[start * side**2 : stop * side**2]
        gathered, outside = rows.index_select(0, part.clamp(min=0)), part < 0
        if part.device.type != "cpu":  # the host does not wait
            gathered.masked_fill_(outside[:, None], 0)
        elif outside.any():
            gathered.index_fill_(0, torch.where(outside)[0], 0)
        return gathered.view(-1, side, side, rows.shape[1]).permute(0, 3, 1, 2)

    like = rows[:1, :, None, None].expand(size[0], -1, side, side)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if needs_grad or not (is_eager(*inputs) and _is_faster(like, weight, (1, 1), (0, 0))):
        return conv2d(patches(0, size[0]), weight, bias)
    kernels = _transformed(weight)
    result = torch.empty(size, dtype=rows.dtype, memory_format=torch.channels_last)
    for start in range(0, size[0], _TILES_AT_ONCE):  # a chunk stays in the caches
        x = patches(start, min(start + _TILES_AT_ONCE, size[0]))
        _multiply(x, kernels, bias, 0, (len(x), 1, 1), [(0, 0)], result[start : start + len(x)])
    return result


def _is_faster(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: str | Sequence[int]
) -> bool:
    return (
        x.device.type == "cpu"
        and x.dim() == 4
        and x.shape[1] == weight.shape[1]
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and weight.shape[2:] == (3, 3)
        and tuple(stride) == (1, 1)
        and tuple(padding) in ((0, 0), (1, 1))
        and min(weight.shape[:2]) >= _MIN_CHANNELS
        and max(weight.shape[:2]) >= _MIN_LARGER_CHANNELS
        and x[:, 0].numel() >= _MIN_LOCATIONS
        and not torch.is_autocast_enabled("cpu")
        and _native.use_native("cpu")
    )


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return _convolve(x, weight, bias, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed, padding = ctx.needs_input_grad[:3], ctx.padding
        # To be differentiated again, or a batch of gradients.
        if torch.is_grad_enabled() or not is_eager(grad):
            arguments = (len(weight),), (1, 1), (padding, padding), (1, 1), False, (0, 0), 1, needed
            return *torch.ops.aten.convolution_backward(grad, x, weight, *arguments), None
        grad_x = grad_weight = grad_bias = None
        if needed[0]:
            grad_x = _convolve(grad, weight.flip(2, 3).transpose(0, 1), None, 2 - padding)
        if needed[1]:
            grad_weight = _weight_gradient(x, grad, padding)
        if needed[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """Convolve (N, C, H, W) with (C', C, 3, 3), add a bias (C'): (N, C', H', W'), channels_last."""
    num, _, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    size = (num, len(weight), height + 2 * padding - 2, width + 2 * padding - 2)
    result = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    _multiply(x, _transformed(weight), bias, padding, *_chunks(size), result)
    return result


def _transformed(weight: Tensor) -> Tensor:
    """Return the 36 matrices (36, C, C') of a kernel (C', C, 3, 3)."""
    g = weight.new_tensor(_G)
    return torch.einsum("ia,jb,dcab->ijcd", g, g, weight).flatten(0, 1).contiguous()


def _multiply(
    x: Tensor,
    kernels: Tensor,
    bias: Tensor | None,
    padding: int,
    grid: tuple[int, int, int],
    chunks: list[tuple[int, int]],
    result: Tensor,
) -> None:
    """Write the results of the chunks of `_chunks`; feature maps are in channels_last."""
    inputs = x.new_empty(36, *grid, kernels.shape[1])
    products = x.new_empty(36, *grid, kernels.shape[2])
    for image, row in chunks:
        torch.ops.tensormask.winograd_input(x, padding, image, row, out=inputs)
        torch.bmm(inputs.flatten(1, 3), kernels, out=products.flatten(1, 3))
        torch.ops.tensormask.winograd_output(products, bias, image, row, out=result)


def _weight_gradient(x: Tensor, grad: Tensor, padding: int) -> Tensor:
    """Return (C', C, 3, 3), from the input (N, C, H, W) and the gradient (N, C', H', W')."""
    x = x.contiguous(memory_format=torch.channels_last)
    grad = grad.contiguous(memory_format=torch.channels_last)
    grid, chunks = _chunks(grad.shape)
    inputs = x.new_empty(36, *grid, x.shape[1])
    grads = x.new_empty(36, *grid, grad.shape[1])
    sums = x.new_zeros(36, grad.shape[1], x.shape[1])
    for image, row in chunks:
        torch.ops.tensormask.winograd_input(x, padding, image, row, out=inputs)
        torch.ops.tensormask.winograd_grad(grad, image, row, out=grads)
        sums.baddbmm_(grads.flatten(1, 3).mT, inputs.flatten(1, 3))
    g = x.new_tensor(_G)
    return torch.einsum("ia,jb,ijdc->dcab", g, g, sums.unflatten(0, (6, 6)))


def _chunks(size: Sequence[int]) -> tuple[tuple[int, int, int], list[tuple[int, int]]]:
    """Divide results (N, C, H, W) into chunks of tiles.

    Returns:
        the tiles of a chunk, (images, rows, columns), and for each chunk its first image and its
        first row of results. The last chunk may reach beyond the results.
    """
    num, _, height, width = size
    rows, columns = -(-height // _TILE), -(-width // _TILE)
    images = _even_part(num, _TILES_AT_ONCE // (rows * columns))
    count = _even_part(rows, _TILES_AT_ONCE // columns)
    firsts = [
        (image, row * _TILE) for image in range(0, num, images) for row in range(0, rows, count)
    ]
    return (images, count, columns), firsts


def _even_part(count: int, largest: int) -> int:
    """Divide ``count`` into parts of equal size, at most ``largest`` (or 1); return the size."""
    parts = -(-count // max(1, largest))
    return -(-count // parts)
