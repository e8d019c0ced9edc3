"""The losses of a batch: objects are assigned to windows, and the outputs compared there.

FL* for classes, L1 for boxes, binary cross-entropy for masks (paper, sec. 5.3), each a sum over the
batch, with detectron2's constants. `Criterion` applies them, or others.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormask.layers import crop_masks
from tensormask.layers._transforms import is_eager, is_transformed
from tensormask.layers.masks import to_device
from tensormask.modeling.assignment import Assignment, assign
from tensormask.modeling.box_coder import BOX_WEIGHTS, encode_boxes
from tensormask.modeling.head import ClassBoxHead, DenseOutputs
from tensormask.modeling.inputs import size_of
from tensormask.modeling.mask_head import MaskHead
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError

Assigner = Callable[[list[Tensor], Windows, list[tuple[int, int]]], Assignment]
Normalizer = float | Callable[[int], Tensor | float]
ClsLoss = Callable[[list[Tensor], list[tuple[Tensor, ...]]], Tensor]
BoxLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
MaskLoss = Callable[[Tensor, Tensor], Tensor]
# Values that a CPU processes at a time: 1 MB of float32, which fits its caches.
_CHUNK = 1 << 18
# Mask pixels of an image that are floating on a GPU at once: 512 MB.
_MAX_FLOATING = 1 << 27


def focal_loss_star(
    logits_per_level: list[Tensor],
    positives: list[tuple[Tensor, ...]],
    *,
    alpha: float = 0.3,
    gamma: float = 3.0,
) -> Tensor:
    """Return FL*, summed: ``-alpha_t * log(sigmoid(gamma * x * (2t - 1))) / gamma``.

    Source: Lin et al., arXiv 1708.02002, appendix, with detectron2's alpha.
    No one-hot target is made: every logit is counted as background, then the positive ones are
    corrected. The backward pass keeps the logits only.

    Args:
        logits_per_level: floating tensors of any shape and strides. Contiguous and channels_last
            ones are not copied.
        positives: per level an index (a tuple of int64 tensors) of the logits whose target is 1,
            without repeats.
        alpha: weight of the positive logits; the others have ``1 - alpha``.
        gamma: steepness.

    Returns:
        Tensor[]: float32, or float64 for such logits.

    Example:
        >>> positive = (torch.tensor([0]),)
        >>> focal_loss_star([torch.tensor([2.0, -1.0])], [positive])
        tensor(0.0116)
    """
    loss: Any = _formula
    if not is_transformed(*logits_per_level):
        loss = _FocalLossStar.apply
        logits_per_level = [x if _is_channels_last(x) else x.contiguous() for x in logits_per_level]
    levels = zip(logits_per_level, positives, strict=True)
    return sum(loss(logits, alpha, gamma, *index) for logits, index in levels)


def _formula(logits: Tensor, alpha: float, gamma: float, *index: Tensor) -> Tensor:
    """FL* of a level, in operations that every transform supports."""
    everywhere = _at_least_float32(logits) * gamma
    positive = everywhere[index]
    background = F.softplus(everywhere).sum() - F.softplus(positive).sum()
    return ((1 - alpha) * background + alpha * F.softplus(-positive).sum()) / gamma


class _FocalLossStar(torch.autograd.Function):
    """FL* of a level. The derivative by a logit is a sigmoid, so only the logits are saved.

    Both passes read the logits once, on a CPU in chunks that stay in its caches. A backward pass
    that is to be differentiated again, or that is compiled, is a plain formula.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, alpha: float, gamma: float, *index: Tensor) -> Tensor:
        ctx.save_for_backward(logits, *index)
        ctx.alpha, ctx.gamma = alpha, gamma
        chunks = (_at_least_float32(chunk) * gamma for chunk in _chunks(logits))
        everywhere = torch.stack([F.softplus(chunk).sum() for chunk in chunks]).sum()
        positive = _at_least_float32(logits[index]) * gamma
        background = everywhere - F.softplus(positive).sum()
        return ((1 - alpha) * background + alpha * F.softplus(-positive).sum()) / gamma

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, *index = ctx.saved_tensors
        index = tuple(index)
        if torch.is_grad_enabled() or not is_eager(grad):
            dense = _at_least_float32(logits) * ctx.gamma
            positive = torch.sigmoid(-dense[index]) * (-ctx.alpha * grad)
            out = (dense.sigmoid() * ((1 - ctx.alpha) * grad)).index_put(index, positive)
            return out.to(logits.dtype), None, None, *(None for _ in index)
        out = torch.empty_like(logits)  # of equal strides, because the logits are dense
        factor = (1 - ctx.alpha) * grad
        for chunk, out_chunk in zip(_chunks(logits), _chunks(out), strict=True):
            out_chunk.copy_((_at_least_float32(chunk) * ctx.gamma).sigmoid_().mul_(factor))
        positive = _at_least_float32(logits[index]) * ctx.gamma
        out[index] = (torch.sigmoid(-positive) * (-ctx.alpha * grad)).to(out.dtype)
        return out, None, None, *(None for _ in index)


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Split a contiguous or channels_last tensor into 1-dimensional views, in memory order."""
    row = (x.permute(0, 2, 3, 1) if _is_channels_last(x) else x).view(-1)
    return row.split(_CHUNK if row.device.type == "cpu" else max(1, len(row)))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def box_loss(deltas: Tensor, target_deltas: Tensor, windows: Tensor | None = None) -> Tensor:
    """Return the L1 distance of offsets (F, 4), summed.

    Another loss of boxes may need the ``windows`` (F, 4) in pixels: `box_coder.decode_boxes` makes
    boxes of them and the offsets.

    Example:
        >>> box_loss(torch.zeros(1, 4), torch.ones(1, 4))
        tensor(4.)
    """
    return F.l1_loss(_at_least_float32(deltas), target_deltas, reduction="sum")


def mask_loss(logits: Tensor, target_masks: Tensor, *, positive_weight: float = 1.5) -> Tensor:
    """Return the binary cross-entropy of masks (F, V, U): the mean of each mask, summed over masks.

    ``positive_weight`` is the weight of the pixels of the object.

    Example:
        >>> mask_loss(torch.zeros(2, 15, 15), torch.zeros(2, 15, 15, dtype=torch.bool))
        tensor(1.3863)
    """
    logits = _at_least_float32(logits)
    # On the CPU also for a GPU, which gets it as a number.
    weight = torch.tensor(positive_weight, dtype=logits.dtype)
    loss = F.binary_cross_entropy_with_logits(
        logits, target_masks.to(logits.dtype), reduction="sum", pos_weight=weight
    )
    return loss / (logits.shape[-1] * logits.shape[-2])


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
    box_loss: BoxLoss
    mask_loss: MaskLoss
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
            `focal_loss_star`.
        box_loss: of the offsets of the F positive windows, those of their objects, and the windows
            ``(x0, y0, x1, y1)`` in pixels, (F, 4) each, as `box_loss`.
        mask_loss: of mask logits and bool targets (F, V, U), for the positive windows of one level
            and size at a time, as `mask_loss`.
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
        cls_loss: ClsLoss = focal_loss_star,
        box_loss: BoxLoss = box_loss,
        mask_loss: MaskLoss = mask_loss,
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
        prepared = self.prepare(targets, list(map(size_of, dense.logits)), head.num_classes)
        assignment = prepared.assignment
        num_positives = len(assignment.object)
        divisor = normalizer(num_positives) if callable(normalizer) else normalizer
        *index, objects = to_device(prepared.indices, device)
        target_deltas, boxes = to_device(prepared.boxes, device)

        positives = [tuple(column[rows] for column in index) for rows in assignment.levels()]
        result = {"loss_cls": self.cls_loss(dense.logits, positives) / divisor}
        if head.with_boxes:
            columns = assignment.image, assignment.size, assignment.y, assignment.x
            deltas_per_level = [
                head.deltas_at(dense, level, *(column[rows] for column in columns))
                for level, rows in enumerate(assignment.levels())
            ]
            loss_box = self.box_loss(torch.cat(deltas_per_level), target_deltas, boxes)
            result["loss_box_reg"] = loss_box / divisor
        if mask_head is not None:
            masks = [t["masks"] for t in targets]
            loss_mask = self._mask_loss(
                mask_head, dense.features, assignment, masks, objects, boxes
            )
            result["loss_mask"] = loss_mask / divisor
        return result

    def prepare(
        self, targets: list[dict[str, Tensor]], grids: list[tuple[int, int]], num_classes: int
    ) -> PreparedTargets:
        """Return the part of the losses that needs no outputs, computed on the CPU.

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

    def _mask_loss(
        self,
        mask_head: MaskHead,
        features: list[Tensor],
        assignment: Assignment,
        masks: list[Tensor],
        objects: Tensor,
        boxes: Tensor,
    ) -> Tensor:
        """Return the mask loss of the positive windows, summed and weighted.

        ``objects`` and ``boxes`` are those of the assignment, on the device of the model.
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
        per_group = []
        for (level, size, at), logits in zip(groups, logits_per_group, strict=True):
            split = assignment.counts[level][size]  # by image
            per_image = zip(masks, objects[at].split(split), boxes[at].split(split), strict=True)
            target = torch.cat([crop_masks(*of_image, logits.shape[-1]) for of_image in per_image])
            per_group.append(self.mask_loss(logits, target))
        return self.mask_loss_weight * functools.reduce(torch.add, per_group)


def _to_crop(masks: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert masks on a GPU once for all groups, unless they take too much memory.

    On a CPU, those that a group uses are converted for it.
    """
    on_gpu = masks.device.type != "cpu"
    return masks.to(dtype) if on_gpu and masks.numel() <= _MAX_FLOATING else masks
