"""Losses of classes whose targets are qualities: of a positive window the IoU of its box.

The score of a window then also says how well its box fits, so that NMS keeps the best box of an
object. Each loss is a sum over the batch.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tensormask.layers._transforms import is_eager, is_transformed
from tensormask.modeling.losses import at_least_float32, dense_chunks, is_channels_last


def quality_focal_loss(
    logits_per_level: list[Tensor],
    positives: list[tuple[Tensor, ...]],
    qualities: list[Tensor],
    *,
    beta: float = 2.0,
) -> Tensor:
    """Return the Quality Focal Loss, summed: ``|q - p|^beta * BCE(p, q)``, with q = 0 elsewhere.

    Source: Li et al., arXiv 2006.04388.

    Args:
        logits_per_level, positives: of `losses.focal_loss_star`.
        qualities: per level the targets q of the positive logits, floating, 0..1.
        beta: steepness.

    Returns:
        Tensor[]: float32, or float64 for such logits.

    Example:
        >>> positive, quality = (torch.tensor([0]),), torch.tensor([1.0])
        >>> quality_focal_loss([torch.tensor([0.0, -9.0])], [positive], [quality])  # log(2) / 4
        tensor(0.1733)
    """

    def of_positive(logits: Tensor, quality: Tensor) -> Tensor:
        error = (quality - logits.sigmoid()).abs()
        return error.pow(beta) * (F.softplus(logits) - quality * logits)

    return _loss(logits_per_level, positives, qualities, of_positive, alpha=1.0, gamma=beta)


def varifocal_loss(
    logits_per_level: list[Tensor],
    positives: list[tuple[Tensor, ...]],
    qualities: list[Tensor],
    *,
    alpha: float = 0.75,
    gamma: float = 2.0,
) -> Tensor:
    """Return the varifocal loss, summed: ``q * BCE(p, q)``, or ``alpha * p^gamma * BCE(p, 0)``.

    Source: Zhang et al., arXiv 2008.13367. The arguments are those of `quality_focal_loss`, and
    ``alpha`` and ``gamma``, weight and steepness of the background, where q = 0.

    Example:
        >>> positive, quality = (torch.tensor([0]),), torch.tensor([0.5])
        >>> varifocal_loss([torch.tensor([0.0, -9.0])], [positive], [quality])  # log(2) / 2
        tensor(0.3466)
    """

    def of_positive(logits: Tensor, quality: Tensor) -> Tensor:
        loss = quality * (F.softplus(logits) - quality * logits)
        return torch.where(quality > 0, loss, alpha * _background(logits, gamma))

    return _loss(logits_per_level, positives, qualities, of_positive, alpha=alpha, gamma=gamma)


def _loss(
    logits_per_level: list[Tensor],
    positives: list[tuple[Tensor, ...]],
    qualities: list[Tensor],
    of_positive: Callable[[Tensor, Tensor], Tensor],
    *,
    alpha: float,
    gamma: float,
) -> Tensor:
    """Sum ``alpha * p^gamma * BCE(p, 0)`` over the background, and the loss of the positives."""
    split: Any = _split
    if not is_transformed(*logits_per_level):
        split = _Split.apply
        logits_per_level = [x if is_channels_last(x) else x.contiguous() for x in logits_per_level]
    background, positive = zip(
        *(split(x, gamma, *index) for x, index in zip(logits_per_level, positives, strict=True)),
        strict=True,
    )
    quality = torch.cat(qualities).to(positive[0].dtype)
    return alpha * sum(background) + of_positive(torch.cat(positive), quality).sum()


def _background(logits: Tensor, gamma: float) -> Tensor:
    return logits.sigmoid().pow(gamma) * F.softplus(logits)


def _split(logits: Tensor, gamma: float, *index: Tensor) -> tuple[Tensor, Tensor]:
    """Return the background's ``p^gamma * BCE(p, 0)``, summed, and the logits at the index."""
    logits = at_least_float32(logits)
    positive = logits[index]
    return _background(logits, gamma).sum() - _background(positive, gamma).sum(), positive


class _Split(torch.autograd.Function):
    """`_split` that saves the logits only, and computes on a CPU in chunks, as `losses` does.

    The positives are returned, so that their loss is one of a few values, for autograd: each pass
    needs one tensor as large as the logits at most.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gamma: float, *index: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, *index)
        ctx.gamma = gamma
        sums = [_background(at_least_float32(x), gamma).sum() for x in dense_chunks(logits)]
        positive = at_least_float32(logits[index])
        return torch.stack(sums).sum() - _background(positive, gamma).sum(), positive

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_positive: Tensor) -> tuple[Tensor | None, ...]:
        logits, *index = ctx.saved_tensors
        index = tuple(index)
        none = None, *(None for _ in index)
        if torch.is_grad_enabled() or not is_eager(grad):
            out = _derivative(at_least_float32(logits), ctx.gamma) * grad
            return out.index_put(index, grad_positive).to(logits.dtype), *none
        out = torch.empty_like(logits)  # of equal strides, because the logits are dense
        for chunk, out_chunk in zip(dense_chunks(logits), dense_chunks(out), strict=True):
            out_chunk.copy_(_derivative(at_least_float32(chunk), ctx.gamma).mul_(grad))
        out[index] = grad_positive.to(out.dtype)
        return out, *none


def _derivative(logits: Tensor, gamma: float) -> Tensor:
    """Return the derivative of `_background`."""
    p = logits.sigmoid()
    return p.pow(gamma) * (gamma * (1 - p) * F.softplus(logits) + p)
