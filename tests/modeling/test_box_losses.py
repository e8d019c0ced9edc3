"""The loss of boxes and their overlap, against values by hand and torchvision's."""

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import box_iou

from tensormask.modeling import box_ious, box_loss


def test_box_loss_is_the_sum_of_distances() -> None:
    assert box_loss(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[0.0, 4, 3, 1]])).item() == 6


def test_overlap_by_hand() -> None:
    """20 x 20 px that share a half, and that are 20 px apart."""
    boxes = torch.tensor([[0.0, 0, 20, 20], [0, 0, 20, 20]])
    others = torch.tensor([[10.0, 0, 30, 20], [40, 0, 60, 20]])
    assert_close(box_ious(boxes, others), torch.tensor([1 / 3, 0]))
    assert box_ious(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


def test_overlap_equals_torchvisions() -> None:
    torch.manual_seed(0)
    low, size = 60 * torch.rand(2, 2, 50, 2, dtype=torch.float64)
    boxes, others = torch.cat([low, low + size], dim=2)
    assert_close(box_ious(boxes, others), box_iou(boxes, others).diagonal())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extremes_of_half_precision_stay_finite(dtype) -> None:
    extreme = torch.finfo(dtype).max if dtype == torch.float16 else 1e6
    deltas = torch.tensor([[extreme] * 4, [-extreme] * 4, [0, 0, -extreme, extreme]], dtype=dtype)
    deltas.requires_grad_()
    value = box_loss(deltas, torch.zeros(3, 4))
    value.backward()
    assert value.isfinite()
    assert value.dtype == torch.float32
    assert deltas.grad.isfinite().all()


def test_no_boxes_give_zero_with_gradients() -> None:
    deltas = torch.zeros(0, 4, requires_grad=True)
    value = box_loss(deltas, torch.zeros(0, 4), torch.zeros(0, 4))
    assert value.item() == 0
    assert torch.autograd.grad(value, deltas)[0].shape == (0, 4)
