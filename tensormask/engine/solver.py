"""Optimiser, schedule, clipping and averages of weights, with detectron2's groups and numbers.

The `build_*` functions are the only readers of the config's `SOLVER` keys about them.
"""

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tensormask.config import CfgNode
from tensormask.utils.errors import UserError

logger = logging.getLogger(__name__)

NORM_MODULES = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)

GradientClipper = Callable[[Sequence[nn.Parameter]], Tensor]


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    weight_decay_norm: float | None = None,
    weight_decay_bias: float | None = None,
    bias_lr_factor: float = 1.0,
) -> list[dict]:
    """Group the trainable parameters by their learning rate and weight decay.

    The rule is detectron2's: a parameter of a norm module takes `weight_decay_norm`; after that a
    parameter named `bias`, of a norm module too, takes `weight_decay_bias` and `bias_lr_factor`.
    None leaves the decay as it is. A shared parameter counts once, where it is met first.

    Returns:
        Optimiser groups `{"params", "lr", "weight_decay"}` in the order in which they are met.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            group_lr, decay = lr, weight_decay
            if isinstance(module, NORM_MODULES) and weight_decay_norm is not None:
                decay = weight_decay_norm
            if name == "bias":
                group_lr = lr * bias_lr_factor
                decay = decay if weight_decay_bias is None else weight_decay_bias
            groups.setdefault((group_lr, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": group_lr, "weight_decay": decay}
        for (group_lr, decay), parameters in groups.items()
    ]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimiser that `SOLVER.OPTIMIZER` names over the trainable parameters of `model`.

    Raises:
        ValueError: an unknown optimiser, or a model in which nothing is trainable.
    """
    solver = cfg.SOLVER
    groups = parameter_groups(
        model,
        lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
    )
    if not groups:
        raise UserError("The model has no trainable parameter: lower MODEL.BACKBONE.FREEZE_AT")
    if solver.OPTIMIZER == "SGD":
        return torch.optim.SGD(
            groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV
        )
    if solver.OPTIMIZER == "AdamW":
        return torch.optim.AdamW(groups, lr=solver.BASE_LR, fused=True)
    raise UserError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; it must be 'SGD' or 'AdamW'")


def multi_step_factor(iteration: int, steps: Sequence[int], gamma: float) -> float:
    """Give `gamma` to the power of the number of `steps` (ascending) reached at `iteration`."""
    return gamma ** bisect_right(steps, iteration)


def cosine_factor(iteration: int, max_iter: int, end_factor: float) -> float:
    """Give the half cosine that falls from 1 at iteration 0 to `end_factor` at `max_iter`."""
    return end_factor + 0.5 * (1 - end_factor) * (1 + math.cos(math.pi * iteration / max_iter))


def with_warmup(
    factor: Callable[[int], float], *, iterations: int, start_factor: float, method: str
) -> Callable[[int], float]:
    """Put a warm-up in front of a schedule that counts its iterations from 0 all the same.

    A linear warm-up goes from `start_factor` times the schedule's first value to the value that
    the schedule has where the warm-up ends, so that there is no jump even past a step. A constant
    one stays at its start.

    Raises:
        ValueError: `method` is neither "linear" nor "constant".
    """
    if method not in ("linear", "constant"):
        raise UserError(f"SOLVER.WARMUP_METHOD is {method!r}; it must be 'linear' or 'constant'")
    start, end = start_factor * factor(0), factor(iterations)

    def warmed(iteration: int) -> float:
        if iteration >= iterations:
            return factor(iteration)
        if method == "constant":
            return start
        progress = iteration / iterations
        return start * (1 - progress) + end * progress

    return warmed


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Make the schedule that `SOLVER.LR_SCHEDULER_NAME` names; it is stepped every iteration.

    Every group's own learning rate is multiplied by the same factor. Steps at or after `MAX_ITER`
    never come to pass; they are dropped with a warning.

    Raises:
        ValueError: an unknown name or warm-up method, steps that do not ascend from above 0, a
            `MAX_ITER` below 1, or a `BASE_LR_END` outside 0 to `BASE_LR`.
    """
    solver = cfg.SOLVER
    max_iter = solver.MAX_ITER
    if max_iter < 1:
        raise UserError(f"SOLVER.MAX_ITER is {max_iter}; it must be at least 1")

    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        steps = _steps_before(solver.STEPS, max_iter)

        def factor(iteration: int) -> float:
            return multi_step_factor(iteration, steps, solver.GAMMA)

    elif solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        if not 0 <= solver.BASE_LR_END <= solver.BASE_LR:
            raise UserError(
                f"SOLVER.BASE_LR_END is {solver.BASE_LR_END}; "
                f"it must be from 0 to SOLVER.BASE_LR, {solver.BASE_LR}"
            )

        def factor(iteration: int) -> float:
            return cosine_factor(iteration, max_iter, solver.BASE_LR_END / solver.BASE_LR)

    else:
        raise UserError(
            f"SOLVER.LR_SCHEDULER_NAME is {solver.LR_SCHEDULER_NAME!r}; "
            "it must be 'WarmupMultiStepLR' or 'WarmupCosineLR'"
        )
    warmed = with_warmup(
        factor,
        iterations=min(solver.WARMUP_ITERS, max_iter),
        start_factor=solver.WARMUP_FACTOR,
        method=solver.WARMUP_METHOD,
    )
    return LambdaLR(optimizer, warmed)


def _steps_before(steps: Sequence[int], max_iter: int) -> list[int]:
    if list(steps) != sorted(set(steps)) or any(step <= 0 for step in steps):
        raise UserError(f"SOLVER.STEPS is {tuple(steps)}; the steps must be ascending, above 0")
    kept = [step for step in steps if step < max_iter]
    if len(kept) < len(steps):
        logger.warning(
            "SOLVER.STEPS %s: those at or after SOLVER.MAX_ITER %d are ignored",
            tuple(steps),
            max_iter,
        )
    return kept


def build_gradient_clipper(cfg: CfgNode) -> GradientClipper:
    """Make the function that limits the gradients as `SOLVER.CLIP_GRADIENTS` says.

    "value" limits each number, "norm" the norm of each parameter's gradient, "full_model" the norm
    of all gradients together. The function changes the gradients in place and returns the 2-norm
    of all of them before that, a scalar tensor on their device; it also does so where clipping is
    off, so that the norm can be watched.

    Raises:
        ValueError: an unknown `CLIP_TYPE`.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    limit, norm_type = clip.CLIP_VALUE, clip.NORM_TYPE
    if clip.CLIP_TYPE not in ("value", "norm", "full_model"):
        raise UserError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}; "
            "it must be 'value', 'norm' or 'full_model'"
        )

    def clip_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
        gradients = [p.grad for p in parameters if p.grad is not None]
        total_norm = nn.utils.get_total_norm(gradients)
        if clip.ENABLED and clip.CLIP_TYPE == "value":
            nn.utils.clip_grad_value_(parameters, limit)
        elif clip.ENABLED and clip.CLIP_TYPE == "full_model":
            nn.utils.clip_grad_norm_(parameters, limit, norm_type)
        elif clip.ENABLED:
            for parameter in parameters:
                nn.utils.clip_grad_norm_(parameter, limit, norm_type)
        return total_norm

    return clip_gradients


def build_ema(cfg: CfgNode, model: nn.Module) -> AveragedModel | None:
    """The moving averages of a model's weights that `SOLVER.EMA` asks for; None if it is off.

    After each step an average becomes `DECAY * average + (1 - DECAY) * weight`; the first step's
    weights are the first averages. The statistics of batch norms are averaged as well.

    Raises:
        ValueError: a decay outside 0 to 1.
    """
    ema = cfg.SOLVER.EMA
    if not ema.ENABLED:
        return None
    if not 0 <= ema.DECAY < 1:
        raise UserError(f"SOLVER.EMA.DECAY is {ema.DECAY}; it must be from 0 to below 1")
    averages = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema.DECAY), use_buffers=True)
    return averages.requires_grad_(False)
