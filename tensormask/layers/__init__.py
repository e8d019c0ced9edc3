"""Tensors in, tensors out: the paper's 4D-tensor operation; masks into windows and back."""

from ._native import op_backend
from .masks import crop_masks, paste_masks, paste_regions
from .swap_align2nat import SwapAlign2Nat, swap_align2nat, swap_align2nat_at

__all__ = [
    "SwapAlign2Nat",
    "crop_masks",
    "op_backend",
    "paste_masks",
    "paste_regions",
    "swap_align2nat",
    "swap_align2nat_at",
]
