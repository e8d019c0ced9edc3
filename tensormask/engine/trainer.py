"""Training of a config: read from `train` downwards."""

import logging
import secrets
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import yaml

from tensormask.checkpoint.loading import load_weights
from tensormask.config import CfgNode
from tensormask.data import build_train_loader, get_dataset
from tensormask.engine import distributed
from tensormask.engine.anomaly import check_weights, watch_modules
from tensormask.engine.evaluator import build_issue_reporter, check_evaluation
from tensormask.engine.events import (
    MetricsWriter,
    RecentMetrics,
    format_progress,
    log_progress,
    peak_memory,
    progress_bar,
    setup_logging,
)
from tensormask.engine.precision import build_autocast, set_float32_precision
from tensormask.engine.resume import (
    LAST_CHECKPOINT,
    checkpoint_to_resume,
    restore_checkpoint,
    warn_of_changes,
)
from tensormask.engine.run import Run, evaluate, is_evaluated, log_start, log_summary, save
from tensormask.engine.run_folder import lock_folder, record_environment
from tensormask.engine.signals import StopSignals, TrainingStopped
from tensormask.engine.solver import (
    build_ema,
    build_gradient_clipper,
    build_lr_scheduler,
    build_optimizer,
)
from tensormask.engine.step import TrainState, train_step
from tensormask.evaluation import verify_results
from tensormask.modeling import build_model
from tensormask.utils.errors import UserError
from tensormask.utils.files import write_atomically
from tensormask.utils.random import seed_everything, set_determinism

logger = logging.getLogger(__name__)

LOG_PERIOD = 20


def train(cfg: CfgNode, resume: bool = False) -> dict[str, dict[str, float]]:
    """Train the model of a config, evaluate it, and write everything to `OUTPUT_DIR`.

    Args:
        resume: go on from the last checkpoint in `OUTPUT_DIR`; without one, start from the
            beginning. A finished run is only evaluated.

    Returns:
        The results of the last evaluation, as `evaluate_all` gives them; with `SOLVER.EMA` also
        those of the averaged weights, under "ema".

    Raises:
        ValueError: something in the config, the data or the checkpoint does not fit, or another
            run uses the folder.
        NonFiniteError: a loss or a gradient is NaN or infinite.
        TrainingStopped: SIGTERM or SIGINT has come, and the state is saved.
        DiskFullError: there is no space for what is to be written; the checkpoints are whole.
        UnexpectedResultsError: the results are not those of `TEST.EXPECTED_RESULTS`.
    """
    output_dir, started = Path(cfg.OUTPUT_DIR), time.perf_counter()
    with lock_folder(output_dir), StopSignals() as stop:
        if distributed.is_main_process():
            setup_logging(output_dir)
        checkpoint = checkpoint_to_resume(output_dir) if resume else None
        cfg = _with_seed(distributed.scale_to_world_size(cfg), checkpoint)
        with distributed.first_on_machine():  # a set may be drawn now
            trained_on = [get_dataset(name) for name in cfg.DATASETS.TRAIN]
            check_evaluation(cfg, trained_on[0] if trained_on else None)
        reporter = build_issue_reporter(cfg, [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
        seed_everything(cfg.SEED)
        set_determinism(deterministic=cfg.DETERMINISTIC, benchmark=cfg.CUDNN_BENCHMARK)
        set_float32_precision(cfg.FLOAT32_PRECISION)

        state = build_state(cfg)
        start, issues = 0, {}
        if checkpoint is not None:
            warn_of_changes(checkpoint, cfg)
            start = restore_checkpoint(checkpoint, state)
            issues = dict.fromkeys(map(tuple, checkpoint.get("issues", ())))
            reporter.take([{"issues": [issue for issue in issues if issue[0] in reporter.logs]}])
            del checkpoint  # its memory
        elif cfg.MODEL.WEIGHTS:
            with distributed.first_on_machine():  # a file may be downloaded now
                load_weights(distributed.unwrap(state.model), cfg.MODEL.WEIGHTS)
            check_weights(state.model, cfg.MODEL.WEIGHTS)
        finished = start >= cfg.SOLVER.MAX_ITER
        distributed.check_same("config or checkpoint", (cfg.dump(), start))
        batches = iter(())
        if not finished:
            rank, world_size = distributed.get_rank(), distributed.get_world_size()
            batches = build_train_loader(cfg, start, rank=rank, world_size=world_size)

        # A config that does not fit has failed by now, and what an earlier run left is still there.
        if distributed.is_main_process():
            if start == 0:
                (output_dir / LAST_CHECKPOINT).unlink(missing_ok=True)
            write_atomically(output_dir / "config.yaml", lambda f: f.write(cfg.dump().encode()))
            record_environment(output_dir)
        with MetricsWriter(output_dir, start) as writer:
            run = Run(cfg, state, writer, reporter, issues)
            if not finished:
                _run_iterations(run, batches, stop, start)
            with stop.interruptible():
                results = evaluate(run, cfg.SOLVER.MAX_ITER)
            reporter.log_found()
            log_summary(run, results, start, time.perf_counter() - started)
    verify_results(cfg.TEST.EXPECTED_RESULTS, results)
    return results


def build_state(cfg: CfgNode) -> TrainState:
    """Make the model, fresh, and all that belongs to its training."""
    if cfg.SOLVER.DETECT_ANOMALY and cfg.MODEL.COMPILE:
        raise UserError(
            "SOLVER.DETECT_ANOMALY looks at every module, and compiled ones cannot be looked into: "
            "set MODEL.COMPILE to ''"
        )
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    ema = build_ema(cfg, model)  # a copy, which is not watched
    if cfg.SOLVER.DETECT_ANOMALY:
        watch_modules(model)
    _, scaler = build_autocast(cfg, _device(model))
    return TrainState(distributed.wrap(model), optimizer, scheduler, scaler, ema)


def _run_iterations(run: Run, batches: Iterator[list[dict]], stop: StopSignals, start: int) -> None:
    """Train from iteration `start` to the last, with what is due on the way."""
    cfg, state, max_iter = run.cfg, run.state, run.cfg.SOLVER.MAX_ITER
    device = _device(state.model)
    step = partial(
        train_step,
        state,
        clip_gradients=build_gradient_clipper(cfg),
        autocast=build_autocast(cfg, device)[0],
        accumulate_steps=cfg.SOLVER.ACCUMULATE_STEPS,
    )
    log_start(run, start)
    run.writer.write_issues(start, run.reporter.pop_record())
    recent = RecentMetrics()
    state.model.train()
    done = saved = start  # iterations, of the run as a whole
    with progress_bar(start, max_iter) as bar:
        try:
            if start > 0 and _is_due(start, cfg.TEST.EVAL_PERIOD) and not is_evaluated(run, start):
                with stop.interruptible():  # the run was stopped before or in it
                    evaluate(run, start)
            while done < max_iter:
                started = time.perf_counter()
                with stop.interruptible():
                    batch = next(batches)
                found = [issue for sample in batch for issue in sample["issues"]]
                found = distributed.gather_lists(found)
                run.reporter.take([{"issues": found}])
                _check_images(batch)
                run.issues |= dict.fromkeys(found)
                data_time = time.perf_counter() - started
                metrics = step(batch, iteration=done)
                done += 1
                seconds = time.perf_counter() - started
                recent.add({**metrics, "data_time": data_time, "time": seconds})
                bar.update()
                if done % LOG_PERIOD == 0 or done == max_iter:
                    medians = recent.pop_medians() | {"max_mem": peak_memory(device)}
                    medians["eta_seconds"] = recent.seconds_left(max_iter - done)
                    log_progress(format_progress(done - 1, max_iter, medians))
                    bar.set_postfix_str(f"loss {medians['total_loss']:.4g}")
                    run.writer.write(done - 1, medians)
                    run.writer.write_issues(done - 1, run.reporter.pop_record())
                if done == max_iter or _is_due(done, cfg.SOLVER.CHECKPOINT_PERIOD):
                    save(run, done)
                    saved = done
                stop.check()
                if done < max_iter and _is_due(done, cfg.TEST.EVAL_PERIOD):
                    with stop.interruptible():
                        evaluate(run, done)
        except TrainingStopped as stopped:
            if done > saved:
                save(run, done)
            logger.warning("%s after %d iterations; go on with --resume", stopped, done)
            raise


def _with_seed(cfg: CfgNode, checkpoint: dict | None) -> CfgNode:
    """Give a copy of the config whose SEED is set: its own, the stopped run's, or a drawn one."""
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.SEED < 0 and checkpoint is not None:
        cfg.SEED = yaml.safe_load(checkpoint["config"])["SEED"]
    elif cfg.SEED < 0:
        cfg.SEED = distributed.broadcast_object(secrets.randbelow(2**31))
    cfg.freeze()
    logger.info("Seed: %d", cfg.SEED)
    return cfg


def _check_images(batch: list[dict]) -> None:
    """Raise ValueError if a sample has no image: too many in a row could not be read."""
    for sample in batch:
        if sample["image"] is None:
            raise UserError(
                f"{len(sample['issues'])} images drawn in a row cannot be read; the last is "
                f"{sample['issues'][-1]} (data set, issue, image id). "
                "Is the folder of images there and readable?"
            )


def _is_due(done: int, period: int) -> bool:
    return period > 0 and done % period == 0


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
