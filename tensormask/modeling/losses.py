"""The three losses, as sums over the batch (paper, sec. 5.3; detectron2's constants)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# Values that a CPU works on at once: 1 MB of float32, which its caches hold.
_PART = 1 << 18


def focal_loss_star(
    logits_per_level: list[Tensor],
    positives: list[tuple[Tensor, ...]],
    *,
    alpha: float = 0.3,
    gamma: float = 3.0,
) -> Tensor:
    """FL*, summed: ``-alpha_t * log(sigmoid(gamma * x * (2t - 1))) / gamma``.

    Source: Lin et al., arXiv 1708.02002, appendix, with detectron2's alpha.
    No one-hot target is made: every logit is counted as background, then the positive ones are
    exchanged. Of the background only the logits are kept for the backward pass.

    Args:
        logits_per_level: floating tensors of any shape.
        positives: per level an index (a tuple of int64 tensors) of the logits whose target is 1,
            without repeats.
        alpha: weight of the positive logits; the others have ``1 - alpha``.
        gamma: steepness.

    Returns:
        Tensor[]: float32, or float64 for such logits.
    """
    return sum(
        _FocalLossStar.apply(logits, alpha, gamma, *index)
        for logits, index in zip(logits_per_level, positives, strict=True)
    )


class _FocalLossStar(torch.autograd.Function):
    """FL* of a level. The derivative by a logit is a sigmoid: only the logits are kept for it.

    Both ways go through the logits once, on a CPU in parts that stay in its caches.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, alpha: float, gamma: float, *index: Tensor) -> Tensor:
        ctx.save_for_backward(logits, *index)
        ctx.alpha, ctx.gamma = alpha, gamma
        parts = (_at_least_float32(part) * gamma for part in _parts(_flat(logits)))
        everywhere = torch.stack([F.softplus(part).sum() for part in parts]).sum()
        positive = _at_least_float32(logits[index]) * gamma
        background = everywhere - F.softplus(positive).sum()
        return ((1 - alpha) * background + alpha * F.softplus(-positive).sum()) / gamma

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, *index = ctx.saved_tensors
        index = tuple(index)
        out = torch.empty_like(logits)  # in the memory format of the logits
        factor = (1 - ctx.alpha) * grad
        for part, out_part in zip(_parts(_flat(logits)), _parts(_flat(out)), strict=True):
            out_part.copy_((_at_least_float32(part) * ctx.gamma).sigmoid_().mul_(factor))
        positive = _at_least_float32(logits[index]) * ctx.gamma
        out[index] = (torch.sigmoid(-positive) * (-ctx.alpha * grad)).to(out.dtype)
        return out, None, None, *(None for _ in index)


def _flat(x: Tensor) -> Tensor:
    """A dense tensor as one row, in the order of its memory: a view, also of channels_last."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(-1)


def _parts(row: Tensor) -> tuple[Tensor, ...]:
    return row.split(_PART if row.device.type == "cpu" else max(1, len(row)))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def box_loss(deltas: Tensor, target_deltas: Tensor) -> Tensor:
    """L1 over offsets (F, 4), summed."""
    return F.l1_loss(deltas.float(), target_deltas, reduction="sum")


def mask_loss(logits: Tensor, target_masks: Tensor, *, positive_weight: float = 1.5) -> Tensor:
    """Binary cross-entropy of masks (F, V, U): the mean over each mask, summed over masks.

    ``positive_weight`` is the weight of the pixels of the object.
    """
    loss = F.binary_cross_entropy_with_logits(
        logits.float(),
        target_masks.float(),
        reduction="sum",
        pos_weight=torch.tensor(positive_weight, device=logits.device),
    )
    return loss / (logits.shape[-1] * logits.shape[-2])


def foreground_normalizer(num_foreground: int, device: torch.device) -> Tensor | int:
    """What the sums above are divided by: the foreground windows of the batch, at least 1.

    Where several processes have a part of the batch each, it is the same number in all of them:
    that of the whole batch, divided by the number of processes. Then the mean over the processes
    of a loss or gradient is that of one process with the whole batch.

    Args:
        num_foreground: of this process's part. With several processes, all must be here.
        device: where the sum over the processes is made, and comes back as a scalar.
    """
    if not dist.is_initialized():
        return max(1, num_foreground)
    total = torch.tensor(float(num_foreground), device=device)
    dist.all_reduce(total)
    return total.clamp(min=1) / dist.get_world_size()
