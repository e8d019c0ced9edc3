"""Backbones of torchvision and timm: features, frozen stages, norms, and torchvision's weights."""

import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
import torchvision
from torch import nn
from torch.testing import assert_close
from torchvision.ops import FrozenBatchNorm2d

from tensormask.checkpoint.loading import load_weights
from tensormask.modeling.trunks import TORCHVISION_TRUNKS, build_trunk
from tensormask.utils.errors import UserError

TORCHVISION = [
    *("MODEL.RESNETS.STRIDE_IN_1X1", False, "INPUT.FORMAT", "RGB"),
    *("MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53], "MODEL.PIXEL_STD", [58.395, 57.12, 57.375]),
]


@pytest.mark.parametrize(
    "name, channels",
    [
        ("resnext50_32x4d", [256, 512, 1024, 2048]),
        ("mobilenet_v2", [24, 32, 96, 320]),
        ("mobilenet_v3_large", [24, 40, 112, 160]),
        ("mobilenet_v3_small", [16, 24, 48, 96]),
        ("convnext_tiny", [96, 192, 384, 768]),
        ("efficientnet_b0", [24, 40, 112, 320]),
    ],
)
def test_features(name: str, channels: list[int]) -> None:
    trunk = build_trunk(name)
    assert (trunk.out_channels, trunk.strides) == (channels, [4, 8, 16, 32])
    assert trunk.training
    assert all(module.training for module in trunk.modules())
    shapes = [tuple(x.shape) for x in trunk.eval()(torch.zeros(1, 3, 96, 64))]
    assert shapes == [(1, c, 24 >> k, 16 >> k) for k, c in enumerate(channels)]


@pytest.mark.parametrize(
    "name, first_trained",
    [
        ("mobilenet_v2", ["0", "2", "4", "7", "14", None]),
        ("convnext_tiny", ["0", "1", "2"]),
    ],
)
def test_stages_are_frozen(name: str, first_trained: list[str | None]) -> None:
    for freeze_at, first in enumerate(first_trained):
        trunk = build_trunk(name, norm="BN", freeze_at=freeze_at)
        trained = [n for n, p in trunk.named_parameters() if p.requires_grad]
        assert trained[0].startswith(f"features.{first}.") if first else not trained
        if trained and name == "mobilenet_v2":
            frozen = [m for m in trunk.modules() if isinstance(m, FrozenBatchNorm2d)]
            assert (len(frozen) > 0) == (freeze_at > 0)


@pytest.mark.parametrize(
    "norm, kind",
    [
        ("FrozenBN", FrozenBatchNorm2d),
        ("BN", nn.BatchNorm2d),
        ("SyncBN", nn.SyncBatchNorm),
        ("GN", nn.GroupNorm),
    ],
)
def test_norms_keep_the_epsilon(norm: str, kind: type) -> None:
    """MobileNetV3's is 0.001; SyncBN replaces the module itself."""
    trunk = build_trunk("mobilenet_v3_small", norm=norm)
    norms = [m for m in trunk.modules() if "Norm" in type(m).__name__ and hasattr(m, "eps")]
    assert {type(m) for m in norms} == {kind}
    assert len(norms) == 33
    if norm != "GN":
        assert {m.eps for m in norms} == {0.001}


@pytest.mark.parametrize("name", ["mobilenet_v2", "convnext_tiny", "resnext50_32x4d"])
def test_weights_of_torchvision(name: str) -> None:
    """Every weight but those for the classifier is loaded; features are torchvision's."""
    theirs = torchvision.models.get_model(name, weights=None).eval()
    opts = ["MODEL.BACKBONE.TRUNK", name, *TORCHVISION, "MODEL.RESNETS.NORM", "FrozenBN"]
    model = tiny.build(opts=opts)
    result = load_weights(model, theirs.state_dict())
    assert result.unexpected == result.misshapen == []
    assert not any(n.startswith("backbone.") for n in result.missing)
    x = torch.randn(1, 3, 64, 64)
    if name == "resnext50_32x4d":
        expected = theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x)))))
    else:
        expected = theirs.features[: {"mobilenet_v2": 4, "convnext_tiny": 2}[name]](x)
    assert_close(model.eval().backbone(x)[0], expected, rtol=1e-4, atol=1e-4)
    wrong = tiny.build(opts=[*opts, "INPUT.FORMAT", "BGR"])
    with pytest.raises(UserError, match=r"add INPUT\.FORMAT RGB"):
        load_weights(wrong, theirs.state_dict())


def test_a_model_learns() -> None:
    opts = ["MODEL.BACKBONE.TRUNK", "mobilenet_v2", "MODEL.RESNETS.NORM", "BN"]
    model = tiny.build(opts=[*opts, "MODEL.BACKBONE.FREEZE_AT", 0]).train()
    losses = model([tiny.make_image(64, 96)], [tiny.target(64, 96, [[20.0, 30.0, 60.0, 50.0]])])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.backbone.parameters())


class FakeTimm(nn.Module):
    """What timm's models with features have: modules, and information about the features."""

    def __init__(self, strides: list[int]) -> None:
        super().__init__()
        self.stem_0, self.stem_1 = nn.Conv2d(3, 8, 4, 4, bias=False), nn.BatchNorm2d(8)
        stages = [nn.Conv2d(8, 8, 1), *(nn.Conv2d(8, 8, 2, 2) for _ in range(3))]
        self.stages_0, self.stages_1, self.stages_2, self.stages_3 = stages
        self.feature_info = SimpleNamespace(
            reduction=lambda: strides,
            channels=lambda: [8] * len(strides),
            module_name=lambda: [f"stages.{i}" for i in range(4)],
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = [self.stem_1(self.stem_0(x))]
        for stage in (self.stages_0, self.stages_1, self.stages_2, self.stages_3):
            features.append(stage(features[-1]))
        return features[1:]


def test_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def create_model(name: str, **options: bool) -> FakeTimm:
        calls.append((name, options))
        if name == "unknown":
            raise RuntimeError("Unknown model (unknown)")
        return FakeTimm([16, 16, 16] if name == "vit" else [4, 8, 16, 32])

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    model = tiny.build(opts=["MODEL.BACKBONE.TRUNK", "timm/own", "MODEL.BACKBONE.FREEZE_AT", 0])
    assert calls == [("own", {"pretrained": False, "features_only": True})]
    assert len(model.eval()([tiny.make_image(64, 64)])) == 1
    frozen = {}
    for freeze_at in range(6):
        trunk = build_trunk("timm/own", norm="BN", freeze_at=freeze_at)
        frozen[freeze_at] = sum(not p.requires_grad for p in trunk.parameters())
    # The batch norm of the stem becomes a frozen one, without parameters.
    assert frozen == {0: 0, 1: 1, 2: 3, 3: 5, 4: 7, 5: 9}
    with pytest.raises(UserError, match=r"strides \[16, 16, 16\]: \[4, 8, 16, 32\] are needed"):
        build_trunk("timm/vit")
    with pytest.raises(UserError, match=r"cannot create 'unknown'.*Unknown model"):
        build_trunk("timm/unknown")


@pytest.mark.parametrize(
    "name, message",
    [
        ("mobilenet_v4", "nearest name is 'mobilenet_v2'"),
        ("timm/resnet18", r"pip install 'tensormask\[timm\]'"),
    ],
)
def test_unknown_trunks(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "mobilenet_v2" in TORCHVISION_TRUNKS
    with pytest.raises(UserError, match=message):
        build_trunk(name)
