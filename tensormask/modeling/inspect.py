"""Inspect a model on an image: window scores, detections, and masks in the two representations.

`TensorMask.inspect` returns an `Inspection`. docs/representation.md explains the representations.
Masks are logits.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tensormask.layers import nat2align
from tensormask.modeling.assignment import Assignment
from tensormask.modeling.box_coder import decode_boxes
from tensormask.modeling.candidates import Candidates
from tensormask.modeling.head import DenseOutputs
from tensormask.modeling.mask_head import MaskHead
from tensormask.utils.errors import UserError


@dataclass(frozen=True)
class Inspection:
    """What a model makes of one image, in pixels of the network's input.

    S is the number of window sizes, (H, W) the grid of a level. Boxes and masks are computed when
    they are asked for.
    """

    model: Any  # the TensorMask
    dense: DenseOutputs
    threshold: float  # a window fires if its score is above
    detections: Candidates  # above the threshold, after NMS, best first: with level, size, y, x
    assignment: Assignment | None  # of the target's objects; None without a target

    @property
    def features(self) -> list[Tensor]:
        """Of the pyramid, per level (1, C, H, W)."""
        return self.dense.features

    @cached_property
    def class_scores(self) -> list[Tensor]:
        """Per level (S, num_classes, H, W)."""
        sizes = self.model.windows.num_sizes
        return [x[0].float().unflatten(0, (sizes, -1)).sigmoid() for x in self.dense.logits]

    @cached_property
    def scores(self) -> list[Tensor]:
        """Per level (S, H, W), of the best class of each window."""
        return [scores.amax(1) for scores in self.class_scores]

    def boxes(self, level: int) -> Tensor:
        """Return the boxes of all windows of a level, (S, H, W, 4); without a box head, windows."""
        model, features = self.model, self.features[level]
        grid = (model.windows.num_sizes, *features.shape[-2:])
        size, y, x = torch.ones(grid, device=features.device).nonzero().unbind(1)
        boxes = model.windows.boxes(torch.full_like(y, level), size, y, x)
        if model.head.with_boxes:
            deltas = model.head.deltas_at(self.dense, level, torch.zeros_like(y), size, y, x)
            boxes = decode_boxes(deltas.float(), boxes, model.criterion.box_weights)
        return boxes.view(*grid, 4)

    def masks(self, level: int, size: int) -> Tensor:
        """Return the mask logits of all windows of a level and size, (H, W, V, U): large."""
        if self.model.mask_head is None:
            raise UserError("the model has no mask head")
        grid = self.features[level].shape[-2:]
        indices = torch.ones(grid).nonzero()
        masks = natural_masks(self.model.mask_head, self.features, level, size, indices)
        return masks.unflatten(0, grid)

    def fired(self, level: int, size: int) -> Tensor:
        """Return the indices (y, x) of the windows that fire, int64 (F, 2)."""
        return (self.scores[level][size] > self.threshold).nonzero()

    def detections_at(self, level: int, size: int) -> Candidates:
        """Return the detections of a level and size, best first."""
        detections = self.detections
        return detections.select((detections.level == level) & (detections.size == size))


def natural_masks(
    mask_head: MaskHead, features: list[Tensor], level: int, size: int, indices: Tensor
) -> Tensor:
    """Return the natural view ``F(:, :, y, x)`` of some windows of one image, Tensor[K, V, U].

    Args:
        features: as of `Inspection`.
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
    level, upsampled to the unit of its masks. For natural heads it is `layers.nat2align` of the
    natural view.
    """
    if mask_head.aligned:
        masks = predicted_tensor(mask_head, features, level, size)
        (upsampled,) = mask_head.upsampled(masks.flatten(0, 1)[None])
        return upsampled.unflatten(0, masks.shape[:2])
    grid = features[level].shape[-2:]
    masks = natural_masks(mask_head, features, level, size, torch.ones(grid).nonzero())
    return nat2align(masks.permute(1, 2, 0).unflatten(2, grid))


def predicted_tensor(mask_head: MaskHead, features: list[Tensor], level: int, size: int) -> Tensor:
    """Return what the last convolution of the mask head predicts on a level, Tensor[V, U, H, W].

    It is aligned or natural, like the head, before it is upsampled, upscaled or swapped.
    """
    finest = mask_head.mask_subnet(features[0]) if mask_head.bipyramid else None
    (masks,) = mask_head.mask_pred[size](mask_head.level_features(features, level, finest))
    side = round(len(masks) ** 0.5)
    return masks.unflatten(0, (side, side)).float()


def aligned_units(mask_head: MaskHead, level: int) -> tuple[int, float]:
    """Return ``(steps, alpha)``, the units of a level's aligned view.

    Its (H, W) have ``steps`` steps between neighboring windows of the level, and ``alpha`` per step
    of its (V, U): the mask pixel ``(v, u)`` steps from the center of the window at ``(y, x)`` is at
    ``(steps * y + alpha * v, steps * x + alpha * u)``.
    """
    steps = mask_head.lambdas[level]
    return steps, steps * (mask_head.upscale if mask_head.aligned else 1.0)
