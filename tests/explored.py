"""An inspected image, and its masks from predictions of 4 bits, for tests of the explorer."""

import tiny
import torch
from torch import Tensor

from tensormask.layers import swap_align2nat, up_align2nat, up_bilinear
from tensormask.visualization import explorer

HEIGHT, WIDTH = 72, 100  # not multiples of the strides


def inspected(head: str, opts=()):
    model = tiny.with_detections(tiny.build(head, opts))
    with torch.no_grad():
        return model.inspect(tiny.make_image(HEIGHT, WIDTH), score_threshold=0.3)


def quantised(tensor: Tensor) -> Tensor:
    """What codes of a tensor stand for, as logits."""
    return torch.tensor(explorer.CODE_LOGITS)[explorer.mask_codes(tensor).long()]


def all_masks(mask_head, level: int, predicted: Tensor) -> Tensor:
    """The masks of all windows from the prediction (V, U, H, W), by the definitions."""
    if mask_head.bipyramid:
        upsampled = mask_head.upsampled(predicted.flatten(0, 1)[None])
        (masks,) = swap_align2nat(upsampled, mask_head.lambdas[level])
        side = len(predicted) * mask_head.lambdas[level]
        return masks.unflatten(0, (side, side))
    if mask_head.aligned:
        return up_align2nat(predicted, mask_head.upscale, mode=mask_head.upscale_mode)
    return up_bilinear(predicted, mask_head.upscale)
