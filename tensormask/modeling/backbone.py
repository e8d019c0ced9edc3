"""ResNet backbones: torchvision's layers, split into the stages res2..res5 that the FPN reads.

Also `freeze`, for these and other parts of a model.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

from tensormask.layers.conv_norm import norm_of_conv
from tensormask.layers.norm import LayerNorm2d
from tensormask.layers.norm_relu import Recomputed, instead_of, norm_relu
from tensormask.layers.plain import is_plain, is_plain_conv
from tensormask.layers.winograd import conv2d
from tensormask.modeling.folding import fold
from tensormask.utils.errors import UserError, nearest_name

PLAIN_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, FrozenBatchNorm2d, LayerNorm2d)


def conv_norm(conv: Any, norm: Any, x: Tensor, recomputed: Recomputed | None = None) -> Tensor:
    """Return ``norm(conv(x))``, with a frozen batch norm folded into the weights.

    The result can be changed in place: a module whose hooks may keep its output gets a copy.
    ``recomputed`` is that of `norm_relu` if it returned ``x``.
    """
    if not (is_plain(norm, FrozenBatchNorm2d) and is_plain_conv(conv) and conv.bias is None):
        x = norm_of_conv(conv, norm, x, recomputed)
        return x if is_plain(norm, *PLAIN_NORMS) else x.clone()
    weight, bias = fold(conv, norm)
    with instead_of(recomputed):
        return conv2d(x, weight, bias, conv.stride, conv.padding)


def _residual(block: Any, x: Tensor, *layers: tuple[nn.Module, nn.Module]) -> Tensor:
    """Return the output of a residual block of torchvision with these layers."""
    shortcut, downsample = x, block.downsample
    if is_plain(downsample, nn.Sequential) and len(downsample) == 2:
        shortcut = conv_norm(downsample[0], downsample[1], x)
    elif downsample is not None:
        shortcut = downsample(x)
    recomputed = None
    for conv, norm in layers[:-1]:
        known = is_plain(norm, nn.BatchNorm2d, LayerNorm2d) and is_plain(block.relu, nn.ReLU)
        with instead_of(recomputed):
            x = conv(x) if known else block.relu(conv_norm(conv, norm, x))
        x, recomputed = norm_relu(norm, x) if known else (x, None)
    x = conv_norm(*layers[-1], x, recomputed)
    x += shortcut
    return block.relu(x)


class BasicBlock(resnet.BasicBlock):
    """torchvision's block, with `conv_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return _residual(self, x, (self.conv1, self.bn1), (self.conv2, self.bn2))


class Bottleneck(resnet.Bottleneck):
    """torchvision's block, with `conv_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)
        return _residual(self, x, *layers)


_BLOCKS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], list[int]]] = {
    10: (BasicBlock, [1, 1, 1, 1]),  # for small models; nobody has pretrained weights
    18: (BasicBlock, [2, 2, 2, 2]),
    34: (BasicBlock, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
    101: (Bottleneck, [3, 4, 23, 3]),
}
_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "FrozenBN": FrozenBatchNorm2d,
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": lambda channels: nn.GroupNorm(math.gcd(32, channels), channels),
    "LN": LayerNorm2d,
}


def get_norm(name: str) -> Callable[[int], nn.Module]:
    """Return the norm layer of a name, to be called with a number of channels.

    GN has 32 groups, or the largest smaller power of 2 that divides the channels.
    """
    if name not in _NORMS:
        raise UserError(f"norm must be one of {', '.join(_NORMS)}, got {name!r}")
    return _NORMS[name]


class ResNet(nn.Module):
    """A ResNet without its classifier.

    Args:
        depth: 10, 18, 34, 50 or 101.
        norm: "FrozenBN", "BN", "SyncBN", "GN" or "LN" (see `get_norm`).
        freeze_at: number of stages that are not trained, 0..5: 1 the stem, 2 the stem and res2, ...
        stride_in_1x1: put the stride of a bottleneck into its first 1x1 convolution (as in MSRA's
            weights), not into its 3x3 one (as in torchvision's). Depths 10, 18 and 34 have no
            bottlenecks and ignore it.
        groups, width_per_group: of the 3x3 convolutions of a bottleneck, as in ResNeXts.
        num_stages: 4 for res2..res5; with fewer, the coarse ones do not exist.

    Attributes:
        out_channels, strides: of the features, fine to coarse. `TensorMask` needs both of a
            backbone; see there for one of your own.

    Example:
        >>> import torch
        >>> features = ResNet(18)(torch.zeros(1, 3, 64, 96))
        >>> [tuple(x.shape) for x in features[:2]]
        [(1, 64, 16, 24), (1, 128, 8, 12)]
    """

    def __init__(
        self,
        depth: int,
        *,
        norm: str = "FrozenBN",
        freeze_at: int = 2,
        stride_in_1x1: bool = True,
        groups: int = 1,
        width_per_group: int = 64,
        num_stages: int = 4,
    ) -> None:
        super().__init__()
        if depth not in _BLOCKS:
            raise UserError(f"depth must be one of {', '.join(map(str, _BLOCKS))}, got {depth}")
        block_type, layers = _BLOCKS[depth]
        trunk = resnet.ResNet(
            block_type,
            layers,
            norm_layer=get_norm(norm),
            groups=groups,
            width_per_group=width_per_group,
        )
        self.stem = nn.Sequential()
        for name in ("conv1", "bn1", "relu", "maxpool"):
            self.stem.add_module(name, getattr(trunk, name))
        self.stages = [f"res{i + 2}" for i in range(num_stages)]
        for i, name in enumerate(self.stages):
            self.add_module(name, getattr(trunk, f"layer{i + 1}"))
        self.out_channels = [64 * 2**i * block_type.expansion for i in range(num_stages)]
        self.strides = [4 * 2**i for i in range(num_stages)]
        if stride_in_1x1:
            for block in self.modules():
                if isinstance(block, resnet.Bottleneck):
                    block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
        freeze(self, ["stem", *self.stages][:freeze_at])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features of res2..res5, strides 4 to 32, of normalized images (N, 3, H, W)."""
        stem: Any = self.stem
        if is_plain(stem, nn.Sequential) and len(stem) == 4:
            x = stem.maxpool(stem.relu(conv_norm(stem.conv1, stem.bn1, x)))
        else:
            x = stem(x)
        features = []
        for name in self.stages:
            x = self.get_submodule(name)(x)
            features.append(x)
        return features


def freeze(model: nn.Module, names: str | Iterable[str]) -> None:
    """Freeze parts of a model: no gradients, and batch norms that stay as they are.

    Batch norms keep their statistics and use them in train mode, too. Those of `torch.nn` for
    images become frozen ones with the same values, so that the names of weights do not change; the
    optimizer has to be built afterwards.

    Args:
        names: one or several names of modules, as in `nn.Module.named_modules`; everything inside
            of them is frozen. "" is the model itself.

    Raises:
        UserError: there is no such module.

    Example:
        >>> from tensormask.modeling import ResNet
        >>> backbone = ResNet(18, norm="BN", freeze_at=0)
        >>> freeze(backbone, ["stem", "res2"])
        >>> type(backbone.stem.bn1).__name__, backbone.res3[0].conv1.weight.requires_grad
        ('FrozenBatchNorm2d', True)
    """
    modules = dict(model.named_modules())
    for name in [names] if isinstance(names, str) else names:
        if name not in modules:
            nearest = nearest_name(name, modules)
            raise UserError(f"{name!r} is not a module of the model; the nearest is {nearest!r}")
        modules[name].requires_grad_(False)
        inside = f"{name}." if name else ""
        for child_name, child in modules.items():
            if f"{child_name}.".startswith(inside) and isinstance(child, _BatchNorm):
                parent, _, leaf = child_name.rpartition(".")
                if type(child) in (nn.BatchNorm2d, nn.SyncBatchNorm) and leaf and child.affine:
                    setattr(modules[parent], leaf, _frozen(child))
                else:
                    child.register_forward_pre_hook(_stay_in_eval_mode)


def _frozen(norm: _BatchNorm) -> FrozenBatchNorm2d:
    frozen = FrozenBatchNorm2d(norm.num_features, norm.eps).to(norm.weight.device)
    frozen.load_state_dict(norm.state_dict())
    return frozen.to(norm.weight.dtype)


def _stay_in_eval_mode(norm: nn.Module, inputs: Any) -> None:
    norm.training = False
