"""Test-time augmentation (`TEST.AUG`): detect in several sizes of an image, and merge."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou, roi_align

from tensormask.config import CfgNode
from tensormask.data.augmentation import resized_size
from tensormask.data.geometry import Geometry, transform_image
from tensormask.data.transforms import image_to_tensor
from tensormask.modeling import TensorMask
from tensormask.modeling.inputs import check_length, size_of
from tensormask.utils.errors import UserError

logger = logging.getLogger(__name__)

Detection = dict[str, Any]  # of `TensorMask.detect`


class AugmentedDetector(nn.Module):
    """Detect in several sizes of each image, also flipped, and merge the detections.

    As detectron2's `GeneralizedRCNNWithTTA`: the given image is resized, the detections of all
    inputs, each with the limit on their number, go through one more NMS, and masks are means.
    There, each input gives a mask for every box that remains. Here masks belong to windows: see
    `merge`.

    One input is in the model at a time, and merged with those before it: memory is that of the
    largest input, and of twice the masks of one.

    Args:
        model: detects in each input.
        min_sizes: shorter sides of the inputs in pixels.
        max_size: the upper limit of their longer sides; it makes an input smaller.
        flip: also detect in the flip of each input, left to right.

    Raises:
        UserError: a size is not positive, or there is none.
    """

    def __init__(
        self, model: TensorMask, *, min_sizes: Sequence[int], max_size: int, flip: bool
    ) -> None:
        super().__init__()
        check_sizes(min_sizes, max_size)
        self.model, self.min_sizes, self.max_size = model, tuple(min_sizes), max_size
        self.flips = ("none", "horizontal") if flip else ("none",)

    def forward(
        self,
        images: list[Tensor],
        output_sizes: list[tuple[int, int]] | None = None,
        **options: Any,
    ) -> list[Detection]:
        """Return what `TensorMask.detect` returns; arguments and errors are its, too.

        Images are uint8.
        """
        if output_sizes is not None:
            check_length("output_sizes", output_sizes, images)
        sizes = output_sizes or list(map(size_of, images))
        return [self._detect(*pair, options) for pair in zip(images, sizes, strict=True)]

    def _detect(self, image: Tensor, size: tuple[int, int], options: dict[str, Any]) -> Detection:
        rgb, old_size = image.permute(1, 2, 0).cpu().numpy(), size_of(image)
        agnostic, limit = map(options.get, ("class_agnostic_nms", "num_detections"))
        merged: Detection = {}
        for min_size in self.min_sizes:
            new_size = resized_size(old_size, min_size, self.max_size)
            for flip in self.flips:
                augmented = transform_image(rgb, Geometry(old_size, new_size, flip))
                (found,) = self.model.detect([image_to_tensor(augmented)], [size], **options)
                found = found if flip == "none" else mirrored(found, size[1])
                merged = merge(
                    [merged, found] if merged else [found],
                    self.model.nms_threshold,
                    class_agnostic=self.model.class_agnostic_nms if agnostic is None else agnostic,
                    num_detections=self.model.num_detections if limit is None else limit,
                )
        del merged["weights"]
        return merged


def check_sizes(min_sizes: Sequence[int], max_size: int) -> None:
    """Raise UserError unless there are sizes, in pixels."""
    if not min_sizes or min((*min_sizes, max_size)) < 1:
        raise UserError(
            f"TEST.AUG.MIN_SIZES is {tuple(min_sizes)} and MAX_SIZE {max_size}: give one size or "
            "more, and 1 pixel or more"
        )


def build_augmented_detector(cfg: CfgNode, model: nn.Module) -> AugmentedDetector | None:
    """Return the detector of `TEST.AUG`; None if it is off, or for a model of another kind.

    Raises:
        UserError: a size is not positive, or there is none.
    """
    options = cfg.TEST.AUG
    if not options.ENABLED:
        return None
    if not isinstance(model, TensorMask):
        logger.warning("TEST.AUG is for a TensorMask: a %s has no such test", type(model).__name__)
        return None
    return AugmentedDetector(
        model, min_sizes=options.MIN_SIZES, max_size=options.MAX_SIZE, flip=options.FLIP
    )


def mirrored(found: Detection, width: int) -> Detection:
    """Return the detections of an image from those of its mirror image, `width` pixels wide."""
    result = dict(found)
    for name in ("boxes", "windows"):
        if name in found:
            x0, y0, x1, y1 = found[name].unbind(1)
            result[name] = torch.stack([width - x1, y0, width - x0, y1], dim=1)
    if "window_masks" in found:
        result["window_masks"] = [mask.flip(1) for mask in found["window_masks"]]
    return result


def merge(
    parts: Sequence[Detection], nms_threshold: float, *, class_agnostic: bool, num_detections: int
) -> Detection:
    """Merge the detections of several inputs by NMS, best first.

    The mask of one that remains is the mean of its own and of those that NMS has removed for it,
    resampled to its window and weighted by their scores, or if they are merged ones, by `weights`.

    Returns:
        Detections with `weights (K,)`, the sum of the weights in their masks, if these have masks.
    """
    parts = [{**part, "weights": part.get("weights", part["scores"])} for part in parts]
    names = [name for name in parts[0] if name != "window_masks"]
    every = {name: torch.cat([part[name] for part in parts]) for name in names}
    boxes, scores, labels = every["boxes"], every["scores"], every["labels"]
    groups = torch.zeros_like(labels) if class_agnostic else labels
    kept = batched_nms(boxes, scores, groups, nms_threshold)[:num_detections]
    merged: Detection = {name: value[kept] for name, value in every.items()}
    if "window_masks" not in parts[0]:
        return merged
    merged["window_masks"] = []
    if len(kept):
        overlap = box_iou(boxes[kept], boxes).where(groups[kept, None] == groups, 0.0)
        iou, owner = overlap.max(dim=0)
        owner = torch.where(iou > nms_threshold, owner, -1)
        owner[kept] = torch.arange(len(kept), device=owner.device)
        masks = [mask for part in parts for mask in part["window_masks"]]
        weights = every["weights"].where(owner >= 0, 0.0)
        sums = torch.zeros_like(merged["weights"])
        merged["weights"] = sums.index_add_(0, owner.clamp(min=0), weights)
        shares = weights / merged["weights"][owner]
        merged["window_masks"] = _weighted_sums(masks, every["windows"], kept, owner, shares)
    return merged


def _weighted_sums(
    masks: list[Tensor], windows: Tensor, kept: Tensor, owner: Tensor, shares: Tensor
) -> list[Tensor]:
    """Return the sums of masks, resampled to the windows of the detections `kept (N,)`.

    Args:
        masks, windows: of all K detections.
        owner: int64 (K,), the index into `kept` that each mask counts for, or -1.
        shares: the factor (K,) of each mask.
    """
    sides = torch.tensor([mask.shape[::-1] for mask in masks], device=windows.device)
    low, high = windows.view(-1, 2, 2).unbind(1)
    onto = windows[kept].view(-1, 2, 2)[owner]
    # The window of the owner in pixels of each mask; a sample at the center of each of its pixels.
    rois = ((onto - low[:, None]) * (sides / (high - low))[:, None]).view(-1, 4)
    shapes = [masks[row].shape for row in kept.tolist()]
    sums = [torch.zeros(shape, dtype=shares.dtype, device=shares.device) for shape in shapes]
    for row, index in enumerate(owner.tolist()):
        if index >= 0:
            mask, roi = masks[row][None, None], [rois[row : row + 1]]
            of_row = roi_align(mask, roi, shapes[index], sampling_ratio=1, aligned=True)[0, 0]
            sums[index] += shares[row] * of_row
    return sums
