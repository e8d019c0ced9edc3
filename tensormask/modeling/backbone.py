"""ResNet backbones: torchvision's layers, split into the stages res2..res5 that the FPN reads."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

from tensormask.layers.winograd import conv2d
from tensormask.utils.errors import UserError


def conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """Return ``norm(conv(x))``, with a frozen batch norm folded into the weights."""
    if not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * scale
    weight = conv.weight * scale[:, None, None, None]
    return conv2d(x, weight, bias, conv.stride, conv.padding)


def _shortcut(downsample: Any, x: Tensor) -> Tensor:
    """Apply the convolution and norm of a block's shortcut, if it has any."""
    if downsample is None:
        return x
    conv, norm = downsample
    return conv_norm(conv, norm, x)


class BasicBlock(resnet.BasicBlock):
    """torchvision's block, with `conv_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        identity = _shortcut(self.downsample, x)
        out = F.relu(conv_norm(self.conv1, self.bn1, x), inplace=True)
        out = conv_norm(self.conv2, self.bn2, out)
        out += identity
        return F.relu(out, inplace=True)


class Bottleneck(resnet.Bottleneck):
    """torchvision's block, with `conv_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        identity = _shortcut(self.downsample, x)
        out = F.relu(conv_norm(self.conv1, self.bn1, x), inplace=True)
        out = F.relu(conv_norm(self.conv2, self.bn2, out), inplace=True)
        out = conv_norm(self.conv3, self.bn3, out)
        out += identity
        return F.relu(out, inplace=True)


_BLOCKS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], list[int]]] = {
    18: (BasicBlock, [2, 2, 2, 2]),
    34: (BasicBlock, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
    101: (Bottleneck, [3, 4, 23, 3]),
}
_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "FrozenBN": FrozenBatchNorm2d,
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": lambda channels: nn.GroupNorm(32, channels),
}


def get_norm(name: str) -> Callable[[int], nn.Module]:
    """Return the norm layer of a name, to be called with a number of channels. GN has 32 groups."""
    if name not in _NORMS:
        raise UserError(f"norm must be one of {', '.join(_NORMS)}, got {name!r}")
    return _NORMS[name]


class ResNet(nn.Module):
    """A ResNet without its classifier.

    Args:
        depth: 18, 34, 50 or 101.
        norm: "FrozenBN", "BN", "SyncBN" or "GN".
        freeze_at: number of stages that are not trained: 1 the stem, 2 the stem and res2, ... up
            to 5.
        stride_in_1x1: put the stride of a bottleneck into its first 1x1 convolution (as in MSRA's
            weights), not into its 3x3 one (as in torchvision's). Depths 18 and 34 have no
            bottlenecks and ignore it.
    """

    def __init__(
        self, depth: int, *, norm: str = "FrozenBN", freeze_at: int = 2, stride_in_1x1: bool = True
    ) -> None:
        super().__init__()
        if depth not in _BLOCKS:
            raise UserError(
                f"ResNet depth must be one of {', '.join(map(str, _BLOCKS))}, got {depth}"
            )
        block, layers = _BLOCKS[depth]
        trunk = resnet.ResNet(block, layers, norm_layer=get_norm(norm))
        self.stem = nn.Sequential()
        for name in ("conv1", "bn1", "relu", "maxpool"):
            self.stem.add_module(name, getattr(trunk, name))
        self.res2, self.res3, self.res4, self.res5 = (
            trunk.layer1,
            trunk.layer2,
            trunk.layer3,
            trunk.layer4,
        )
        self.out_channels = [64 * 2**i * block.expansion for i in range(4)]
        if stride_in_1x1:
            _move_stride_to_1x1(self)
        for stage in [self.stem, self.res2, self.res3, self.res4, self.res5][:freeze_at]:
            _freeze(stage)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features of res2..res5, strides 4 to 32, of normalized images (N, 3, H, W)."""
        stem: Any = self.stem
        x = stem.maxpool(stem.relu(conv_norm(stem.conv1, stem.bn1, x)))
        features = []
        for stage in (self.res2, self.res3, self.res4, self.res5):
            x = stage(x)
            features.append(x)
        return features


def _move_stride_to_1x1(trunk: nn.Module) -> None:
    for module in trunk.modules():
        if isinstance(module, resnet.Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride


def _freeze(stage: nn.Module) -> None:
    """Disable gradients, and replace batch norms by frozen ones."""
    for parameter in stage.parameters():
        parameter.requires_grad = False
    for module in list(stage.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d | nn.SyncBatchNorm):
                setattr(module, name, FrozenBatchNorm2d(child.num_features))
