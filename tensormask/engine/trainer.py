"""Training of a config: read from `train` downwards."""

import logging
import math
import random
import secrets
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from tensormask.config import CfgNode
from tensormask.data import FaultReporter, build_train_loader, get_dataset
from tensormask.engine.checkpoint import (
    LAST_CHECKPOINT,
    checkpoint_to_resume,
    restore_checkpoint,
    save_checkpoint,
    write_atomically,
)
from tensormask.engine.evaluator import build_fault_reporter, check_evaluation, evaluate_all
from tensormask.engine.events import (
    MetricsWriter,
    RecentMetrics,
    flatten_results,
    format_progress,
    setup_logging,
)
from tensormask.engine.solver import (
    GradientClipper,
    build_gradient_clipper,
    build_lr_scheduler,
    build_optimizer,
)
from tensormask.engine.weights import load_weights
from tensormask.evaluation import verify_results
from tensormask.layers import _native
from tensormask.modeling import build_model

logger = logging.getLogger(__name__)

LOG_PERIOD = 20


class NonFiniteLossError(FloatingPointError):
    """A loss is NaN or infinite; the weights are still those before the iteration."""


def train(cfg: CfgNode, resume: bool = False) -> dict[str, dict[str, float]]:
    """Train the model of a config, evaluate it, and write everything to `OUTPUT_DIR`.

    Args:
        resume: go on from the last checkpoint in `OUTPUT_DIR`; without one, start from the
            beginning. A finished run is only evaluated.

    Returns:
        The results of the last evaluation, as `evaluate_all` gives them.

    Raises:
        ValueError: something in the config, the data or the checkpoint does not fit.
        NonFiniteLossError: a loss is NaN or infinite.
        UnexpectedResultsError: the results are not those of `TEST.EXPECTED_RESULTS`.
    """
    output_dir = Path(cfg.OUTPUT_DIR)
    output_dir.mkdir(parents=True, exist_ok=True)
    setup_logging(output_dir)
    checkpoint = checkpoint_to_resume(output_dir) if resume else None
    cfg = _with_seed(cfg, checkpoint)
    trained_on = get_dataset(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else None
    check_evaluation(cfg, trained_on)
    reporter = build_fault_reporter(cfg, [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    seed_everything(cfg.SEED)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK

    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    start = 0
    if checkpoint is not None:
        start = restore_checkpoint(checkpoint, model, optimizer, scheduler)
        del checkpoint  # its memory
    elif cfg.MODEL.WEIGHTS:
        load_weights(model, cfg.MODEL.WEIGHTS)
    finished = start >= cfg.SOLVER.MAX_ITER
    batches = iter(()) if finished else build_train_loader(cfg, start_iteration=start)

    # A config that does not fit has failed by now, and what an earlier run left is still there.
    if start == 0:
        (output_dir / LAST_CHECKPOINT).unlink(missing_ok=True)
    write_atomically(output_dir / "config.yaml", lambda file: file.write(cfg.dump().encode()))
    with MetricsWriter(output_dir, start) as writer:
        if not finished:
            _run_iterations(cfg, model, optimizer, scheduler, batches, writer, reporter, start)
        results = evaluate_all(cfg, model, output_dir, reporter)
        writer.write(cfg.SOLVER.MAX_ITER - 1, flatten_results(results))
        writer.write_faults(cfg.SOLVER.MAX_ITER - 1, reporter.pop_record())
        reporter.log_found()
    verify_results(cfg.TEST.EXPECTED_RESULTS, results)
    return results


def _run_iterations(
    cfg: CfgNode,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    batches: Iterator[list[dict]],
    writer: MetricsWriter,
    reporter: FaultReporter,
    start: int,
) -> None:
    """Train from iteration `start` to the last, with what is due on the way."""
    max_iter = cfg.SOLVER.MAX_ITER
    clip_gradients = build_gradient_clipper(cfg)
    datasets = [get_dataset(name) for name in cfg.DATASETS.TRAIN]
    save = partial(
        save_checkpoint,
        cfg.OUTPUT_DIR,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        config=cfg.dump(),
        class_names=datasets[0].class_names,
        category_ids=datasets[0].category_ids,
    )
    _log_start(cfg, model, datasets, start)
    writer.write_faults(start, reporter.pop_record())
    recent = RecentMetrics()
    model.train()
    for iteration in range(start, max_iter):
        started = time.perf_counter()
        batch = next(batches)
        reporter.take(batch)
        _check_pictures(batch)
        data_time = time.perf_counter() - started
        metrics = train_step(model, batch, optimizer, scheduler, clip_gradients, iteration)
        recent.add(metrics | {"time": time.perf_counter() - started, "data_time": data_time})

        done = iteration + 1
        if done % LOG_PERIOD == 0 or done == max_iter:
            medians = recent.pop_medians()
            medians["eta_seconds"] = recent.seconds_left(max_iter - done)
            logger.info(format_progress(iteration, max_iter, medians))
            writer.write(iteration, medians)
            writer.write_faults(iteration, reporter.pop_record())
        if done == max_iter:
            save("model_final.pth", iteration=iteration)
        elif _is_due(done, cfg.SOLVER.CHECKPOINT_PERIOD):
            save(f"model_{iteration:07d}.pth", iteration=iteration)
        if done < max_iter and _is_due(done, cfg.TEST.EVAL_PERIOD):
            results = evaluate_all(cfg, model, cfg.OUTPUT_DIR, reporter)
            writer.write(iteration, flatten_results(results))


def train_step(
    model: nn.Module,
    batch: list[dict],
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    clip_gradients: GradientClipper,
    iteration: int,
) -> dict[str, float]:
    """Do one step on a batch of samples.

    Returns:
        The losses, their sum `total_loss`, the learning rate `lr` of the step, and `grad_norm`,
        the 2-norm of all gradients before clipping.

    Raises:
        NonFiniteLossError: a loss is NaN or infinite; the weights have not changed.
    """
    losses = model([s["image"] for s in batch], [s["target"] for s in batch])
    values = _checked_losses(losses, iteration, batch)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    grad_norm = clip_gradients([p for group in optimizer.param_groups for p in group["params"]])
    lr = optimizer.param_groups[0]["lr"]
    optimizer.step()
    scheduler.step()
    total = sum(values.values())
    return {"total_loss": total, **values, "lr": lr, "grad_norm": float(grad_norm)}


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch, those of all GPUs included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the global one)
    torch.manual_seed(seed)


def _with_seed(cfg: CfgNode, checkpoint: dict | None) -> CfgNode:
    """Give a copy of the config whose SEED is set: its own, the stopped run's, or a drawn one."""
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.SEED < 0 and checkpoint is not None:
        cfg.SEED = yaml.safe_load(checkpoint["config"])["SEED"]
    elif cfg.SEED < 0:
        cfg.SEED = secrets.randbelow(2**31)
    cfg.freeze()
    logger.info("Seed: %d", cfg.SEED)
    return cfg


def _checked_losses(
    losses: dict[str, Tensor], iteration: int, batch: list[dict]
) -> dict[str, float]:
    """Read the losses as numbers; raise NonFiniteLossError where one is NaN or infinite."""
    values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
    if all(math.isfinite(value) for value in values.values()):
        return values
    raise NonFiniteLossError(
        f"Loss is not finite at iteration {iteration}: "
        + ", ".join(f"{name} {value:g}" for name, value in values.items())
        + ". The batch: "
        + ", ".join(sample["file_name"] for sample in batch)
        + ". Lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS or clip the gradients "
        "(SOLVER.CLIP_GRADIENTS.ENABLED True)"
    )


def _check_pictures(batch: list[dict]) -> None:
    """Raise ValueError if a sample has no picture: too many in a row could not be read."""
    for sample in batch:
        if sample["image"] is None:
            raise ValueError(
                f"{len(sample['faults'])} pictures drawn in a row cannot be read; the last is "
                f"{sample['faults'][-1]} (data set, fault, image id). "
                "Is the folder of pictures there and readable?"
            )


def _is_due(done: int, period: int) -> bool:
    return period > 0 and done % period == 0


def _log_start(cfg: CfgNode, model: nn.Module, datasets: list, start: int) -> None:
    parameters = list(model.parameters())
    logger.info(
        "Training iterations %d to %d, %d pictures each, on %s; %d pictures in %s; "
        "%.2f M parameters, %.2f M of them trainable",
        start,
        cfg.SOLVER.MAX_ITER,
        cfg.SOLVER.IMS_PER_BATCH,
        parameters[0].device,
        sum(len(dataset) for dataset in datasets),
        ", ".join(cfg.DATASETS.TRAIN),
        sum(p.numel() for p in parameters) / 1e6,
        sum(p.numel() for p in parameters if p.requires_grad) / 1e6,
    )
    logger.info("swap_align2nat: %s", _native.describe(parameters[0].device.type))
