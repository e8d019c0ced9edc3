"""Losses of boxes: L1 of their offsets (paper, sec. 5.3), or their overlap.

Each is a sum over F positive windows of offsets, target offsets and windows, (F, 4) each. Half
precision is computed in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tensormask.modeling.box_coder import BOX_WEIGHTS, decode_boxes
from tensormask.modeling.losses import at_least_float32

# Square pixels: a union of boxes without area divides by it.
_TINY = 1e-7


def box_loss(deltas: Tensor, target_deltas: Tensor, windows: Tensor | None = None) -> Tensor:
    """Return the L1 distance of offsets (F, 4), summed.

    Another loss of boxes may need the ``windows`` (F, 4) in pixels: `box_coder.decode_boxes` makes
    boxes of them and the offsets.

    Example:
        >>> box_loss(torch.zeros(1, 4), torch.ones(1, 4))
        tensor(4.)
    """
    return F.l1_loss(at_least_float32(deltas), target_deltas, reduction="sum")


def giou_loss(
    deltas: Tensor,
    target_deltas: Tensor,
    windows: Tensor,
    *,
    weights: tuple[float, ...] = BOX_WEIGHTS,
) -> Tensor:
    """Return ``1 - GIoU`` of the boxes (Rezatofighi et al., arXiv 1902.09630), summed: 0..2 each.

    Args:
        deltas, target_deltas: offsets of `box_coder.encode_boxes`, (F, 4).
        windows: (F, 4) ``(x0, y0, x1, y1)`` in pixels.
        weights: of `box_coder`.

    Example:
        >>> giou_loss(torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([[0.0, 0.0, 44.0, 44.0]]))
        tensor(0.)
    """
    # Not torchvision's: it indexes by a mask, for which the host waits for a GPU.
    boxes, targets = (decode_boxes(d, windows, weights) for d in (deltas, target_deltas))
    intersection, union = _overlap(boxes, targets)
    width, height = _enclosing(boxes, targets)
    hull = width * height
    giou = intersection / (union + _TINY) - (hull - union) / (hull + _TINY)
    return (1 - giou).sum()


def diou_loss(
    deltas: Tensor,
    target_deltas: Tensor,
    windows: Tensor,
    *,
    weights: tuple[float, ...] = BOX_WEIGHTS,
) -> Tensor:
    """Return ``1 - DIoU`` of the boxes (Zheng et al., arXiv 1911.08287), summed: 0..2 each.

    The arguments are those of `giou_loss`.
    """
    boxes, targets = (decode_boxes(d, windows, weights) for d in (deltas, target_deltas))
    width, height = _enclosing(boxes, targets)
    offset = (boxes[:, :2] + boxes[:, 2:] - targets[:, :2] - targets[:, 2:]) / 2
    distance = offset.square().sum(1) / (width.square() + height.square() + _TINY)
    return (1 - box_ious(boxes, targets) + distance).sum()


def box_ious(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the IoU (K,) of each box (K, 4) with the other one of its row.

    Example:
        >>> box_ious(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0, 2.0]]))
        tensor([0.3333])
    """
    intersection, union = _overlap(boxes, others)
    return intersection / (union + _TINY)


def _overlap(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the areas of the intersection and the union of each row, (K,) each."""
    low = torch.maximum(boxes[:, :2], others[:, :2])
    width, height = (torch.minimum(boxes[:, 2:], others[:, 2:]) - low).clamp(min=0).unbind(1)
    intersection = width * height
    return intersection, _area(boxes) + _area(others) - intersection


def _enclosing(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the width and height (K,) of the smallest box around both of a row."""
    low = torch.minimum(boxes[:, :2], others[:, :2])
    width, height = (torch.maximum(boxes[:, 2:], others[:, 2:]) - low).unbind(1)
    return width, height


def _area(boxes: Tensor) -> Tensor:
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    return width * height
