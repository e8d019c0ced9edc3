"""Mask heads at windows: masks and gradients against the dense tensor."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tensormask.modeling.mask_head import MaskHead

STRIDES = (4, 8, 16, 32)
KINDS = {
    "natural": {"aligned": False, "bipyramid": False},
    "aligned": {"aligned": True, "bipyramid": False},
    "bipyramid": {"aligned": True, "bipyramid": True},
    "upscale_natural": {"aligned": False, "bipyramid": False, "upscale": 1.5},
    "upscale_aligned": {"aligned": True, "bipyramid": False, "upscale": 3.0},
    "upscale_nearest": {
        "aligned": True,
        "bipyramid": False,
        "upscale": 3.0,
        "upscale_mode": "nearest",
    },
}
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
        every = torch.cartesian_prod(torch.arange(n), torch.arange(height), torch.arange(width))
        for size in range(2):
            corners = every[[0, -1]]
            chosen = every[torch.randperm(len(every))[:5]]
            groups.append((level, size, torch.cat([corners, chosen])))
    return groups


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(8, 16), (13, 11), (7, 5)])
def test_windows_equal_the_dense_tensor(kind: str, size: tuple[int, int]) -> None:
    head, features = make_head(kind), make_features(*size)
    groups = some_windows(features)
    masks = head(features, groups)
    dense = head.dense(features)
    expected = []
    for level, size_index, windows in groups:
        n, y, x = windows.unbind(1)
        expected.append(dense[level][size_index][n, :, y, x])
    for fast, slow, (level, size_index, _) in zip(masks, expected, groups, strict=True):
        side = SIZES[size_index] * (2**level if kind == "bipyramid" else 1)
        assert fast.shape[1:] == (side, side)
        assert_close(fast.flatten(1), slow)

    inputs = [*features, *head.parameters()]
    weights = [torch.randn_like(mask) for mask in masks]
    fast_sum = sum((w * m).sum() for w, m in zip(weights, masks, strict=True))
    slow_sum = sum((w.flatten(1) * m).sum() for w, m in zip(weights, expected, strict=True))
    fast_grads = torch.autograd.grad(fast_sum, inputs)
    slow_grads = torch.autograd.grad(slow_sum, inputs)
    for fast, slow in zip(fast_grads, slow_grads, strict=True):
        assert_close(fast, slow)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("upscale")])
def test_gradients_of_the_upscale_heads(kind: str) -> None:
    head, features = make_head(kind), [x.detach().requires_grad_() for x in make_features(4, 5)[:2]]
    groups = [(0, 0, torch.tensor([[0, 1, 1], [1, 3, 4]])), (1, 1, torch.tensor([[1, 0, 2]]))]
    assert torch.autograd.gradcheck(lambda *x: tuple(head(list(x), groups)), features)


def test_levels_without_windows_are_not_computed() -> None:
    head, features = make_head("bipyramid"), make_features(8, 8)
    window = torch.tensor([[0, 0, 0]])
    (mask,) = head(features, [(1, 0, window)])
    mask.sum().backward()
    assert features[0].grad is not None
    assert features[1].grad is not None
    assert features[2].grad is None
    assert features[3].grad is None
    assert head(features, []) == []


def test_bipyramid_needs_aligned_masks() -> None:
    with pytest.raises(ValueError, match="ALIGNED_ON"):
        MaskHead(6, [3], STRIDES, aligned=False, bipyramid=True)


@pytest.mark.parametrize("kind", KINDS)
def test_iter_masks_equals_forward(kind: str) -> None:
    head, features = make_head(kind), make_features(8, 8)
    groups = some_windows(features)
    masks = head(features, groups)
    assert isinstance(masks, list)
    for one, among_all in zip(head.iter_masks(features, groups), masks, strict=True):
        assert torch.equal(one, among_all)


def test_upscale_natural_by_hand() -> None:
    """The 1x1 convolution predicts a mask of 2 x 2, which is upscaled."""
    head = MaskHead(
        2, [4], (4,), aligned=False, bipyramid=False, upscale=2, channels=2, num_convs=0
    )
    with torch.no_grad():
        head.mask_pred[0].weight.zero_()
        head.mask_pred[0].bias.copy_(torch.tensor([0.0, 4.0, 0.0, 4.0]))
    (mask,) = head([torch.zeros(1, 2, 3, 3)], [(0, 0, torch.tensor([[0, 1, 1]]))])
    assert mask.tolist() == [[[0, 1, 3, 4]] * 4]


def test_upscale_aligned_by_hand() -> None:
    """Pixel (v, u) of a window comes from its own location, (v - 1, u - 1) away."""
    head = MaskHead(1, [3], (4,), aligned=True, bipyramid=False, upscale=3, channels=1, num_convs=0)
    with torch.no_grad():
        head.mask_pred[0].weight.fill_(1.0)
    x = torch.arange(16.0).view(1, 1, 4, 4)
    (masks,) = head([x], [(0, 0, torch.tensor([[0, 1, 1], [0, 3, 0]]))])
    assert masks[0].tolist() == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
    assert masks[1].tolist() == [[-6, 8, 9], [-6, 12, 13], [-6, -6, -6]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"upscale": 1.5}, r"masks of \[3, 4\].*UPSCALE_LAMBDA.*divide"),
        ({"upscale": 0.5}, "UPSCALE_LAMBDA must be >= 1"),
        ({"upscale_mode": "cubic"}, "bilinear, nearest"),
        ({"aligned": True, "bipyramid": True, "upscale": 3.0}, "bipyramid are not upscaled"),
    ],
)
def test_invalid_upscaling_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        MaskHead(6, [3, 4], STRIDES, **{"aligned": False, "bipyramid": False, **options})


@pytest.mark.parametrize("kind", ["natural", "bipyramid"])
def test_bfloat16_autocast(kind: str) -> None:
    """Masks and gradients at windows, near those of float32."""
    head, features = make_head(kind).float(), [x.detach().float() for x in make_features(8, 8)]
    groups = some_windows(features)
    full = head(features, groups)
    with torch.autocast("cpu", torch.bfloat16):
        half = head(features, groups)
    grads = []
    for masks in (full, half):
        head.zero_grad()
        sum(mask.float().square().mean() for mask in masks).backward()
        grads.append(torch.cat([p.grad.flatten() for p in head.parameters()]))
    for one, other in zip(full, half, strict=True):
        assert other.dtype == torch.bfloat16
        assert (one - other.float()).norm() < 0.02 * one.norm()
    # ReLUs near 0 can differ.
    assert (grads[0] - grads[1]).norm() < 0.1 * grads[0].norm()
