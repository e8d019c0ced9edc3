"""The losses of classes with qualities as targets, against their formulas."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from tensormask.modeling import quality_focal_loss, varifocal_loss

LOSSES = [quality_focal_loss, varifocal_loss]
NONE = torch.tensor([], dtype=torch.int64)


def dense_quality(logits: Tensor, target: Tensor, beta: float = 2.0) -> Tensor:
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (logits.sigmoid() - target).abs().pow(beta) * bce


def dense_varifocal(
    logits: Tensor, target: Tensor, alpha: float = 0.75, gamma: float = 2.0
) -> Tensor:
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return torch.where(target > 0, target, alpha * logits.sigmoid().pow(gamma)) * bce


def test_by_hand() -> None:
    """Positives of p = 3/4 and q = 1/2 or 0, and a background of p = 1/4, on two levels."""
    logits = [torch.tensor([1.0, -1.0]) * math.log(3), torch.tensor([[math.log(3)]])]
    positives, zero = [(torch.tensor([0]),), (torch.tensor([0]),) * 2], torch.tensor([0.0])
    bce = -(0.5 * math.log(0.75) + 0.5 * math.log(0.25))
    inputs = logits, positives, [torch.tensor([0.5]), zero]
    quality = 0.25**2 * bce + 0.25**2 * math.log(4 / 3) + 0.75**2 * math.log(4)
    assert quality_focal_loss(*inputs).item() == pytest.approx(quality, rel=1e-6)
    varifocal = 0.5 * bce + 0.75 * (0.25**2 * math.log(4 / 3) + 0.75**2 * math.log(4))
    assert varifocal_loss(*inputs).item() == pytest.approx(varifocal, rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "dense"),
    [
        (quality_focal_loss, dense_quality),
        (varifocal_loss, dense_varifocal),
        (partial(quality_focal_loss, beta=1.5), partial(dense_quality, beta=1.5)),
        (partial(varifocal_loss, gamma=3.0), partial(dense_varifocal, gamma=3.0)),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last, "sliced"])
def test_losses_equal_their_dense_formulas(monkeypatch, loss, dense, layout) -> None:
    """Loss, gradient and second derivative, in chunks of 7 values; no copy of other strides."""
    monkeypatch.setattr("tensormask.modeling.losses._CHUNK", 7)
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    logits = logits[:, :, :, ::2] if layout == "sliced" else logits.to(memory_format=layout)
    logits = 2 * logits.detach().requires_grad_()
    index = tuple(torch.tensor(i) for i in ([0, 1, 1], [3, 0, 2], [2, 1, 0], [1, 0, 2]))
    quality = torch.tensor([0.3, 0.0, 1.0], dtype=torch.float64)
    target = torch.zeros_like(logits).index_put(index, quality)
    value, expected = loss([logits], [index], [quality]), dense(logits, target).sum()
    assert_close(value, expected)
    first, of_formula = (
        torch.autograd.grad(x, logits, create_graph=True)[0] for x in (value, expected)
    )
    assert_close(first, of_formula)
    second = (torch.autograd.grad(x.square().sum(), logits)[0] for x in (first, of_formula))
    assert_close(*second)
    (plain,) = torch.autograd.grad(loss([logits], [index], [quality]), logits)
    assert_close(plain, of_formula)
    if layout == torch.channels_last:
        assert plain.is_contiguous(memory_format=layout)
    transformed = torch.func.grad(lambda x: loss([x], [index], [quality]))(logits)
    assert_close(transformed, of_formula)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extremes_of_half_precision_stay_finite(loss, dtype) -> None:
    logits = torch.tensor([60000.0, -60000.0] * 3, dtype=dtype, requires_grad=True)
    quality = torch.tensor([0.0, 0.5, 1.0, 1.0])
    with torch.autocast("cpu", dtype):
        value = loss([logits], [(torch.arange(4),)], [quality])
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert logits.grad.isfinite().all()
    assert value > 60000


@pytest.mark.parametrize("loss", LOSSES)
def test_no_positives(loss) -> None:
    """The background's loss remains."""
    logits = torch.zeros(3, requires_grad=True)
    value = loss([logits], [(NONE,)], [torch.zeros(0)])
    alpha = 1.0 if loss is quality_focal_loss else 0.75
    assert value.item() == pytest.approx(3 * alpha * math.log(2) / 4, rel=1e-6)
    value.backward()
    assert (logits.grad > 0).all()
