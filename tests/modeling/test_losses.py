"""The losses against their formulas, term by term."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tensormask.modeling.losses import dice_loss, focal_loss_star, mask_ious, mask_loss


def test_focal_loss_star_by_hand() -> None:
    """Two levels: logits 0.5 (positive) and -1 (background), and -1; gamma 2, alpha 0.25."""
    logits = [torch.tensor([0.5, -1.0]), torch.tensor([[-1.0]])]
    none = torch.tensor([], dtype=torch.int64)
    loss = focal_loss_star(logits, [(torch.tensor([0]),), (none, none)], alpha=0.25, gamma=2.0)
    background = 0.75 * math.log(1 + math.exp(2 * -1.0)) / 2
    expected = 0.25 * math.log(1 + math.exp(-2 * 0.5)) / 2 + 2 * background
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_focal_loss_star_stays_finite() -> None:
    logits = torch.tensor([300.0, -300.0], requires_grad=True)
    loss = focal_loss_star([logits], [(torch.tensor([1]),)])
    assert loss.item() == pytest.approx(0.7 * 300 + 0.3 * 300, rel=1e-6)
    loss.backward()
    assert_close(logits.grad, torch.tensor([0.7, -0.3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_focal_loss_star_in_chunks(monkeypatch, dtype) -> None:
    """Chunks of 7 values, contiguous and channels_last, give the result of a single chunk."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 8, 6, 5, generator=generator).to(dtype)
    index = tuple(torch.tensor(i) for i in ([0, 1], [7, 3], [5, 0], [4, 2]))
    losses, grads = [], []
    contiguous, last = torch.contiguous_format, torch.channels_last
    for chunk, memory_format in (1 << 18, contiguous), (7, contiguous), (7, last):
        monkeypatch.setattr("tensormask.modeling.losses._CHUNK", chunk)
        x = logits.contiguous(memory_format=memory_format).requires_grad_()
        losses.append(focal_loss_star([x], [index]))
        grads.append(torch.autograd.grad(losses[-1], x)[0])
        assert losses[-1].dtype == torch.float32
        assert grads[-1].is_contiguous(memory_format=memory_format)
    assert_close([*losses[1:], *grads[1:]], [losses[0]] * 2 + [grads[0]] * 2)


@settings(max_examples=60, deadline=None)
@given(
    st.permutations(range(4)),
    st.tuples(*[st.sampled_from([slice(None), slice(1, None), slice(0, None, 2)])] * 4),
    st.sets(st.integers(0, 3), max_size=2),
    st.booleans(),
)
def test_focal_loss_star_with_any_strides(order, slices, expanded, channels_last) -> None:
    """Loss and gradient of transposed, sliced and expanded tensors, against autograd's."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = [1 if dim in expanded else size for dim, size in enumerate((2, 4, 3, 5))]
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(shape, generator=generator, dtype=torch.float64)
    stored = stored.contiguous(memory_format=memory_format).requires_grad_()
    logits = stored.expand(2, 4, 3, 5)[slices].permute(order)
    target = torch.rand(logits.shape, generator=generator) < 0.2
    loss = focal_loss_star([logits], [torch.where(target)])
    log = F.logsigmoid(3.0 * torch.where(target, logits, -logits))
    expected = -(torch.where(target, 0.3, 0.7) * log / 3).sum()
    assert_close(loss, expected)
    for inputs in (logits, stored):
        grads = [torch.autograd.grad(x, inputs, retain_graph=True)[0] for x in (loss, expected)]
        assert_close(*grads)


def test_mask_loss_equals_its_formula() -> None:
    logits = torch.randn(3, 5, 5, dtype=torch.float64)
    target = torch.rand(3, 5, 5) > 0.5
    p = logits.sigmoid()
    t = target.double()
    expected = -(2.5 * t * p.log() + (1 - t) * (1 - p).log()).mean((1, 2)).sum()
    loss = mask_loss(logits, target, positive_weight=2.5)
    assert_close(loss.double(), expected, rtol=1e-5, atol=0.0)


def test_mask_ious_by_hand() -> None:
    """One pixel of three in common, two of two, none, and two empty masks."""
    predicted = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    target = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    logits = torch.where(predicted > 0, 0.1, -0.1).view(4, 2, 2)
    ious = mask_ious(logits, target.bool().view(4, 2, 2))
    assert_close(ious, torch.tensor([1 / 3, 1, 0, 0]))


def test_dice_loss_by_hand() -> None:
    """Probabilities of 3/4 at two of four pixels and 1/4 at the others; the target has one."""
    logits = torch.tensor([[[1.0, 1], [-1, -1]]]) * math.log(3)
    target = torch.tensor([[[True, False], [False, False]]])
    one = 1 - (2 * 0.75 + 1) / (2 + 1 + 1)
    none = 1 - 1 / (2 + 0 + 1)
    loss = dice_loss(logits.expand(2, 2, 2), torch.cat([target, target & False]))
    assert loss.item() == pytest.approx(one + none, rel=1e-6)


@pytest.mark.parametrize("value", [60000.0, -60000.0])
def test_dice_loss_of_extremes_is_finite(value: float) -> None:
    """Also of masks of 480 x 480 pixels, whose sums float16 lacks, and of empty targets."""
    logits = torch.full((2, 480, 480), value, dtype=torch.float16, requires_grad=True)
    target = torch.zeros(2, 480, 480, dtype=torch.bool)
    target[0] = True
    loss = dice_loss(logits, target)
    loss.backward()
    assert loss.item() == pytest.approx(1, abs=1e-5)
    assert logits.grad.isfinite().all()
