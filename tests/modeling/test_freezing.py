"""Frozen parts: no gradients, and batch norms that stay as they are in train mode."""

import copy

import pytest
import torch
from tiny import build, make_image, target
from torch import nn
from torch.testing import assert_close
from torchvision.ops import FrozenBatchNorm2d

from tensormask.modeling import freeze


class ActivatedNorm(nn.BatchNorm2d):
    """A subclass as timm's, which no other norm can replace."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def trained_once() -> nn.Module:
    model = build(opts=["MODEL.RESNETS.NORM", "BN"])
    model.backbone.res2[0].bn1 = ActivatedNorm(64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
            nn.init.uniform_(module.running_mean)
    return model


def test_frozen_parts_stay_as_they_are_and_others_learn() -> None:
    model = trained_once()
    original = copy.deepcopy(model).eval()
    freeze(model, ["backbone.stem", "backbone.res2", "head.cls_subnet"])
    batch = model.preprocess([make_image(64, 96)])
    assert_close(model.eval().backbone(batch)[0], original.backbone(batch)[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    truth = target(96, 96, [[20.0, 30, 60, 70]])
    sum(model([make_image(96, 96)], [truth]).values()).backward()
    optimizer.step()
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    frozen = ("backbone.stem.", "backbone.res2.", "head.cls_subnet.")
    assert {name for name in before if name not in changed} == {
        name for name in before if name.startswith(frozen)
    }
    assert isinstance(model.backbone.stem.bn1, FrozenBatchNorm2d)
    assert isinstance(model.backbone.res2[0].bn1, ActivatedNorm)
    model.load_state_dict(original.state_dict(), strict=True)


def test_copies_stay_frozen() -> None:
    model = trained_once()
    freeze(model, "")
    copied = copy.deepcopy(model).train()
    statistics = copied.backbone.res2[0].bn1.running_mean.clone()
    copied.backbone(copied.preprocess([make_image(64, 64)]))
    assert torch.equal(copied.backbone.res2[0].bn1.running_mean, statistics)
    assert not any(p.requires_grad for p in copied.parameters())


def test_a_norm_itself_and_unknown_names() -> None:
    model, norm = trained_once(), nn.BatchNorm2d(3)
    freeze(model, "backbone.res3.0.bn1")
    assert isinstance(model.backbone.res3[0].bn1, FrozenBatchNorm2d)
    freeze(norm, [""])
    norm.train()(torch.rand(2, 3, 4, 4))
    assert norm.num_batches_tracked == 0
    with pytest.raises(ValueError, match=r"'backbone\.steem'.*the nearest is 'backbone\.stem'"):
        freeze(model, ["backbone.steem"])
