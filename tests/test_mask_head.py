"""The fast path against the dense tensor: equal masks at windows, and equal gradients."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tensormask.modeling.mask_head import MaskHead

STRIDES = (4, 8, 16, 32)
KINDS = {"natural": (False, False), "aligned": (True, False), "bipyramid": (True, True)}


def make_head(kind: str) -> MaskHead:
    torch.manual_seed(0)
    aligned, bipyramid = KINDS[kind]
    head = MaskHead(
        6, [3, 4], STRIDES, aligned=aligned, bipyramid=bipyramid, channels=5, num_convs=1, init="he"
    ).double()
    for pred in head.mask_pred:  # std 0.01 would make every mask nearly the same
        torch.nn.init.normal_(pred.weight)
        torch.nn.init.normal_(pred.bias)
    return head


def make_features(height: int, width: int) -> list[Tensor]:
    """A pyramid over p2 of odd size: each level is half of the last, rounded up."""
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
        side = [3, 4][size_index] * (2**level if kind == "bipyramid" else 1)
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
