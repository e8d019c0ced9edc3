"""Optimizer, learning rate schedule, gradient clipping and averages of weights, as in detectron2.

The `build_*` functions are the only readers of their `SOLVER` keys.
"""

import itertools
import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tensormask.config import CfgNode
from tensormask.config.changes import warmup_iterations
from tensormask.layers.norm import LayerNorm2d
from tensormask.utils.errors import UserError

logger = logging.getLogger(__name__)

NORM_MODULES = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm,
    nn.LocalResponseNorm, nn.RMSNorm, LayerNorm2d,
)  # fmt: skip

_OPTIONS = (
    *("BASE_LR", "BIAS_LR_FACTOR", "MOMENTUM"),
    *("WEIGHT_DECAY", "WEIGHT_DECAY_NORM", "WEIGHT_DECAY_BIAS"),
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

    As in detectron2: parameters of norm modules get `weight_decay_norm`; then parameters named
    `bias`, also those of norm modules, get `weight_decay_bias` and `bias_lr_factor`. None does not
    change the decay. A shared parameter is assigned once, by its first module.

    Returns:
        Optimizer groups `{"params", "lr", "weight_decay"}` in order of their first parameters.

    Example:
        >>> groups = parameter_groups(nn.Linear(2, 1), lr=0.1, weight_decay=0.5, bias_lr_factor=2)
        >>> [(group["lr"], group["weight_decay"]) for group in groups]
        [(0.1, 0.5), (0.2, 0.5)]
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
    """Build the optimizer `SOLVER.OPTIMIZER` for the trainable parameters of `model`.

    Raises:
        UserError: an unknown optimizer, a negative or infinite option of it, Nesterov's momentum
            without momentum, or a model without trainable parameters.
    """
    solver = cfg.SOLVER
    for key in _OPTIONS:
        if solver[key] is not None and not 0 <= solver[key] < math.inf:
            raise UserError(f"SOLVER.{key} is {solver[key]}; it must be 0 or more, and finite")
    if solver.OPTIMIZER == "SGD" and solver.NESTEROV and solver.MOMENTUM == 0:
        raise UserError("SOLVER.NESTEROV is True, but SOLVER.MOMENTUM is 0: set one of them")
    lr = solver.BASE_LR
    groups = parameter_groups(
        model,
        lr=lr,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
    )
    if not groups:
        raise UserError("The model has no trainable parameter: lower MODEL.BACKBONE.FREEZE_AT")
    if solver.OPTIMIZER == "SGD":
        return torch.optim.SGD(groups, lr=lr, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    if solver.OPTIMIZER == "AdamW":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    raise UserError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; it must be 'SGD' or 'AdamW'")


def multi_step_factor(iteration: int, steps: Sequence[int], gamma: float) -> float:
    """Return `gamma` to the power of the number of `steps` (ascending) reached at `iteration`.

    Example:
        >>> [multi_step_factor(iteration, [3], 0.1) for iteration in (2, 3)]
        [1.0, 0.1]
    """
    return gamma ** bisect_right(steps, iteration)


def cosine_factor(iteration: int, max_iter: int, end_factor: float) -> float:
    """Return a half cosine that decreases from 1 at iteration 0 to `end_factor` at `max_iter`."""
    return end_factor + 0.5 * (1 - end_factor) * (1 + math.cos(math.pi * iteration / max_iter))


def with_warmup(
    factor: Callable[[int], float], *, iterations: int, start_factor: float, method: str
) -> Callable[[int], float]:
    """Replace the first `iterations` of a schedule by a warm-up.

    A linear warm-up increases from `start_factor` times the schedule's first value to the value
    that the schedule has at the end of the warm-up. A constant one keeps its start value.

    Raises:
        UserError: `method` is neither "linear" nor "constant".
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
    """Build the schedule `SOLVER.LR_SCHEDULER_NAME`, which is stepped every iteration.

    The learning rate of each group is multiplied by the same factor. Steps at or after `MAX_ITER`
    are ignored with a warning. A warm-up that does not end before `MAX_ITER` gets a warning, too.
    A `WARMUP_SHARE` above 0 counts instead of `WARMUP_ITERS`.

    Raises:
        UserError: an unknown name or warm-up method, steps that are not positive and ascending, a
            `MAX_ITER` below 1, a `WARMUP_SHARE` that is not in 0..1, or a `BASE_LR_END` outside 0
            to `BASE_LR`.
    """
    solver, max_iter = cfg.SOLVER, cfg.SOLVER.MAX_ITER
    if max_iter < 1:
        raise UserError(f"SOLVER.MAX_ITER is {max_iter}; it must be at least 1")
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        steps = _steps_before(solver.STEPS, max_iter)
        factor = partial(multi_step_factor, steps=steps, gamma=solver.GAMMA)
    elif solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        if not 0 <= solver.BASE_LR_END <= solver.BASE_LR:
            raise UserError(
                f"SOLVER.BASE_LR_END is {solver.BASE_LR_END}; "
                f"it must be from 0 to SOLVER.BASE_LR, {solver.BASE_LR}"
            )
        end_factor = solver.BASE_LR_END / (solver.BASE_LR or 1)
        factor = partial(cosine_factor, max_iter=max_iter, end_factor=end_factor)
    else:
        raise UserError(
            f"SOLVER.LR_SCHEDULER_NAME is {solver.LR_SCHEDULER_NAME!r}; "
            "it must be 'WarmupMultiStepLR' or 'WarmupCosineLR'"
        )
    if not 0 <= solver.WARMUP_SHARE < 1:
        raise UserError(
            f"SOLVER.WARMUP_SHARE is {solver.WARMUP_SHARE}; it must be from 0 to below 1, the "
            "warm-up's share of SOLVER.MAX_ITER: 0.03 for 3 %"
        )
    iterations = warmup_iterations(solver.WARMUP_SHARE, solver.WARMUP_ITERS, max_iter)
    if solver.WARMUP_SHARE > 0:
        logger.info(
            "SOLVER.WARMUP_SHARE %g: a warm-up of %d iterations, whatever WARMUP_ITERS is (%d)",
            *(solver.WARMUP_SHARE, iterations, solver.WARMUP_ITERS),
        )
    warmed = with_warmup(
        factor,
        iterations=min(iterations, max_iter),
        start_factor=solver.WARMUP_FACTOR,
        method=solver.WARMUP_METHOD,
    )
    highest = max(warmed(0), warmed(max_iter - 1))  # of a warm-up without end
    if iterations >= max_iter and highest < factor(0):
        logger.warning(
            "SOLVER.WARMUP_ITERS %d is not below SOLVER.MAX_ITER %d: the learning rate is at most "
            "%.3g, and never BASE_LR, %.3g. Decrease WARMUP_ITERS; 0 switches the warm-up off",
            *(iterations, max_iter, solver.BASE_LR * highest, solver.BASE_LR),
        )
    return LambdaLR(optimizer, warmed)


def _steps_before(steps: Sequence[int], max_iter: int) -> list[int]:
    if list(steps) != sorted(set(steps)) or any(step <= 0 for step in steps):
        raise UserError(f"SOLVER.STEPS is {tuple(steps)}; the steps must be ascending, above 0")
    reached = [step for step in steps if step < max_iter]
    if len(reached) < len(steps):
        logger.warning(
            "SOLVER.STEPS %s: those at or after SOLVER.MAX_ITER %d are ignored",
            *(tuple(steps), max_iter),
        )
    return reached


def build_gradient_clipper(cfg: CfgNode) -> GradientClipper:
    """Build the function that clips gradients according to `SOLVER.CLIP_GRADIENTS`.

    "value" limits each element, "norm" the norm of each parameter's gradient, "full_model" the norm
    of all gradients together.

    Returns:
        A function that clips the gradients of parameters in place. It returns the 2-norm of all
        gradients before clipping, a scalar tensor on their device, also if clipping is off.

    Raises:
        UserError: an unknown `CLIP_TYPE`.
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
            norm = total_norm if norm_type == 2 else nn.utils.get_total_norm(gradients, norm_type)
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        elif clip.ENABLED:
            for parameter in parameters:
                nn.utils.clip_grad_norm_(parameter, limit, norm_type)
        return total_norm

    return clip_gradients


def build_ema(cfg: CfgNode, model: nn.Module) -> AveragedModel | None:
    """Build the moving averages of a model's weights, `SOLVER.EMA`; None if they are off.

    After each step, an average becomes `DECAY * average + (1 - DECAY) * weight`. The weights after
    the first step are the first averages. Statistics of batch norms are averaged as well. With
    `WARMUP`, the decay of the update after n others is at most `(1 + n) / (10 + n)`, as in
    TensorFlow's `ExponentialMovingAverage`: averages over about a tenth of the steps so far.

    Raises:
        UserError: a decay outside 0 to 1.
    """
    ema = cfg.SOLVER.EMA
    if not ema.ENABLED:
        return None
    if not 0 <= ema.DECAY < 1:
        raise UserError(f"SOLVER.EMA.DECAY is {ema.DECAY}; it must be from 0 to below 1")
    average = _warmed_average(ema.DECAY) if ema.WARMUP else get_ema_multi_avg_fn(ema.DECAY)
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True).requires_grad_(False)


def _warmed_average(decay: float) -> Callable[..., None]:
    def average(averages: Sequence[Tensor], values: Sequence[Tensor], num_averaged: Tensor) -> None:
        n = int(num_averaged)  # on the CPU
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averages, values, num_averaged)

    return average


@torch.no_grad()
def update_averages(averages: AveragedModel, model: nn.Module) -> None:
    """Update moving averages as their `update_parameters` does, without waiting for a GPU.

    That method copies the number of updates to it, which these averages do not need.
    """
    if averages.multi_avg_fn is None or averages.n_averaged == 0:
        averages.update_parameters(model)
        return
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for average, value in zip(_tensors(averages.module), _tensors(model), strict=True):
        own, new = by_dtype.setdefault(average.dtype, ([], []))
        own.append(average.detach())
        new.append(value.detach())
    for own, new in by_dtype.values():
        averages.multi_avg_fn(own, new, averages.n_averaged)
    averages.n_averaged += 1


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())
