"""Tensors in, tensors out: the paper's operations on 4D tensors, and masks cropped and pasted.

`swap_align2nat` here is the operation that the model runs, compiled where possible; the
composition that the paper defines it by is ``representation.swap_align2nat``.
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
