"""Inspect a model on an image: window scores, detections, and masks in the two representations.

docs/representation.md explains the representations. Masks are logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tensormask.layers import nat2align
from tensormask.modeling import TensorMask
from tensormask.modeling.inference import Candidates, rescale_and_clip
from tensormask.modeling.mask_head import MaskHead


class WindowInspection(NamedTuple):
    """The windows of a model on one image, in pixels of the network's input."""

    features: list[Tensor]  # per level (1, C, H, W)
    scores: list[Tensor]  # per level (S, H, W), of the best class at the windows of each size
    threshold: float  # a window fires if its score is above
    detections: Candidates  # above the threshold, after NMS, best first

    def fired(self, level: int, size: int) -> Tensor:
        """Return the indices (y, x) of the windows that fire, int64 (F, 2)."""
        return (self.scores[level][size] > self.threshold).nonzero()

    def detections_at(self, level: int, size: int) -> Candidates:
        """Return the detections of a level and size, best first."""
        detections = self.detections
        return detections.select((detections.level == level) & (detections.size == size))


def inspect_image(model: TensorMask, image: Tensor, threshold: float) -> WindowInspection:
    """Run `model`, in eval mode, on one image.

    Args:
        model: any TensorMask; its own score threshold is not used.
        image (Tensor[3, H, W]): as of `TensorMask.forward`.
        threshold: score in 0..1, below 1.
    """
    dense = model.dense([image])
    (detections,) = model.find_detections(dense, threshold)
    size = image.shape[-2], image.shape[-1]
    scores = [
        level[0].float().unflatten(0, (model.windows.num_sizes, -1)).amax(1).sigmoid()
        for level in dense.logits
    ]
    detections = rescale_and_clip(detections, size, size)
    return WindowInspection(dense.features, scores, threshold, detections)


def natural_masks(
    mask_head: MaskHead, features: list[Tensor], level: int, size: int, indices: Tensor
) -> Tensor:
    """Return the natural view ``F(:, :, y, x)`` of some windows of one image, Tensor[K, V, U].

    Args:
        features: as of `WindowInspection`.
        indices (Tensor[K, 2]): int64 rows ``(y, x)``.
    """
    indices = indices.to(features[level].device)
    windows = torch.cat([torch.zeros_like(indices[:, :1]), indices], dim=1)
    (masks,) = mask_head(features, [(level, size, windows)])
    return masks.float()


def aligned_tensor(mask_head: MaskHead, features: list[Tensor], level: int, size: int) -> Tensor:
    """Return the aligned view of a level: all of ``A(v, u, y, x)``, Tensor[V, U, H, W].

    For aligned heads this is the head's prediction, before it is upscaled or swapped: upscale heads
    have a smaller (V, U) than the natural view, and on the bipyramid (H, W) are those of the finest
    level. For natural heads it is `layers.nat2align` of the natural view.
    """
    if mask_head.aligned:
        finest = mask_head.mask_subnet(features[0]) if mask_head.bipyramid else None
        (masks,) = mask_head.mask_pred[size](mask_head.level_features(features, level, finest))
        side = round(len(masks) ** 0.5)
        return masks.unflatten(0, (side, side)).float()
    grid = features[level].shape[-2:]
    masks = natural_masks(mask_head, features, level, size, torch.ones(grid).nonzero())
    return nat2align(masks.permute(1, 2, 0).unflatten(2, grid))


def aligned_units(mask_head: MaskHead, level: int) -> tuple[int, float]:
    """Return ``(steps, alpha)``, the units of a level's aligned view.

    Its (H, W) have ``steps`` steps between neighboring windows of the level, and ``alpha`` per step
    of its (V, U): the mask pixel ``(v, u)`` steps from the center of the window at ``(y, x)`` is at
    ``(steps * y + alpha * v, steps * x + alpha * u)``.
    """
    steps = mask_head.lambdas[level]
    return steps, steps * (mask_head.upscale if mask_head.aligned else 1.0)
