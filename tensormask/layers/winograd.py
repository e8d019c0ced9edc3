"""3x3 convolutions with a quarter of the multiplications: Winograd's F(4x4, 3x3), on the CPU.

Of a tile of 4x4 results and the 6x6 values ``d`` that it reads, Lavin and Gray (arXiv 1509.09308)
make the results by ``A^T [(G w G^T) * (B^T d B)] A``, where ``*`` multiplies 36 pairs of values, in
place of 144. Summed over the channels the products are 36 products of matrices. The same three
matrices give the gradients. In float32 rounding reaches 1e-5 of the largest result, a few times
that of a direct convolution.

The tiles are cut and put together by the operators of ``csrc/winograd_cpu.cpp``.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tensormask.layers import _native

_TILE = 4  # side of the results of a tile, which reads _TILE + 2 in each direction
_TILES_AT_ONCE = 168  # 12 MB of them with 256 channels in and out: they stay in the caches
# Below, a direct convolution is as fast: places, channels in and out, and the more of the two.
_FEWEST_PLACES, _FEWEST_CHANNELS, _FEWEST_OF_THE_MORE = 1500, 32, 128
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
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
) -> Tensor:
    """`torch.nn.functional.conv2d`, by Winograd's algorithm where that is faster.

    That is on the CPU, in float32 and float64 outside of autocast, for 3x3 kernels of stride 1 and
    padding 0 or 1, 32 channels in and out or more and 128 on one side, and 1500 places or more.
    Everything else, and a compiled model, gets PyTorch's.
    """
    if _is_faster(x, weight, tuple(stride), tuple(padding)):
        return _Winograd.apply(x, weight, bias, padding[0])
    return F.conv2d(x, weight, bias, stride, padding)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` of one group and no dilation, run by `conv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.bias, self.stride, self.padding)


def _is_faster(
    x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> bool:
    return (
        not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.shape[1] == weight.shape[1]
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and weight.shape[2:] == (3, 3)
        and stride == (1, 1)
        and padding in ((0, 0), (1, 1))
        and min(weight.shape[:2]) >= _FEWEST_CHANNELS
        and max(weight.shape[:2]) >= _FEWEST_OF_THE_MORE
        and x[:, 0].numel() >= _FEWEST_PLACES
        and not torch.is_autocast_enabled("cpu")
        and _native.use_native("cpu")
    )


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return _convolve(x, weight, bias, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _convolve(grad, weight.flip(2, 3).transpose(0, 1), None, 2 - ctx.padding)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(x, grad, ctx.padding)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """(N, C, H, W), (C', C, 3, 3) and (C',) to (N, C', H', W'), in channels_last."""
    num, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    g = x.new_tensor(_G)
    kernels = torch.einsum("ia,jb,dcab->ijcd", g, g, weight).flatten(0, 1).contiguous()
    size = (num, len(weight), height + 2 * padding - 2, width + 2 * padding - 2)
    result = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    grid, chunks = _chunks(size)
    inputs = x.new_empty(36, *grid, channels)
    products = x.new_empty(36, *grid, len(weight))
    for image, row in chunks:
        torch.ops.tensormask.winograd_input(x, padding, image, row, out=inputs)
        torch.bmm(inputs.flatten(1, 3), kernels, out=products.flatten(1, 3))
        torch.ops.tensormask.winograd_output(products, bias, image, row, out=result)
    return result


def _weight_gradient(x: Tensor, grad: Tensor, padding: int) -> Tensor:
    """Of maps (N, C, H, W) and gradients (N, C', H', W'): (C', C, 3, 3)."""
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
    """How results (N, C, H, W) are worked on.

    Returns:
        the tiles of a chunk, (images, rows, columns), and for each chunk its first image and its
        first row of results. The last may reach beyond them.
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
    """The size of equal parts of ``count`` of which none has more than ``largest``, or than 1."""
    parts = -(-count // max(1, largest))
    return -(-count // parts)
