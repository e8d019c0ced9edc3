"""The losses of a batch: objects are assigned to windows, and the outputs compared there."""

import functools
from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor, nn

from tensormask.layers import crop_masks
from tensormask.layers.masks import to_device
from tensormask.modeling import losses
from tensormask.modeling.assignment import Assignment, assign
from tensormask.modeling.box_coder import BOX_WEIGHTS, encode_boxes
from tensormask.modeling.head import ClassBoxHead, DenseOutputs
from tensormask.modeling.inputs import size_of
from tensormask.modeling.mask_head import MaskHead
from tensormask.modeling.windows import Windows

Assigner = Callable[[list[Tensor], Windows, list[tuple[int, int]]], Assignment]
Normalizer = float | Callable[[int], Tensor | float]


class CriterionOptions(TypedDict, total=False):
    """The options of `Criterion`."""

    assigner: Assigner
    cls_loss: Callable[[list[Tensor], list[tuple[Tensor, ...]]], Tensor]
    box_loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    mask_loss: Callable[[Tensor, Tensor], Tensor]
    mask_loss_weight: float
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
            `losses.focal_loss_star`.
        box_loss: of the offsets of the F positive windows, those of their objects, and the windows
            ``(x0, y0, x1, y1)`` in pixels, (F, 4) each, as `losses.box_loss`.
        mask_loss: of mask logits and bool targets (F, V, U), for the positive windows of one level
            and size at a time, as `losses.mask_loss`.
        mask_loss_weight: factor of the mask loss.
        box_weights: factors of the offsets ``(dx, dy, dw, dh)``.

    Example:
        A loss of the boxes' overlap:

        >>> from torchvision.ops import generalized_box_iou_loss
        >>> from tensormask.modeling import TensorMask, decode_boxes
        >>> def box_loss(deltas, target_deltas, windows):
        ...     boxes, targets = (decode_boxes(d, windows) for d in (deltas, target_deltas))
        ...     return generalized_box_iou_loss(boxes, targets, reduction="sum")
        >>> model = TensorMask.build(depth=18, num_classes=3, box_loss=box_loss)
    """

    def __init__(
        self,
        windows: Windows,
        *,
        assigner: Assigner = assign,
        cls_loss: Callable[[list[Tensor], list[tuple[Tensor, ...]]], Tensor] = (
            losses.focal_loss_star
        ),
        box_loss: Callable[[Tensor, Tensor, Tensor], Tensor] = losses.box_loss,
        mask_loss: Callable[[Tensor, Tensor], Tensor] = losses.mask_loss,
        mask_loss_weight: float = 2.0,
        box_weights: tuple[float, ...] = BOX_WEIGHTS,
    ) -> None:
        super().__init__()
        self.windows, self.assigner = windows, assigner
        self.cls_loss, self.box_loss, self.mask_loss = cls_loss, box_loss, mask_loss
        self.mask_loss_weight, self.box_weights = mask_loss_weight, tuple(box_weights)

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
        assignment = self.assign([t["boxes"] for t in targets], dense)
        image, y, x = assignment.image, assignment.y, assignment.x
        divisor = normalizer(len(assignment.object)) if callable(normalizer) else normalizer
        # Rows in the objects of the whole batch.
        first = image.new_tensor([0] + [len(t["boxes"]) for t in targets]).cumsum(0)
        objects = first[image] + assignment.object
        labels = torch.cat([t["labels"] for t in targets])[objects]

        channel = assignment.size * head.num_classes + labels
        index = to_device(torch.stack([image, channel, y, x]), device)
        positives = [tuple(index[:, rows]) for rows in assignment.levels()]
        result = {"loss_cls": self.cls_loss(dense.logits, positives) / divisor}
        if head.with_boxes:
            columns = (image, assignment.size, y, x)
            deltas_per_level = [
                head.deltas_at(dense, level, *(column[rows] for column in columns))
                for level, rows in enumerate(assignment.levels())
            ]
            boxes = torch.cat([t["boxes"] for t in targets])[objects]
            target_deltas = encode_boxes(boxes, assignment.boxes, self.box_weights)
            pair = to_device(torch.stack([target_deltas, assignment.boxes]), device)
            result["loss_box_reg"] = self.box_loss(torch.cat(deltas_per_level), *pair) / divisor
        if mask_head is not None:
            masks = [t["masks"] for t in targets]
            loss_mask = self._mask_loss(mask_head, dense.features, assignment, masks)
            result["loss_mask"] = loss_mask / divisor
        return result

    def assign(self, boxes_per_image: list[Tensor], dense: DenseOutputs) -> Assignment:
        """Assign objects to the windows of a batch."""
        return self.assigner(boxes_per_image, self.windows, list(map(size_of, dense.logits)))

    def _mask_loss(
        self,
        mask_head: MaskHead,
        features: list[Tensor],
        assignment: Assignment,
        masks: list[Tensor],
    ) -> Tensor:
        """Return the mask loss of the positive windows, summed and weighted."""
        windows = torch.stack([assignment.image, assignment.y, assignment.x], dim=1)
        windows = to_device(windows, features[0].device)
        groups = assignment.groups()
        # A size without positive windows gets an empty group on the coarsest level in use. Its loss
        # is 0 and gives its parameters gradients, so that momentum and weight decay still apply.
        level = groups[-1][0] if groups else self.windows.num_levels - 1
        absent = set(range(self.windows.num_sizes)) - {size for _, size, _ in groups}
        groups += [(level, size, slice(0, 0)) for size in sorted(absent)]
        logits_per_group = mask_head(features, [(k, s, windows[at]) for k, s, at in groups])
        per_group = []
        for (level, size, at), logits in zip(groups, logits_per_group, strict=True):
            split = assignment.counts[level][size]  # by image
            objects, boxes = assignment.object[at].split(split), assignment.boxes[at].split(split)
            per_image = zip(masks, objects, boxes, strict=True)
            target = torch.cat([crop_masks(*of_image, logits.shape[-1]) for of_image in per_image])
            per_group.append(self.mask_loss(logits, target))
        return self.mask_loss_weight * functools.reduce(torch.add, per_group)
