"""Norms of the towers: over the channels of a location, or with statistics per feature level."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of each location of a feature map (N, C, H, W).

    The results of a location depend on that location only, in training as in inference. In half
    precision, also within `torch.autocast`, sums are in float32 and results in the dtype of ``x``.

    Args:
        channels: C; ``weight`` and ``bias`` (C,) are 1 and 0 at first.
        eps: added to the variance.

    Example:
        >>> x = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)
        >>> LayerNorm2d(2, eps=0.0)(x).flatten().tolist()
        [-1.0, 1.0]
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        dtype, shape = x.dtype, self.weight.shape
        y = F.layer_norm(x.permute(0, 2, 3, 1), shape, self.weight, self.bias, self.eps)
        return y.to(dtype).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


class LevelNorms(nn.ModuleList):
    """A batch norm per feature level, of a tower that is shared by the levels."""

    def __init__(self, channels: int, num_levels: int) -> None:
        super().__init__(nn.BatchNorm2d(channels) for _ in range(num_levels))

    def forward(self, x: Tensor, level: int) -> Tensor:
        """Return the normalized features (N, C, H, W) of a level."""
        return self[level](x)


class LevelTower(nn.Sequential):
    """Layers in sequence, of which `LevelNorms` depend on the feature level."""

    def forward(self, input: Tensor, level: int = 0) -> Tensor:
        for layer in self:
            input = layer(input, level) if isinstance(layer, LevelNorms) else layer(input)
        return input


def is_local(norm: nn.Module) -> bool:
    """Return whether a norm's result at a location depends on that location only."""
    if isinstance(norm, nn.BatchNorm2d):
        return not norm.training and norm.running_mean is not None
    return isinstance(norm, LayerNorm2d | FrozenBatchNorm2d)
