"""The loss of boxes: L1 of their offsets (paper, sec. 5.3); and the overlap of boxes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tensormask.modeling.losses import at_least_float32

# Square pixels: a union of boxes without area divides by it.
_TINY = 1e-7


def box_loss(deltas: Tensor, target_deltas: Tensor, windows: Tensor | None = None) -> Tensor:
    """Return the L1 distance of the offsets (F, 4) of F windows, summed, in at least float32.

    Another loss of boxes may need the ``windows`` (F, 4) in pixels: `box_coder.decode_boxes` makes
    boxes of them and the offsets.

    Example:
        >>> box_loss(torch.zeros(1, 4), torch.ones(1, 4))
        tensor(4.)
    """
    return F.l1_loss(at_least_float32(deltas), target_deltas, reduction="sum")


def box_ious(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the IoU (K,) of each box (K, 4) with the other one of its row.

    Example:
        >>> box_ious(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0, 2.0]]))
        tensor([0.3333])
    """
    low = torch.maximum(boxes[:, :2], others[:, :2])
    width, height = (torch.minimum(boxes[:, 2:], others[:, 2:]) - low).clamp(min=0).unbind(1)
    intersection = width * height
    union = _area(boxes) + _area(others) - intersection
    return intersection / (union + _TINY)


def _area(boxes: Tensor) -> Tensor:
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    return width * height
