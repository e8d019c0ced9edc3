"""Masks of chosen windows from the features below the last convolution of an aligned mask head.

The convolution, 1x1 with V*U channels, commutes with upsampling, and of its channels a window reads
only a few at each location. So at few windows, the compiled op computes only these, and never the
aligned tensor: for K windows the products of ``16 * K * (steps * V)**2`` pairs of vectors, for
``V**2 * H * W`` of the convolution.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tensormask.layers import _native
from tensormask.layers._transforms import differentiate, is_eager
from tensormask.layers.swap_align2nat import swap_align2nat_at

# Channels that a window reads at a location, as the op computes them.
_CHANNELS_READ = 16
# Time of a product of the op, over that of a product of the convolution and of what follows it,
# with upsampling and without.
_TIME_OF_PRODUCT, _TIME_OF_PRODUCT_UNZOOMED = 0.25, 1.0


def upsample_locations(x: Tensor, zoom: int) -> Tensor:
    """Upsample a feature map (N, C, H, W) to (N, C, zoom*H, zoom*W), bilinearly.

    The location ``y`` becomes ``zoom * y``, so that it stays the center of the same window. Beyond
    the last location, its values repeat.

    Example:
        >>> upsample_locations(torch.tensor([[[[0.0, 4.0]]]]), 2)[0, 0, 0]
        tensor([0., 2., 4., 4.])
    """
    if zoom == 1:
        return x
    height, width = (zoom * side for side in x.shape[-2:])
    x = torch.cat([x, x[:, :, -1:]], dim=2)
    x = torch.cat([x, x[:, :, :, -1:]], dim=3)
    half = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)
    with torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda") and not half):
        x = F.interpolate(x, (height + 1, width + 1), mode="bilinear", align_corners=True)
    return x[:, :, :height, :width]


def window_masks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    windows: Tensor,
    steps: int,
    zoom: int,
    pad_val: float = -6.0,
) -> Tensor:
    """Predict the masks of chosen windows of a level of the tensor bipyramid.

    Args:
        x (Tensor[N, C, H, W]): features of the level, at the locations of the finest level.
        weight (Tensor[V*U, C]), bias (Tensor[V*U]): of the 1x1 convolution, V == U.
        windows (Tensor[K, 3]): int64 rows ``(n, y, x)``: image, row and column on the level's grid.
        steps: locations between neighboring windows.
        zoom: mask pixels between neighboring locations.
        pad_val: the logit that is read outside.

    Returns:
        Tensor[K, steps*zoom*V, steps*zoom*U]: that of `swap_align2nat_at` with ``lambda_val =
        steps * zoom``, of the convolution of ``upsample_locations(x, zoom)``. The compiled op
        computes it on the CPU in float32 and float64, plain PyTorch elsewhere.

    Example:
        >>> x, windows = torch.zeros(1, 8, 20, 32), torch.tensor([[0, 4, 5]])
        >>> window_masks(x, torch.zeros(225, 8), torch.zeros(225), windows, 2, 2).shape
        torch.Size([1, 60, 60])
    """
    inputs = (x, weight, bias)
    if (
        x.dtype in (torch.float32, torch.float64)
        and x.dtype == weight.dtype == bias.dtype
        and x.device.type == "cpu"
        and is_eager(*inputs)
        and _native.use_native("cpu")
    ):
        return _WindowMasks.apply(*inputs, windows, steps, zoom, pad_val)
    return _by_aligned_masks(*inputs, windows, steps, zoom, pad_val)


def is_faster(
    num_locations: int, grid: tuple[int, int], side: int, windows: Tensor, steps: int, zoom: int
) -> bool:
    """Return whether the op at windows takes less time than the convolution at many locations.

    Args:
        num_locations: of the convolution.
        grid: rows and columns of the feature map.
        side: V == U.
        windows, steps, zoom: of `window_masks`, on the CPU.
    """
    centers, reach = windows[:, 1:] * steps, steps * side / 2 + 1
    sides = (centers + reach).minimum(centers.new_tensor(grid)) - (centers - reach).clamp(min=0)
    num_products = _CHANNELS_READ * sides.prod(1).sum().item()
    time = _TIME_OF_PRODUCT if zoom > 1 else _TIME_OF_PRODUCT_UNZOOMED
    return time * num_products <= side**2 * num_locations


class _WindowMasks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, windows: Tensor, *rest: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, windows)
        ctx.rest = rest  # steps, zoom, pad_val
        tensors = _contiguous(x, weight, bias, windows)
        return torch.ops.tensormask.window_masks(*tensors, *ctx.rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, windows = ctx.saved_tensors
        steps, zoom, _ = ctx.rest
        # To be differentiated again, or a batch of gradients.
        if torch.is_grad_enabled() or not is_eager(grad):

            def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return _by_aligned_masks(x, weight, bias, windows, *ctx.rest)

            return *differentiate(plain, (x, weight, bias), grad), None, None, None, None
        x, weight, windows, grad = *_contiguous(x, weight, windows), grad.contiguous()
        of_x, *others = torch.ops.tensormask.window_masks_backward(
            grad, x, weight, windows, steps, zoom
        )
        return of_x.permute(0, 3, 1, 2), *others, None, None, None, None


def _contiguous(x: Tensor, *others: Tensor) -> list[Tensor]:
    """Return the arguments of the op: ``x`` with its channels last, and others."""
    return [x.permute(0, 2, 3, 1).contiguous(), *(each.contiguous() for each in others)]


def _by_aligned_masks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    windows: Tensor,
    steps: int,
    zoom: int,
    pad_val: float,
) -> Tensor:
    """Compute the aligned tensor, and swap it: the definition."""
    # The convolution commutes with upsampling.
    masks = upsample_locations(F.conv2d(x, weight[:, :, None, None], bias), zoom)
    return swap_align2nat_at(masks, windows, steps * zoom, pad_val)
