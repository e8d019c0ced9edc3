"""The losses of boxes against values by hand and torchvision's."""

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import distance_box_iou_loss, generalized_box_iou_loss

from tensormask.modeling import box_ious, box_loss, diou_loss, encode_boxes, giou_loss

WINDOW = torch.tensor([[0.0, 0.0, 40.0, 40.0]])
LOSSES = [box_loss, giou_loss, diou_loss]


def random_boxes(number: int) -> torch.Tensor:
    low, size = 60 * torch.rand(2, number, 2, dtype=torch.float64)
    return torch.cat([low, low + size + 1], dim=1)


def test_box_loss_is_the_sum_of_distances() -> None:
    assert box_loss(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[0.0, 4, 3, 1]])).item() == 6
    assert box_loss(torch.zeros(0, 4), torch.zeros(0, 4)).item() == 0


def test_losses_of_overlap_by_hand() -> None:
    """20 x 20 px that share a half, and that are 20 px apart; the hulls are 30 x 20 and 60 x 20."""
    boxes = torch.tensor([[0.0, 0, 20, 20], [0, 0, 20, 20]])
    targets = torch.tensor([[10.0, 0, 30, 20], [40, 0, 60, 20]])
    assert_close(box_ious(boxes, targets), torch.tensor([1 / 3, 0]))
    windows = WINDOW.expand(2, 4)
    weights = (2.0, 3.0, 4.0, 5.0)
    deltas = [encode_boxes(x, windows, weights) for x in (boxes, targets)]
    giou = giou_loss(*deltas, windows, weights=weights).item()
    assert giou == pytest.approx((1 - 1 / 3) + (1 + 400 / 1200), rel=1e-5)
    diou = diou_loss(*deltas, windows, weights=weights).item()
    assert diou == pytest.approx((1 - 1 / 3 + 100 / 1300) + (1 + 1600 / 4000), rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(giou_loss, generalized_box_iou_loss), (diou_loss, distance_box_iou_loss)],
)
def test_losses_of_overlap_equal_torchvisions(loss, expected) -> None:
    torch.manual_seed(0)
    boxes, targets, windows = (random_boxes(50) for _ in range(3))
    boxes[0] = targets[0]
    boxes.requires_grad_()
    ours = loss(encode_boxes(boxes, windows), encode_boxes(targets, windows), windows)
    theirs = expected(boxes, targets, reduction="sum")
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours, boxes), torch.autograd.grad(theirs, boxes))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extremes_of_half_precision_stay_finite(loss, dtype) -> None:
    extreme = torch.finfo(dtype).max if dtype == torch.float16 else 1e6
    deltas = torch.tensor([[extreme] * 4, [-extreme] * 4, [0, 0, -extreme, extreme]], dtype=dtype)
    deltas.requires_grad_()
    value = loss(deltas, torch.zeros(3, 4), WINDOW.expand(3, 4))
    value.backward()
    assert value.isfinite()
    assert value.dtype == torch.float32
    assert deltas.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_no_boxes_give_zero_with_gradients(loss) -> None:
    deltas = torch.zeros(0, 4, requires_grad=True)
    value = loss(deltas, torch.zeros(0, 4), torch.zeros(0, 4))
    assert value.item() == 0
    assert torch.autograd.grad(value, deltas)[0].shape == (0, 4)
