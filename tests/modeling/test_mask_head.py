"""Mask heads at windows: masks and gradients against the dense tensor."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tensormask.modeling import mask_head
from tensormask.modeling.mask_head import MaskHead

STRIDES = (4, 8, 16, 32)
KINDS = {
    "natural": {"aligned": False, "bipyramid": False},
    "aligned": {"aligned": True, "bipyramid": False},
    "bipyramid": {"aligned": True, "bipyramid": True},
    "finer": {"aligned": True, "bipyramid": True, "mask_unit": 2},
    "finest": {"aligned": True, "bipyramid": True, "mask_unit": 1},
    "upscale_natural": {"aligned": False, "bipyramid": False, "upscale": 1.5},
    "upscale_aligned": {"aligned": True, "bipyramid": False, "upscale": 3.0},
}
KINDS["upscale_nearest"] = KINDS["upscale_aligned"] | {"upscale_mode": "nearest"}
SIZES = [3, 6]  # pixels


def make_head(kind: str) -> MaskHead:
    torch.manual_seed(0)
    head = MaskHead(6, SIZES, STRIDES, **KINDS[kind], channels=5, num_convs=1, init="he").double()
    for pred in head.mask_pred:  # with std 0.01 all masks would be nearly equal
        torch.nn.init.normal_(pred.weight)
        torch.nn.init.normal_(pred.bias)
    return head


def make_features(height: int, width: int) -> list[Tensor]:
    """Return a pyramid over p2 of any size: each level is half of the finer one, rounded up."""
    features = []
    for _ in STRIDES:
        features.append(torch.randn(2, 6, height, width, dtype=torch.float64, requires_grad=True))
        height, width = -(-height // 2), -(-width // 2)
    return features


def some_windows(features: list[Tensor]) -> list[tuple[int, int, Tensor]]:
    groups = []
    for level, x in enumerate(features):
        n, _, height, width = x.shape
        every = torch.cartesian_prod(*map(torch.arange, (n, height, width)))
        for size in range(2):
            chosen = every[torch.randperm(len(every))[:5]]
            groups.append((level, size, torch.cat([every[[0, -1]], chosen])))
    return groups


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(8, 16), (13, 11), (7, 5)])
def test_windows_equal_the_dense_tensor(kind: str, size: tuple[int, int]) -> None:
    head, features = make_head(kind), make_features(*size)
    groups = some_windows(features)
    masks = head(features, groups)
    dense = head.dense(features)
    expected = [dense[level][s][n, :, y, x] for level, s, w in groups for n, y, x in [w.unbind(1)]]
    for fast, slow, (level, size_index, _) in zip(masks, expected, groups, strict=True):
        side = SIZES[size_index] * (2**level if "bi" in kind or "fine" in kind else 1)
        side *= {"finer": 2, "finest": 4}.get(kind, 1)
        assert fast.shape[1:] == (side, side)
        assert_close(fast.flatten(1), slow)

    inputs = [*features, *head.parameters()]
    weights = [torch.randn_like(mask) for mask in masks]
    fast_sum = sum((w * m).sum() for w, m in zip(weights, masks, strict=True))
    slow_sum = sum((w.flatten(1) * m).sum() for w, m in zip(weights, expected, strict=True))
    grads = [torch.autograd.grad(loss, inputs) for loss in (fast_sum, slow_sum)]
    assert_close(*grads)


def test_locations_of_finer_masks() -> None:
    """The locations of windows stay exact, those between are interpolated; values repeat beyond."""
    x = torch.tensor([[0.0, 4.0, 8.0], [2.0, 6.0, 10.0]])[None, None]
    rows = [[0.0, 2, 4, 6, 8, 8], [1, 3, 5, 7, 9, 9], [2, 4, 6, 8, 10, 10], [2, 4, 6, 8, 10, 10]]
    assert_close(make_head("finer").upsampled(x)[0, 0], torch.tensor(rows))


@pytest.mark.parametrize("few_channels", [False, True])
@pytest.mark.parametrize("name", ["finer", "bipyramid"])
def test_both_ways_to_masks(name: str, few_channels: bool, monkeypatch) -> None:
    """Those of all channels, and of the channels that windows read; at tiles.

    Of masks that are not finer, the second is for features of the finest level that are given.
    """
    monkeypatch.setattr(mask_head, "is_faster", lambda *args: few_channels)
    monkeypatch.setattr(mask_head.Tiles, "are_faster", lambda *args: True)
    head, features = make_head(name), make_features(13, 21)
    finest = head.mask_subnet(features[0]) if name == "bipyramid" else None
    called = []
    monkeypatch.setattr(
        head, "masks_at", lambda *a: called.append(a) or type(head).masks_at(head, *a)
    )
    groups = some_windows(features)
    found = head.iter_masks(features, groups, finest)
    for masks, (level, size, windows) in zip(found, groups, strict=True):
        n, y, x = windows.unbind(1)
        assert_close(masks.flatten(1), head.dense(features)[level][size][n, :, y, x])
    assert len(called) == (0 if few_channels else len(groups))


def test_last_convolutions_that_are_not_plain_are_called() -> None:
    head, features = make_head("finer"), make_features(8, 8)
    group = (0, 0, torch.tensor([[0, 4, 4]]))
    (expected,), calls = head(features, [group]), []
    head.mask_pred[0].register_forward_hook(lambda *args: calls.append(args))
    assert_close(head(features, [group]), [expected])
    assert len(calls) == 1


def test_levels_without_windows_are_not_computed() -> None:
    head, features = make_head("bipyramid"), make_features(8, 8)
    (mask,) = head(features, [(1, 0, torch.tensor([[0, 0, 0]]))])
    mask.sum().backward()
    assert [x.grad is not None for x in features] == [True, True, False, False]
    assert head(features, []) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"upscale": 1.5}, r"masks of \[3, 4\].*UPSCALE_LAMBDA.*divide"),
        ({"upscale": 0.5}, "UPSCALE_LAMBDA must be >= 1"),
        ({"upscale_mode": "cubic"}, "bilinear, nearest"),
        ({"aligned": True, "bipyramid": True, "upscale": 3.0}, "bipyramid are not upscaled"),
        ({"mask_unit": 2}, "MASK_UNIT is 2, but only the tensor bipyramid"),
        ({"aligned": True, "bipyramid": True, "mask_unit": 3}, "divides the stride .*4, got 3"),
        ({"aligned": True, "bipyramid": True, "mask_unit": -2}, "must be 0, or"),
    ],
)
def test_invalid_units_and_upscaling_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        MaskHead(6, [3, 4], STRIDES, **{"aligned": False, "bipyramid": False, **options})
