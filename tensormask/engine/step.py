"""One training step: forward and backward pass, gradient clipping, update of the weights."""

import contextlib
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from tensormask.engine.anomaly import check_losses, gradients_error
from tensormask.engine.distributed import get_world_size, mean_over_ranks, unwrap
from tensormask.engine.precision import Autocast, may_skip
from tensormask.engine.solver import GradientClipper, update_averages
from tensormask.layers.masks import to_device


@dataclass
class TrainState:
    """The state of training, which a step updates and a checkpoint saves."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler  # disabled: changes nothing
    ema: AveragedModel | None = None  # moving averages of the model's weights


def train_step(
    state: TrainState,
    batch: list[dict],
    *,
    iteration: int,
    clip_gradients: GradientClipper,
    autocast: Autocast = contextlib.nullcontext,
    accumulate_steps: int = 1,
    flags: dict[str, bool] | None = None,
) -> dict[str, float]:
    """Train one step on a batch.

    The host waits for a GPU once: after the backward pass it reads the losses, the norm of the
    gradients and the flags, before the weights are changed. A loss scale is read as well.

    With `accumulate_steps`, the model processes the batch in this number of equal parts, one after
    the other, and so needs memory for one part only. The gradient is the mean of the parts'
    gradients. It equals the gradient of the undivided batch if all parts have the same number of
    positive windows, by which the losses of a part are divided. If the numbers differ, all parts
    have the same weight, so that a window has more weight in a part with fewer positive windows.
    Batch norm uses the statistics of each part.

    Args:
        state: is updated in place.
        batch: samples, dicts with `image (3, H, W)`, `target` (as for the model) and `file_name`.
        iteration: its index, for error messages.
        clip_gradients: see `solver.build_gradient_clipper`.
        autocast: makes the context of the forward pass and the losses.
        accumulate_steps: number of parts.
        flags: of this rank, by name. Those that any rank has set are set in place, in all ranks.

    Returns:
        Means over the parts of the losses, and their sum `total_loss`; the learning rate `lr` of
        the step; `grad_norm`, the 2-norm of all gradients before clipping; `forward_time`,
        `backward_time` and `optimizer_time` in seconds (a GPU is still busy after the last); with
        float16 `loss_scale`. If the loss scale is too large, `grad_norm` is infinite or NaN, and
        the weights are not changed.

    Raises:
        ValueError: the batch cannot be divided into equal parts.
        NonFiniteError: a loss or the gradient is NaN or infinite; the weights are not changed.
    """
    if len(batch) % accumulate_steps:
        raise ValueError(
            f"{len(batch)} images cannot be divided into accumulate_steps = {accumulate_steps} "
            "equal parts"
        )
    size = len(batch) // accumulate_steps
    parts = [batch[first : first + size] for first in range(0, len(batch), size)]
    optimizer, scaler = state.optimizer, state.scaler
    losses_per_part: list[dict[str, Tensor]] = []
    optimizer.zero_grad()
    clock = Stopwatch()
    for number, part in enumerate(parts, start=1):
        with _gradient_sync(state.model, enabled=number == len(parts)):
            with autocast():
                losses = state.model([s["image"] for s in part], [s["target"] for s in part])
            losses_per_part.append({name: value.detach() for name, value in losses.items()})
            clock.lap("forward_time")
            scaler.scale(sum(losses.values()) / len(parts)).backward()
        clock.lap("backward_time")

    scaler.unscale_(optimizer)
    norm = clip_gradients([p for g in optimizer.param_groups for p in g["params"]])
    values_per_part, grad_norm = _read(losses_per_part, norm, {} if flags is None else flags)
    clock.lap("backward_time")  # with the wait for the end of the backward pass
    sums: dict[str, float] = {}
    for values, part in zip(values_per_part, parts, strict=True):
        check_losses(values, iteration, part)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value
    is_finite = math.isfinite(grad_norm)
    if not is_finite and not may_skip(scaler):
        raise gradients_error(unwrap(state.model), iteration, batch)
    lr = optimizer.param_groups[0]["lr"]
    if is_finite:
        optimizer.step()  # the scaler's step would read again that the gradients are finite
    else:
        scaler.step(optimizer)
    scaler.update()
    state.scheduler.step()
    if state.ema is not None:
        update_averages(state.ema, unwrap(state.model))
    clock.lap("optimizer_time")
    means = {name: value / len(parts) for name, value in sums.items()}
    metrics = {"total_loss": sum(means.values()), **means, "lr": lr, "grad_norm": grad_norm}
    if scaler.is_enabled():
        metrics["loss_scale"] = scaler.get_scale()
    return metrics | clock.seconds


class Stopwatch:
    """Sum the seconds between laps by the names of the laps.

    Attributes:
        seconds: total of each name.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def _read(
    losses_per_part: list[dict[str, Tensor]], grad_norm: Tensor, flags: dict[str, bool]
) -> tuple[list[dict[str, float]], float]:
    """Read the losses of each part and the norm of the gradients from their device, in one copy.

    The losses are means over all ranks, so that all ranks log and stop alike.
    """
    values = torch.stack([loss for losses in losses_per_part for loss in losses.values()])
    if flags and get_world_size() > 1:
        own = torch.tensor([float(flag) for flag in flags.values()], dtype=values.dtype)
        values = torch.cat([values, to_device(own, values.device)])
    values = mean_over_ranks(values)
    *numbers, norm = torch.cat([values, grad_norm.to(values.device).view(1)]).tolist()
    remaining = iter(numbers)
    read = [{name: next(remaining) for name in losses} for losses in losses_per_part]
    flags.update((name, value > 0) for name, value in zip(list(flags), remaining, strict=False))
    return read, norm


def _gradient_sync(model: nn.Module, *, enabled: bool) -> contextlib.AbstractContextManager:
    """Let the backward pass average the sum of the gradients over the ranks, or only add to it."""
    if not enabled and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()
