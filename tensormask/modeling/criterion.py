"""`Criterion`: objects are assigned to windows, and the outputs compared there (paper, sec. 5.3).

The losses are those of `losses`, or others.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormask.layers import crop_masks
from tensormask.layers.masks import to_device
from tensormask.modeling.assigners import Assigner
from tensormask.modeling.assignment import Assignment, assign
from tensormask.modeling.box_coder import BOX_WEIGHTS, decode_boxes, encode_boxes
from tensormask.modeling.box_losses import box_ious, box_loss
from tensormask.modeling.head import ClassBoxHead, DenseOutputs
from tensormask.modeling.inputs import size_of
from tensormask.modeling.losses import (
    at_least_float32,
    dice_loss,
    focal_loss_star,
    mask_ious,
    mask_loss,
)
from tensormask.modeling.mask_head import MaskHead
from tensormask.modeling.query import query_loss, query_targets
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError

Normalizer = float | Callable[[int], Tensor | float]
ClsLoss = Callable[[list[Tensor], list[tuple[Tensor, ...]]], Tensor]
QualityLoss = Callable[[list[Tensor], list[tuple[Tensor, ...]], list[Tensor]], Tensor]
BoxLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
MaskLoss = Callable[[Tensor, Tensor], Tensor]
# Mask pixels of an image that are floating on a GPU at once: 512 MB.
_MAX_FLOATING = 1 << 27


def foreground_normalizer(
    num_foreground: int,
    device: torch.device,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | int:
    """Return the divisor of the sums above: the foreground windows of the batch, at least 1.

    If several ranks have a part of the batch each, all get the number of the whole batch, divided
    by the number of ranks. The mean over the ranks of a loss or gradient then equals that of one
    process with the whole batch.

    ``num_foreground`` is that of this rank's part. ``sum_over_ranks`` returns the sum of a tensor
    on ``device`` over all ranks, which must all call it; None if this process has the whole batch.
    """
    if sum_over_ranks is None:
        return max(1, num_foreground)
    counts = to_device(torch.tensor([num_foreground, 1.0]), device)
    total, num_ranks = sum_over_ranks(counts)
    return total.clamp(min=1) / num_ranks


class PreparedTargets(NamedTuple):
    """What `Criterion` needs of the targets of a batch, for F positive windows; on the CPU."""

    assignment: Assignment
    indices: Tensor  # (5, F) int64: image, channel, row and column of a logit; object of the image
    boxes: Tensor  # (2, F, 4) float32: offsets of the objects; windows


class CriterionOptions(TypedDict, total=False):
    """The options of `Criterion`."""

    assigner: Assigner
    cls_loss: ClsLoss
    quality_loss: QualityLoss | None
    box_loss: BoxLoss
    mask_loss: MaskLoss
    box_loss_weight: float
    mask_loss_weight: float
    dice_loss_weight: float
    mask_iou_loss_weight: float
    box_weights: tuple[float, ...]


class Criterion(nn.Module):
    """The losses of `TensorMask`. Each is a sum over windows, to be divided by their number.

    A loss that is an `nn.Module` is a part of the model, with its parameters.

    Args:
        windows: geometry of the sliding windows.
        assigner: from the boxes of each image, the windows, and the grid ``(H, W)`` of each level
            to the positive windows, as `assign`. `Assignment.make` and `Assignment.select` return
            what it has to.
        cls_loss: of the logits per level and the indices of the positive ones, as
            `focal_loss_star`.
        quality_loss: used instead of ``cls_loss``; also of the IoUs per level of the boxes of the
            positive windows with their objects, as `quality_losses.quality_focal_loss`. It needs
            a box head.
        box_loss: of the offsets of the F positive windows, those of their objects, and the windows
            ``(x0, y0, x1, y1)`` in pixels, (F, 4) each, as `box_loss`.
        mask_loss: of mask logits and bool targets (F, V, U), for the positive windows of one level
            and size at a time, as `mask_loss`.
        box_loss_weight, mask_loss_weight: factors of these losses.
        dice_loss_weight: factor of `losses.dice_loss`, which is added; it is not computed if 0.
        mask_iou_loss_weight: factor of the loss of a head's predicted IoUs of masks: binary
            cross-entropy with the IoU of the mask as target.
        box_weights: factors of the offsets ``(dx, dy, dw, dh)``.

    Example:
        >>> from tensormask.modeling import TensorMask, quality_focal_loss
        >>> model = TensorMask.build(
        ...     depth=18, num_classes=3, quality_loss=quality_focal_loss, dice_loss_weight=1.0
        ... )
    """

    def __init__(
        self,
        windows: Windows,
        *,
        assigner: Assigner = assign,
        cls_loss: ClsLoss = focal_loss_star,
        quality_loss: QualityLoss | None = None,
        box_loss: BoxLoss = box_loss,
        mask_loss: MaskLoss = mask_loss,
        box_loss_weight: float = 1.0,
        mask_loss_weight: float = 2.0,
        dice_loss_weight: float = 0.0,
        mask_iou_loss_weight: float = 1.0,
        box_weights: tuple[float, ...] = BOX_WEIGHTS,
    ) -> None:
        super().__init__()
        self.windows, self.assigner = windows, assigner
        self.cls_loss, self.quality_loss = cls_loss, quality_loss
        self.box_loss, self.mask_loss = box_loss, mask_loss
        self.box_loss_weight, self.box_weights = box_loss_weight, tuple(box_weights)
        self.mask_loss_weight, self.dice_loss_weight = mask_loss_weight, dice_loss_weight
        self.mask_iou_loss_weight = mask_iou_loss_weight

    def forward(
        self,
        dense: DenseOutputs,
        targets: list[dict[str, Tensor]],
        head: ClassBoxHead,
        mask_head: MaskHead | None,
        normalizer: Normalizer,
    ) -> dict[str, Tensor]:
        """Return the losses of `TensorMask.forward`.

        Args:
            targets: of `inputs.checked_target`.
            normalizer: the divisor of the losses, or a function that returns it for the number of
                positive windows.
        """
        device = dense.logits[0].device
        grids = list(map(size_of, dense.logits))
        prepared = self.prepare(targets, grids, head.num_classes)
        assignment = prepared.assignment
        num_positives = len(assignment.object)
        divisor = normalizer(num_positives) if callable(normalizer) else normalizer
        *index, objects = to_device(prepared.indices, device)
        target_deltas, boxes = to_device(prepared.boxes, device)

        levels = assignment.levels()
        positives = [tuple(column[rows] for column in index) for rows in levels]
        result: dict[str, Tensor] = {}
        iou_logits: Tensor | None = None
        if self.quality_loss is None:
            result["loss_cls"] = _loss_of_classes(self.cls_loss, dense, positives) / divisor
        if head.with_boxes:
            columns = assignment.image, assignment.size, assignment.y, assignment.x
            outputs_per_level = [
                head.outputs_at(dense, level, *(column[rows] for column in columns))
                for level, rows in enumerate(levels)
            ]
            deltas = torch.cat(outputs_per_level)
            if head.mask_iou:
                deltas, iou_logits = deltas[:, :4], deltas[:, 4]
            loss_box = self.box_loss(deltas, target_deltas, boxes)
            if self.quality_loss is not None:
                ious = self._ious(deltas.detach(), target_deltas, boxes)
                qualities = [ious[rows] for rows in levels]
                loss = _loss_of_classes(self.quality_loss, dense, positives, qualities)
                result["loss_cls"] = loss / divisor
            result["loss_box_reg"] = self.box_loss_weight * loss_box / divisor
        if dense.query is not None:
            targets_of_query = to_device(query_targets(assignment), device)
            result["loss_query"] = query_loss(dense.query, targets_of_query) / divisor
        if mask_head is not None:
            masks = [t["masks"] for t in targets]
            losses = self._mask_losses(
                mask_head, dense.features, assignment, masks, objects, boxes, iou_logits
            )
            result.update((name, loss / divisor) for name, loss in losses.items())
        return result

    def prepare(
        self,
        targets: list[dict[str, Tensor]],
        grids: list[tuple[int, int]],
        num_classes: int,
    ) -> PreparedTargets:
        """Return the part of the losses that needs no gradient, computed on the CPU.

        Args:
            targets: of `inputs.checked_target`.
            grids: per level ``(H, W)``, rows and columns of windows.
            num_classes: of the model.
        """
        assignment = self.assign([t["boxes"] for t in targets], grids)
        image, y, x = assignment.image, assignment.y, assignment.x
        # Rows in the objects of the whole batch.
        first = image.new_tensor([0] + [len(t["boxes"]) for t in targets]).cumsum(0)
        objects = first[image] + assignment.object
        channel = assignment.size * num_classes + torch.cat([t["labels"] for t in targets])[objects]
        boxes = torch.cat([t["boxes"] for t in targets])[objects]
        target_deltas = encode_boxes(boxes, assignment.boxes, self.box_weights)
        return PreparedTargets(
            assignment,
            torch.stack([image, channel, y, x, assignment.object]),
            torch.stack([target_deltas, assignment.boxes]),
        )

    def assign(self, boxes_per_image: list[Tensor], grids: list[tuple[int, int]]) -> Assignment:
        """Assign objects to the windows of a batch, on grids ``(H, W)`` per level.

        Raises:
            UserError: an own assigner returned a window outside of the grid.
        """
        assignment = self.assigner(boxes_per_image, self.windows, grids)
        height, width = torch.tensor(grids)[assignment.level].unbind(1)
        if ((assignment.y >= height) | (assignment.x >= width)).any():
            raise UserError(f"the assigner returned windows outside of the grids (H, W) = {grids}")
        return assignment

    def _ious(self, deltas: Tensor, target_deltas: Tensor, windows: Tensor) -> Tensor:
        """Return the IoUs (F,) of predicted boxes and those of the objects."""
        boxes, targets = (
            decode_boxes(x, windows, self.box_weights) for x in (deltas, target_deltas)
        )
        return box_ious(boxes, targets)

    def _mask_losses(
        self,
        mask_head: MaskHead,
        features: list[Tensor],
        assignment: Assignment,
        masks: list[Tensor],
        objects: Tensor,
        boxes: Tensor,
        iou_logits: Tensor | None,
    ) -> dict[str, Tensor]:
        """Return the mask losses of the positive windows, summed and weighted.

        ``objects`` and ``boxes`` are those of the assignment, on the device of the model, and so
        are ``iou_logits`` (F,), if any.
        """
        # On the CPU, where the mask head chooses the tiles to compute.
        windows = torch.stack([assignment.image, assignment.y, assignment.x], dim=1)
        groups = assignment.groups()
        # A size without positive windows gets an empty group on the coarsest level in use. Its loss
        # is 0 and gives its parameters gradients, so that momentum and weight decay still apply.
        level = groups[-1][0] if groups else self.windows.num_levels - 1
        absent = set(range(self.windows.num_sizes)) - {size for _, size, _ in groups}
        groups += [(level, size, slice(0, 0)) for size in sorted(absent)]
        logits_per_group = mask_head(features, [(k, s, windows[at]) for k, s, at in groups])
        masks = [_to_crop(of_image, boxes.dtype) for of_image in masks]
        losses: dict[str, list[Tensor]] = {}
        ious = []
        for (level, size, at), logits in zip(groups, logits_per_group, strict=True):
            split = assignment.counts[level][size]  # by image
            per_image = zip(masks, objects[at].split(split), boxes[at].split(split), strict=True)
            target = torch.cat([crop_masks(*of_image, logits.shape[-1]) for of_image in per_image])
            losses.setdefault("loss_mask", []).append(self.mask_loss(logits, target))
            if self.dice_loss_weight:
                losses.setdefault("loss_dice", []).append(dice_loss(logits, target))
            if iou_logits is not None:
                ious.append(mask_ious(logits.detach(), target))
        if iou_logits is not None:
            # Sizes without windows are last, and empty: the order is that of the assignment.
            loss = F.binary_cross_entropy_with_logits(
                at_least_float32(iou_logits), torch.cat(ious), reduction="sum"
            )
            losses["loss_mask_iou"] = [loss]
        weights = {
            "loss_mask": self.mask_loss_weight,
            "loss_dice": self.dice_loss_weight,
            "loss_mask_iou": self.mask_iou_loss_weight,
        }
        return {
            name: weights[name] * functools.reduce(torch.add, per_group)
            for name, per_group in losses.items()
        }


def _loss_of_classes(
    loss: Callable[..., Tensor],
    dense: DenseOutputs,
    positives: list[tuple[Tensor, ...]],
    *qualities: list[Tensor],
) -> Tensor:
    """Return a `ClsLoss` or `QualityLoss`, with a sample of the finest level its estimate."""
    sample = dense.sample
    if sample is None:
        return loss(dense.logits, positives, *qualities)
    index = sample.rows_of(positives[0])
    of_all = loss([sample.certain, *dense.logits[1:]], [index, *positives[1:]], *qualities)
    none = [[x[0][:0]] for x in qualities]
    return of_all + sample.factor * loss([sample.drawn], [tuple(i[:0] for i in index)], *none)


def _to_crop(masks: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert masks on a GPU once for all groups, unless they take too much memory.

    On a CPU, those that a group uses are converted for it.
    """
    on_gpu = masks.device.type != "cpu"
    return masks.to(dtype) if on_gpu and masks.numel() <= _MAX_FLOATING else masks
