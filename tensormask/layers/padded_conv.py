"""A 1x1 convolution whose output channels are padded with zeros to a multiple of 8.

Tensor cores need that in half precision, and the 15 * 15 and 11 * 11 channels of aligned masks are
none.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tensormask.layers.plain import is_plain_conv

# Of a feature map. By a count at 400 TFLOP/s, not measured.
_MIN_LOCATIONS = 1 << 14


def conv1x1(conv: Any, x: Tensor) -> Tensor:
    """Return ``conv(x)``, (N, V*U, H, W), computed so that tensor cores are used in training.

    The product is one of matrices, whose rows are the locations, and so are those of its gradients:
    the gradient of `swap_align2nat_at` is brought into this order once.
    """
    if not _can_be_padded(conv, x):
        return conv(x)
    more = -len(conv.weight) % 8
    weight, bias = F.pad(conv.weight.flatten(1), (0, 0, 0, more)), F.pad(conv.bias, (0, more))
    y = F.linear(x.permute(0, 2, 3, 1), weight, bias)
    return y[..., : len(conv.weight)].permute(0, 3, 1, 2)


def _can_be_padded(conv: Any, x: Tensor) -> bool:
    half = (torch.float16, torch.bfloat16)
    return (
        x.is_cuda
        and x.dtype in half
        # In inference, and on small maps, the additional launches take longer.
        and torch.is_grad_enabled()
        and x[:, 0].numel() >= _MIN_LOCATIONS
        and is_plain_conv(conv)
        and (conv.kernel_size, conv.stride, conv.padding) == ((1, 1), (1, 1), (0, 0))
        and conv.bias is not None
        and x.is_contiguous(memory_format=torch.channels_last)
    )
