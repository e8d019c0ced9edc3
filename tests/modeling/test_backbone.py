"""Backbone and FPN: shapes, norms, frozen stages, strides, and the fusion by hand."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

from tensormask.modeling import backbone
from tensormask.modeling.backbone import ResNet
from tensormask.modeling.fpn import FPN


@pytest.mark.parametrize(
    "depth, expansion, num_blocks", [(10, 1, 4), (18, 1, 8), (34, 1, 16), (50, 4, 16), (101, 4, 33)]
)
def test_depths(depth: int, expansion: int, num_blocks: int) -> None:
    channels = [64 * expansion * 2**i for i in range(4)]
    with torch.device("meta"):
        trunk = ResNet(depth).eval()
        features = trunk(torch.zeros(2, 3, 64, 96))
    assert trunk.out_channels == channels
    shapes = [(2, c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)]
    assert [tuple(x.shape) for x in features] == shapes
    blocks = [m for m in trunk.modules() if isinstance(m, resnet.BasicBlock | resnet.Bottleneck)]
    assert len(blocks) == num_blocks


def test_the_first_stages_of_a_resnet() -> None:
    whole, short = ResNet(10, freeze_at=0), ResNet(10, num_stages=3, freeze_at=0)
    assert (short.out_channels, short.strides) == ([64, 128, 256], [4, 8, 16])
    assert not hasattr(short, "res5")
    short.load_state_dict({k: v for k, v in whole.state_dict().items() if "res5" not in k})
    x = torch.randn(1, 3, 64, 64)
    for expected, actual in zip(whole(x), short(x), strict=False):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize(
    "norm, freeze_at", [("FrozenBN", 2), ("BN", 0), ("BN", 2), ("SyncBN", 3), ("GN", 5), ("GN", 1)]
)
def test_norms_and_frozen_stages(norm: str, freeze_at: int) -> None:
    torch.manual_seed(0)
    trunk = ResNet(18, norm=norm, freeze_at=freeze_at).train()
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    loss = sum(x.square().mean() for x in trunk(torch.randn(2, 3, 64, 64)))
    if loss.requires_grad:
        loss.backward()
        torch.optim.SGD(trunk.parameters(), lr=0.1).step()
    stages = ["stem", "res2", "res3", "res4", "res5"]
    changed = {
        name.split(".")[0]
        for name, value in trunk.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == set(stages[freeze_at:])
    assert all(m.eps == 1e-5 for m in trunk.modules() if isinstance(m, FrozenBatchNorm2d))
    if norm == "FrozenBN":
        assert not any(isinstance(m, nn.BatchNorm2d) for m in trunk.modules())


@pytest.mark.parametrize("in_1x1", [True, False])
def test_stride_of_bottlenecks(in_1x1: bool) -> None:
    with torch.device("meta"):
        trunk = ResNet(50, stride_in_1x1=in_1x1)
    block = trunk.res3[0]
    assert block.conv1.stride == ((2, 2) if in_1x1 else (1, 1))
    assert block.conv2.stride == ((1, 1) if in_1x1 else (2, 2))
    assert trunk.res3[1].conv1.stride == trunk.res3[1].conv2.stride == (1, 1)


def features(channels: list[int]) -> list[torch.Tensor]:
    return [torch.randn(1, c, 16 // 2**i, 24 // 2**i) for i, c in enumerate(channels)]


@pytest.mark.parametrize("fuse", ["sum", "avg"])
def test_pyramid_by_hand(fuse: str) -> None:
    torch.manual_seed(0)
    fpn = FPN([2, 3, 4, 5], 6, fuse=fuse)
    res = features([2, 3, 4, 5])
    pyramid = fpn(res)
    assert [tuple(x.shape[-2:]) for x in pyramid] == [
        (16, 24), (8, 12), (4, 6), (2, 3), (1, 2), (1, 1),
    ]  # fmt: skip
    above = fpn.lateral["p5"](res[3]).repeat_interleave(2, 2).repeat_interleave(2, 3)
    p4 = (fpn.lateral["p4"](res[2]) + above) * (0.5 if fuse == "avg" else 1.0)
    assert_close(pyramid[2], fpn.output["p4"](p4))
    assert_close(pyramid[4], fpn.p6(res[3]))
    assert_close(pyramid[5], fpn.p7(pyramid[4].clamp(min=0)))


@pytest.mark.parametrize("levels", [(2, 7), (2, 4), (3, 6), (5, 5)])
def test_levels_share_their_values(levels: tuple[int, int]) -> None:
    """A pyramid with fewer levels computes the same values, and uses all its parameters."""
    whole, part = FPN([2, 3, 4, 5], 6), FPN([2, 3, 4, 5], 6, levels=levels)
    part.load_state_dict({name: whole.state_dict()[name] for name in part.state_dict()})
    res = features([2, 3, 4, 5])
    pyramid = part(res)
    for x, expected in zip(pyramid, whole(res)[levels[0] - 2 : levels[1] - 1], strict=True):
        assert_close(x, expected)
    sum(x.sum() for x in pyramid).backward()
    assert all(p.grad is not None for p in part.parameters())


@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_pyramid_with_norm_has_no_biases(norm: str) -> None:
    fpn = FPN([64] * 4, 32, norm=norm, levels=(2, 5))
    assert not any(m.bias is not None for m in fpn.modules() if isinstance(m, nn.Conv2d))
    assert len(fpn([torch.randn(2, 64, 16 // 2**i, 16 // 2**i) for i in range(4)])) == 4


@pytest.mark.parametrize("levels", [(1, 5), (6, 7), (4, 3), (2, 8)])
def test_invalid_levels_are_refused(levels: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="levels"):
        FPN([2, 3, 4, 5], levels=levels)


@pytest.mark.parametrize("block_type", [backbone.BasicBlock, backbone.Bottleneck])
@pytest.mark.parametrize("stride", [1, 2])
def test_folded_norms_equal_separate_ones(block_type, stride: int) -> None:
    """Values and gradients, against torchvision's blocks, which normalize after convolutions."""
    torch.manual_seed(0)
    channels = 4 * block_type.expansion
    shortcut = nn.Sequential(
        nn.Conv2d(channels, channels, 1, 2, bias=False), FrozenBatchNorm2d(channels)
    )
    block = block_type(
        channels, 4, stride, shortcut if stride == 2 else None, norm_layer=FrozenBatchNorm2d
    ).double()
    for buffer in block.buffers():
        buffer.copy_(torch.rand_like(buffer) + 0.5)
    x = torch.randn(2, channels, 8, 10, dtype=torch.float64, requires_grad=True)
    results = []
    for forward in (block_type.forward, block_type.__base__.forward):
        out = forward(block, x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])])
    assert_close(*results)
