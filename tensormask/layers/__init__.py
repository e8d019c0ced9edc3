"""Tensors in, tensors out: the paper's 4D-tensor operations; masks into windows and back.

The composition that defines swap_align2nat is ``representation.swap_align2nat``; the name here is
the operation that the model runs, compiled where it can be.
"""

from tensormask.layers._native import op_backend
from tensormask.layers.masks import crop_masks, mask_boxes, paste_masks, paste_regions
from tensormask.layers.representation import (
    UPSCALE_MODES,
    align2nat,
    nat2align,
    subsample,
    up_align2nat,
    up_align2nat_at,
    up_bilinear,
    up_nearest,
)
from tensormask.layers.swap_align2nat import SwapAlign2Nat, swap_align2nat, swap_align2nat_at

__all__ = [
    "UPSCALE_MODES",
    "SwapAlign2Nat",
    "align2nat",
    "crop_masks",
    "mask_boxes",
    "nat2align",
    "op_backend",
    "paste_masks",
    "paste_regions",
    "subsample",
    "swap_align2nat",
    "swap_align2nat_at",
    "up_align2nat",
    "up_align2nat_at",
    "up_bilinear",
    "up_nearest",
]
