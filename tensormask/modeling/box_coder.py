"""Boxes as offsets from windows (Girshick et al., arXiv 1311.2524), and back."""

import math

import torch
from torch import Tensor

# A predicted box is at most this many times as large as its window: exp() stays finite.
_MAX_LOG_SCALE = math.log(1000.0 / 16)


def encode_boxes(boxes: Tensor, windows: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Offsets ``(dx, dy, dw, dh)`` times weights (K, 4), from windows (K, 4) to boxes (K, 4)."""
    size, center = _size_and_center(boxes)
    window_size, window_center = _size_and_center(windows)
    offset = (center - window_center) / window_size
    log_scale = torch.log(size / window_size)
    return torch.cat([offset, log_scale], dim=1) * boxes.new_tensor(weights)


def decode_boxes(deltas: Tensor, windows: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Boxes (K, 4) from offsets and windows: the inverse of `encode_boxes`, scales clamped."""
    window_size, window_center = _size_and_center(windows)
    deltas = deltas.to(windows.dtype) / windows.new_tensor(weights)
    center = deltas[:, :2] * window_size + window_center
    half = deltas[:, 2:].clamp(max=_MAX_LOG_SCALE).exp() * window_size / 2
    return torch.cat([center - half, center + half], dim=1)


def _size_and_center(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = boxes[:, 2:] - boxes[:, :2]
    return size, boxes[:, :2] + size / 2
