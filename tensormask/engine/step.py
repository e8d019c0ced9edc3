"""One step of training: forward, backward, clip, and what follows the new weights."""

import contextlib
import math
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from tensormask.engine.anomaly import gradients_error, read_losses
from tensormask.engine.distributed import mean_over_ranks, unwrap
from tensormask.engine.precision import Autocast, may_skip
from tensormask.engine.solver import GradientClipper
from tensormask.utils.errors import UserError


@dataclass
class TrainState:
    """What a step changes and a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler  # a disabled one hands everything through
    ema: AveragedModel | None = None  # moving averages of the model's weights


def train_step(
    state: TrainState,
    batch: list[dict],
    *,
    iteration: int,
    clip_gradients: GradientClipper,
    autocast: Autocast = contextlib.nullcontext,
    accumulate_steps: int = 1,
) -> dict[str, float]:
    """Do one step on a batch of samples.

    With `accumulate_steps` the batch goes through the model in so many equal parts, each of which
    leaves its activations behind before the next one comes. The gradient is the average of the
    parts' gradients. That is the gradient of the undivided batch where all parts have the same
    divisor: the losses are sums over a part divided by the number of windows that own an object in
    it. Where the numbers differ, each part counts the same, and so a window in a part with few of
    them counts more. Batch norm takes the statistics of each part.

    Returns:
        Means over the parts of the losses, and their sum `total_loss`; the learning rate `lr` of
        the step; `grad_norm`, the 2-norm of all gradients before clipping; `forward_time`,
        `backward_time` and `optimizer_time` in seconds (a GPU works on after the last); with
        float16 `loss_scale`. A step whose scale was too large has an infinite or NaN `grad_norm`
        and leaves the weights alone.

    Raises:
        ValueError: the batch does not divide into so many parts.
        NonFiniteError: a loss or the gradient is NaN or infinite; the weights have not changed.
    """
    if len(batch) % accumulate_steps:
        raise UserError(
            f"{len(batch)} images do not divide into {accumulate_steps} equal parts: change "
            "SOLVER.IMS_PER_BATCH or SOLVER.ACCUMULATE_STEPS"
        )
    size = len(batch) // accumulate_steps
    parts = [batch[first : first + size] for first in range(0, len(batch), size)]
    optimizer, scaler = state.optimizer, state.scaler
    sums: dict[str, float] = {}
    optimizer.zero_grad()
    clock = Stopwatch()
    for number, part in enumerate(parts, start=1):
        with _gradients_kept(state.model, until_last=number < len(parts)):
            with autocast():
                losses = state.model([s["image"] for s in part], [s["target"] for s in part])
            for name, value in _read(losses, iteration, part).items():
                sums[name] = sums.get(name, 0.0) + value
            clock.lap("forward_time")
            scaler.scale(sum(losses.values()) / len(parts)).backward()
        clock.lap("backward_time")

    scaler.unscale_(optimizer)
    grad_norm = float(clip_gradients([p for g in optimizer.param_groups for p in g["params"]]))
    clock.lap("backward_time")  # reading the norm has waited for the end of the backward pass
    if not math.isfinite(grad_norm) and not may_skip(scaler):
        raise gradients_error(unwrap(state.model), iteration, batch)
    lr = optimizer.param_groups[0]["lr"]
    scaler.step(optimizer)
    scaler.update()
    state.scheduler.step()
    if state.ema is not None:
        state.ema.update_parameters(unwrap(state.model))
    clock.lap("optimizer_time")
    means = {name: value / len(parts) for name, value in sums.items()}
    metrics = {"total_loss": sum(means.values()), **means, "lr": lr, "grad_norm": grad_norm}
    if scaler.is_enabled():
        metrics["loss_scale"] = scaler.get_scale()
    return metrics | clock.seconds


class Stopwatch:
    """Adds up the seconds between laps by what was done in them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def _read(losses: dict[str, torch.Tensor], iteration: int, part: list[dict]) -> dict[str, float]:
    """The losses as numbers, means over all processes: what is logged, and stops them together."""
    names = list(losses)
    means = mean_over_ranks(torch.stack([losses[name].detach() for name in names]))
    return read_losses(dict(zip(names, means, strict=True)), iteration, part)


def _gradients_kept(model: nn.Module, *, until_last: bool) -> contextlib.AbstractContextManager:
    """Have processes exchange the gradients of all parts at once, in the last part's backward."""
    if until_last and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()
