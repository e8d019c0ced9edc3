"""Norms in the towers of the heads and in the pyramid (MODEL.TENSOR_MASK.NORM, MODEL.FPN.NORM)."""

from unittest.mock import create_autospec

import pytest
import tiny
import torch
from torch import nn
from torch.testing import assert_close

from tensormask.layers.norm import LayerNorm2d, LevelNorms
from tensormask.modeling import tiles
from tensormask.modeling.head import DenseOutputs, conv_tower
from tensormask.utils.errors import UserError

NORM = "MODEL.TENSOR_MASK.NORM"
BOXES = [[10.0, 20.0, 50.0, 60.0], [100.0, 110.0, 150.0, 156.0]]
SIZE = 160  # px: here plain towers are evaluated at tiles


def build(norm: str, head: str = "bipyramid"):
    model = tiny.build(head, [NORM, norm])
    for module in model.modules():  # statistics and parameters that matter
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
        if isinstance(module, nn.BatchNorm2d | LayerNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return model


@pytest.mark.parametrize(
    "norm, names",
    [
        ("", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("LN", ["0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias"]),
        ("GN", ["0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias"]),
        ("BN", ["0.weight", "1.0.weight", "1.0.bias", "1.1.weight", "1.1.bias"]),
    ],
)
def test_names(norm: str, names: list[str]) -> None:
    tower = conv_tower(3, 48, 2, norm=norm, num_levels=2)
    assert [name for name, _ in tower.named_parameters()][: len(names)] == names
    assert [m.num_groups for m in tower.modules() if isinstance(m, nn.GroupNorm)] == (
        [16, 16] if norm == "GN" else []
    )
    with pytest.raises(UserError, match=r"norm must be one of .*'LN'.*got 'IN'"):
        conv_tower(3, 4, 2, norm="IN")


@pytest.mark.parametrize(
    "norm, train, tiled",
    [("LN", True, True), ("BN", False, True), ("BN", True, False), ("GN", False, False)],
)
def test_local_norms_are_computed_at_tiles(
    monkeypatch, norm: str, train: bool, tiled: bool
) -> None:
    """With the same deltas and masks as on whole feature maps, on every level."""
    model = build(norm).train(train)
    convolve = create_autospec(tiles.Tiles.convolve, side_effect=tiles.Tiles.convolve)
    monkeypatch.setattr(tiles.Tiles, "convolve", convolve)
    torch.manual_seed(0)
    with torch.no_grad():
        features = model.fpn(model.backbone(torch.randn(1, 3, 320, 320)))
        n, size, y, x = torch.tensor([[0, 0, 3, 9], [0, 1, 0, 0], [0, 1, 17, 12]]).T
        logits, deltas = model.head(features)
        groups = [(k, 0, torch.tensor([[0, 0, 0], [0, 7, 2]])) for k in range(2)]
        masks = []
        for max_work in (-1, 1e9):
            monkeypatch.setattr(tiles, "_MAX_WORK", max_work)
            monkeypatch.setattr(tiles, "MIN_LOCATIONS", 0)
            masks.append(model.mask_head(features, groups))
            assert bool(convolve.call_args_list) == (tiled and max_work > 0)
        for level in range(2):
            at = model.head.deltas_at(DenseOutputs(features, logits, None), level, n, size, y, x)
            expected = deltas[level].unflatten(1, (-1, 4))[n, size, :, y, x]
            assert_close(at, expected, rtol=1e-3, atol=1e-4)
    assert_close(*masks, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["LN", "BN", "GN"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_towers_with_norms_learn(norm: str, checkpointed: bool) -> None:
    key = "MODEL.TENSOR_MASK.CHECKPOINT_ACTIVATIONS"
    model = tiny.build(opts=[NORM, norm, "MODEL.FPN.NORM", norm, key, checkpointed]).train()
    losses = model([tiny.make_image(SIZE, SIZE)], [tiny.target(SIZE, SIZE, BOXES)])
    sum(losses.values()).backward()
    # Also on levels without windows.
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    norms = [m for m in model.head.modules() if isinstance(m, LayerNorm2d | nn.GroupNorm)]
    norms += [m[0] for m in model.head.modules() if isinstance(m, LevelNorms)]
    assert len(norms) == 2
    assert all(m.weight.grad.abs().sum() > 0 for m in norms)
    counts = [m.num_batches_tracked for m in model.head.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(count == 1 for count in counts)
