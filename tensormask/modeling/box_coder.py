"""Encode boxes as offsets from windows, and decode them (Girshick et al., arXiv 1311.2524)."""

import math

import torch
from torch import Tensor

from tensormask.layers._constants import constant

# Factors of the offsets (dx, dy, dw, dh): the paper's.
BOX_WEIGHTS = (1.5, 1.5, 0.75, 0.75)
# Limits a predicted box to 62.5 times the size of its window, so that exp() stays finite.
_MAX_LOG_SCALE = math.log(1000.0 / 16)


def encode_boxes(
    boxes: Tensor, windows: Tensor, weights: tuple[float, ...] = BOX_WEIGHTS
) -> Tensor:
    """Return the weighted offsets ``(dx, dy, dw, dh)`` (K, 4) from windows (K, 4) to boxes (K, 4).

    Example:
        >>> window = torch.tensor([[0.0, 0.0, 40.0, 40.0]])
        >>> encode_boxes(window + 10, window, (1.0, 1.0, 1.0, 1.0))
        tensor([[0.2500, 0.2500, 0.0000, 0.0000]])
    """
    size, center = _size_and_center(boxes)
    window_size, window_center = _size_and_center(windows)
    offset = (center - window_center) / window_size
    log_scale = torch.log(size / window_size)
    return torch.cat([offset, log_scale], dim=1) * constant(weights, boxes.dtype, boxes.device)


def decode_boxes(
    deltas: Tensor, windows: Tensor, weights: tuple[float, ...] = BOX_WEIGHTS
) -> Tensor:
    """Return boxes (K, 4) from offsets: the inverse of `encode_boxes`, with limited sizes.

    Example:
        >>> decode_boxes(torch.zeros(1, 4), torch.tensor([[0.0, 0.0, 40.0, 40.0]]))
        tensor([[ 0.,  0., 40., 40.]])
    """
    window_size, window_center = _size_and_center(windows)
    deltas = deltas.to(windows.dtype) / constant(weights, windows.dtype, windows.device)
    center = deltas[:, :2] * window_size + window_center
    half = deltas[:, 2:].clamp(max=_MAX_LOG_SCALE).exp() * window_size / 2
    return torch.cat([center - half, center + half], dim=1)


def _size_and_center(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = boxes[:, 2:] - boxes[:, :2]
    return size, boxes[:, :2] + size / 2
