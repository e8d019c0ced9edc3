"""Backbones besides the ResNets of backbone.py: torchvision's ResNeXts, MobileNets, ... and timm's.

Weights have the names of the library that a backbone is from. Features are those of the stages of
strides 4, 8, 16 and 32.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import Conv2dNormActivation

from tensormask.modeling.backbone import ResNet, freeze, get_norm
from tensormask.utils.errors import UserError, unknown_name

STRIDES = [4, 8, 16, 32]
# torchvision's ResNets with other bottlenecks: depth, groups, and channels of a group.
_RESNETS = {
    "resnext50_32x4d": (50, 32, 4),
    "resnext101_32x8d": (101, 32, 8),
    "resnext101_64x4d": (101, 64, 4),
    "wide_resnet50_2": (50, 1, 128),
    "wide_resnet101_2": (101, 1, 128),
}
# Their names, and those of torchvision's models with layers in sequence, `features`.
TORCHVISION_TRUNKS = [
    *_RESNETS,
    *torchvision.models.list_models(include=["mobilenet_*", "convnext_*", "efficientnet_*"]),
]


def build_trunk(
    name: str, *, norm: str = "FrozenBN", freeze_at: int = 0, stride_in_1x1: bool = False
) -> nn.Module:
    """Return a backbone with random weights.

    Args:
        name: of torchvision's ResNeXts, wide ResNets, MobileNets, ConvNeXts or EfficientNets, such
            as "mobilenet_v2", or "timm/" and a name of timm.
        norm: replaces batch norms, see `backbone.get_norm`; others stay.
        freeze_at: number of stages that are not trained, 0..5: 1 the stem, 2 the stem and the stage
            of stride 4, ...
        stride_in_1x1: of a ResNeXt or wide ResNet, see `ResNet`.

    Raises:
        UserError: there is no such backbone, it does not have these strides, timm is missing, or
            ``freeze_at`` is out of range.

    Example:
        >>> trunk = build_trunk("mobilenet_v3_small", norm="BN")
        >>> trunk.out_channels, trunk.strides
        ([16, 24, 48, 96], [4, 8, 16, 32])
    """
    if not 0 <= freeze_at <= 5:
        raise UserError(f"freeze_at (MODEL.BACKBONE.FREEZE_AT) must be 0..5, got {freeze_at}")
    if name in _RESNETS:
        depth, groups, width = _RESNETS[name]
        return ResNet(
            depth,
            norm=norm,
            freeze_at=freeze_at,
            stride_in_1x1=stride_in_1x1,
            groups=groups,
            width_per_group=width,
        )
    if name.startswith("timm/"):
        return TimmTrunk(name.removeprefix("timm/"), norm=norm, freeze_at=freeze_at)
    if name not in TORCHVISION_TRUNKS:
        raise UserError(unknown_name("a backbone (MODEL.BACKBONE.TRUNK)", name, TORCHVISION_TRUNKS))
    return TorchvisionTrunk(name, norm=norm, freeze_at=freeze_at)


class TorchvisionTrunk(nn.Module):
    """One of torchvision's models with layers in sequence, `features`.

    A 1x1 convolution that is the last of them is left out: it has many channels, for the
    classifier.

    Args:
        name: of the model.
        norm, freeze_at: see `build_trunk`.

    Attributes:
        out_channels, strides: of the features, fine to coarse.
    """

    def __init__(self, name: str, *, norm: str = "FrozenBN", freeze_at: int = 0) -> None:
        super().__init__()
        features: Any = torchvision.models.get_model(name, weights=None).features
        last = features[-1]
        if isinstance(last, Conv2dNormActivation) and last[0].kernel_size == (1, 1):
            features = features[:-1]
        self.features = features
        replace_batch_norms(self, norm)
        sizes = [tuple(x.shape) for x in self._outputs(torch.zeros(1, 3, 64, 96))]
        stride_of = [64 // height for _, _, height, _ in sizes]
        # The last layer of each stride.
        self.ends = [max(i for i, s in enumerate(stride_of) if s == stride) for stride in STRIDES]
        self.out_channels = [sizes[i][1] for i in self.ends]
        self.strides = list(STRIDES)
        stem = max((i for i, stride in enumerate(stride_of) if stride < STRIDES[0]), default=0)
        frozen = [-1, stem, *self.ends][freeze_at] + 1
        freeze(self, [f"features.{i}" for i in range(frozen)])

    @torch.no_grad()
    def _outputs(self, x: Tensor) -> Iterator[Tensor]:
        self.eval()
        for layer in self.features:
            x = layer(x)
            yield x
        self.train()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features, strides 4 to 32, of normalized images (N, 3, H, W)."""
        outputs = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.ends:
                outputs.append(x)
        return outputs


class TimmTrunk(nn.Module):
    """A model of the package timm that returns features of strides 4, 8, 16 and 32.

    Args:
        name: of the model.
        norm, freeze_at: see `build_trunk`.

    Attributes:
        body: timm's model.
        out_channels, strides: of the features, fine to coarse.
    """

    def __init__(self, name: str, *, norm: str = "FrozenBN", freeze_at: int = 0) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise UserError(
                f"MODEL.BACKBONE.TRUNK is 'timm/{name}', and the package timm is not installed: "
                "pip install 'tensormask[timm]'"
            ) from None
        try:
            self.body = timm.create_model(name, pretrained=False, features_only=True)
        except (RuntimeError, AttributeError) as error:  # an unknown name; no features
            raise UserError(f"timm cannot create {name!r} with features_only: {error}") from error
        info: Any = self.body.feature_info
        strides = info.reduction()
        self.first = sum(stride < STRIDES[0] for stride in strides)
        self.out_channels = list(info.channels())[self.first :]
        self.strides = list(STRIDES)
        if strides[self.first :] != STRIDES:
            raise UserError(
                f"MODEL.BACKBONE.TRUNK is 'timm/{name}', whose features have strides {strides}: "
                f"{STRIDES} are needed"
            )
        replace_batch_norms(self, norm)
        ends = [self._find(path) for path in info.module_name()[self.first :]]
        if freeze_at == 1:
            freeze(self, list(_up_to(self, ends[0]))[:-1])
        elif freeze_at > 1:
            freeze(self, _up_to(self, ends[freeze_at - 2]))

    def _find(self, path: str) -> str:
        """Return the name of a module of timm's model, where it can be at the top."""
        names = dict(self.named_modules())
        joined = f"body.{path.replace('.', '_')}"
        return joined if joined in names else f"body.{path}"

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features, strides 4 to 32, of normalized images (N, 3, H, W)."""
        return self.body(x)[self.first :]


def _up_to(model: nn.Module, path: str) -> Iterator[str]:
    """Yield the modules that are registered before one, and this one."""
    prefix = ""
    for part in path.split("."):
        for name, _ in model.get_submodule(prefix.rstrip(".")).named_children():
            if name == part:
                break
            yield prefix + name
        prefix += f"{part}."
    yield path


def replace_batch_norms(model: nn.Module, norm: str) -> None:
    """Replace batch norms by another norm; frozen ones and SyncBN keep the values.

    Raises:
        UserError: there is no such norm, or a batch norm does more than that.
    """
    make = get_norm(norm)
    if norm == "BN":
        return
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    for name, old in norms.items():
        if type(old) is not nn.BatchNorm2d:
            raise UserError(
                f"the backbone has norms of type {type(old).__name__}, which cannot be replaced: "
                "set MODEL.RESNETS.NORM to BN"
            )
        parent, _, leaf = name.rpartition(".")
        if norm in ("GN", "LN"):
            setattr(model.get_submodule(parent), leaf, make(old.num_features))
    if norm == "FrozenBN":
        freeze(model, norms)
    elif norm == "SyncBN":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
