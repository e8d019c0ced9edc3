"""What a model makes of an image: scores of its windows, and their masks in two representations.

docs/representation.md explains the two. Masks are logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tensormask.layers import nat2align
from tensormask.modeling import TensorMask
from tensormask.modeling.inference import Kept, suppress, to_frame, with_boxes_of_masks
from tensormask.modeling.mask_head import MaskHead


class Seen(NamedTuple):
    """What a model makes of one image, in pixels of the network's input."""

    features: list[Tensor]  # per level (1, C, H, W)
    scores: list[Tensor]  # per level (S, H, W), of the best class at the windows of each size
    threshold: float  # a window fires where its score is above
    kept: Kept  # the detections above the threshold, after NMS, best first

    def fired(self, level: int, size: int) -> Tensor:
        """Places (y, x) of the windows that fire, int64 (F, 2)."""
        return (self.scores[level][size] > self.threshold).nonzero()

    def kept_at(self, level: int, size: int) -> Kept:
        """The detections of a level and size, best first."""
        return self.kept[(self.kept.level == level) & (self.kept.size == size)]


def look(model: TensorMask, image: Tensor, threshold: float) -> Seen:
    """Run `model`, in eval mode, on one image.

    Args:
        model: any TensorMask; its own score threshold is not used.
        image (Tensor[3, H, W]): as of `TensorMask.forward`.
        threshold: score in 0..1, below 1.
    """
    dense = features, logits, _ = model.dense([image])
    candidates = model.candidates(dense, 0, threshold)
    boxes = candidates.boxes
    if model.nms_on == "masks":
        (candidates,), (boxes,) = with_boxes_of_masks(
            model.mask_head, features, [candidates], replace=model.head.bbox_pred is None
        )
    kept = suppress(candidates, boxes, model.nms_threshold, model.num_detections)
    size = tuple(image.shape[-2:])
    scores = [
        level[0].float().unflatten(0, (model.windows.num_sizes, -1)).amax(1).sigmoid()
        for level in logits
    ]
    return Seen(features, scores, threshold, to_frame(kept, size, size))


def natural_masks(
    mask_head: MaskHead, features: list[Tensor], level: int, size: int, places: Tensor
) -> Tensor:
    """The natural view ``F(:, :, y, x)`` of chosen windows of one image.

    Args:
        features: as of `Seen`.
        places (Tensor[K, 2]): int64 rows ``(y, x)``.

    Returns:
        Tensor[K, V, U].
    """
    places = places.to(features[level].device)
    windows = torch.cat([torch.zeros_like(places[:, :1]), places], dim=1)
    (masks,) = mask_head(features, [(level, size, windows)])
    return masks.float()


def aligned_tensor(mask_head: MaskHead, features: list[Tensor], level: int, size: int) -> Tensor:
    """The aligned view of a level: all of ``A(v, u, y, x)``.

    For aligned heads it is what they predict, before it is upscaled or swapped: upscale heads have
    fewer (V, U) than the natural view, and on the bipyramid (H, W) are those of the finest level.
    For natural heads it is the natural tensor turned by `layers.nat2align`.

    Returns:
        Tensor[V, U, H, W].
    """
    if mask_head.aligned:
        finest = mask_head.mask_subnet(features[0]) if mask_head.bipyramid else None
        (masks,) = mask_head.mask_pred[size](mask_head.level_features(features, level, finest))
        side = round(len(masks) ** 0.5)
        return masks.unflatten(0, (side, side)).float()
    grid = features[level].shape[-2:]
    every = torch.ones(grid).nonzero()
    masks = natural_masks(mask_head, features, level, size, every)
    return nat2align(masks.permute(1, 2, 0).unflatten(2, grid))


def aligned_units(mask_head: MaskHead, level: int) -> tuple[int, float]:
    """How the aligned view of a level is read.

    Returns:
        - the steps of its (H, W) from one window of the level to the next, and
        - ``alpha``, a step of its (V, U) in steps of its (H, W).

        The window at ``(y, x)`` reads its mask's pixel ``(v, u)`` steps from the middle at
        ``(steps * y + alpha * v, steps * x + alpha * u)``.
    """
    steps = mask_head.lambdas[level]
    return steps, steps * (mask_head.upscale if mask_head.aligned else 1.0)
