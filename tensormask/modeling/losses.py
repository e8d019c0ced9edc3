"""The three losses, as sums over the batch (paper, sec. 5.3; detectron2's constants)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


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
    exchanged.

    Args:
        logits_per_level: floating tensors of any shape.
        positives: per level an index (a tuple of int64 tensors) of the logits whose target is 1,
            without repeats.
        alpha: weight of the positive logits; the others have ``1 - alpha``.
        gamma: steepness.
    """
    total = 0
    for logits, index in zip(logits_per_level, positives, strict=True):
        positive = gamma * logits[index].float()
        background = F.softplus(gamma * logits.float()).sum() - F.softplus(positive).sum()
        total = total + (1 - alpha) * background + alpha * F.softplus(-positive).sum()
    return total / gamma


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
