"""The losses of classes, FL*, and of masks, binary cross-entropy or Dice (paper, sec. 5.3).

Each is a sum over the batch, with detectron2's constants.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tensormask.layers._transforms import is_eager, is_transformed

# Values that a CPU processes at a time: 1 MB of float32, which fits its caches.
_CHUNK = 1 << 18


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
        logits_per_level = [x if is_channels_last(x) else x.contiguous() for x in logits_per_level]
    levels = zip(logits_per_level, positives, strict=True)
    return sum(loss(logits, alpha, gamma, *index) for logits, index in levels)


def _formula(logits: Tensor, alpha: float, gamma: float, *index: Tensor) -> Tensor:
    """FL* of a level, in operations that every transform supports."""
    everywhere = at_least_float32(logits) * gamma
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
        chunks = (at_least_float32(chunk) * gamma for chunk in dense_chunks(logits))
        everywhere = torch.stack([F.softplus(chunk).sum() for chunk in chunks]).sum()
        positive = at_least_float32(logits[index]) * gamma
        background = everywhere - F.softplus(positive).sum()
        return ((1 - alpha) * background + alpha * F.softplus(-positive).sum()) / gamma

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, *index = ctx.saved_tensors
        index = tuple(index)
        if torch.is_grad_enabled() or not is_eager(grad):
            dense = at_least_float32(logits) * ctx.gamma
            positive = torch.sigmoid(-dense[index]) * (-ctx.alpha * grad)
            out = (dense.sigmoid() * ((1 - ctx.alpha) * grad)).index_put(index, positive)
            return out.to(logits.dtype), None, None, *(None for _ in index)
        out = torch.empty_like(logits)  # of equal strides, because the logits are dense
        factor = (1 - ctx.alpha) * grad
        for chunk, out_chunk in zip(dense_chunks(logits), dense_chunks(out), strict=True):
            out_chunk.copy_((at_least_float32(chunk) * ctx.gamma).sigmoid_().mul_(factor))
        positive = at_least_float32(logits[index]) * ctx.gamma
        out[index] = (torch.sigmoid(-positive) * (-ctx.alpha * grad)).to(out.dtype)
        return out, None, None, *(None for _ in index)


def is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def dense_chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Split a contiguous or channels_last tensor into 1-dimensional views, in memory order."""
    row = (x.permute(0, 2, 3, 1) if is_channels_last(x) else x).view(-1)
    return row.split(_CHUNK if row.device.type == "cpu" else max(1, len(row)))


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def mask_loss(logits: Tensor, target_masks: Tensor, *, positive_weight: float = 1.5) -> Tensor:
    """Return the binary cross-entropy of masks (F, V, U): the mean of each mask, summed over masks.

    ``positive_weight`` is the weight of the pixels of the object.

    Example:
        >>> mask_loss(torch.zeros(2, 15, 15), torch.zeros(2, 15, 15, dtype=torch.bool))
        tensor(1.3863)
    """
    logits = at_least_float32(logits)
    # On the CPU also for a GPU, which gets it as a number.
    weight = torch.tensor(positive_weight, dtype=logits.dtype)
    loss = F.binary_cross_entropy_with_logits(
        logits, target_masks.to(logits.dtype), reduction="sum", pos_weight=weight
    )
    return loss / (logits.shape[-1] * logits.shape[-2])


def mask_ious(logits: Tensor, target_masks: Tensor) -> Tensor:
    """Return the IoU (F,) of each predicted mask, where its logit is above 0, with its target.

    It is 0 if both are empty.

    Example:
        >>> target = torch.tensor([[[True, True, False]]])
        >>> mask_ious(torch.tensor([[[-1.0, 1.0, 1.0]]]), target)
        tensor([0.3333])
    """
    predicted = (logits > 0).flatten(1)
    target = target_masks.flatten(1)
    union = (predicted | target).sum(1).clamp(min=1)
    return (predicted & target).sum(1) / union


def dice_loss(logits: Tensor, target_masks: Tensor) -> Tensor:
    """Return the Dice loss of masks (F, V, U), 0..1 each, summed over masks.

    It is ``1 - (2 * sum(p * t) + 1) / (sum(p) + sum(t) + 1)`` for probabilities p and targets t: of
    the form of Milletari et al., arXiv 1606.04797, but with sums for sums of squares, and with one
    pixel more, so that a mask without pixels of the object has a gradient.

    Example:
        >>> dice_loss(torch.zeros(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool))  # 5 / 7
        tensor(0.2857)
    """
    probabilities = at_least_float32(logits).flatten(1).sigmoid()
    target = target_masks.flatten(1)
    # No product: of that, the backward pass would keep the targets as floating values.
    overlap = torch.where(target, probabilities, 0).sum(1)
    area = probabilities.sum(1) + target.sum(1)
    return (1 - (2 * overlap + 1) / (area + 1)).sum()
