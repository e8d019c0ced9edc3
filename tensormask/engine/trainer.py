"""The training loop: `train` sets up a run, `_run_iterations` is the loop."""

import logging
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from tensormask.checkpoint.loading import load_weights
from tensormask.config import CfgNode
from tensormask.data import build_train_loader, get_dataset
from tensormask.data.loader import Mapper
from tensormask.engine import distributed, events, solver
from tensormask.engine.anomaly import check_weights, watch_modules
from tensormask.engine.callbacks import Callback, Run, restore_callbacks
from tensormask.engine.evaluator import Evaluator, build_issue_reporter, check_evaluation
from tensormask.engine.output_dir import CONFIG, link_latest, open_output_dir, record_environment
from tensormask.engine.precision import build_autocast, set_float32_precision
from tensormask.engine.resume import (
    LAST_CHECKPOINT,
    SampleIssue,
    checkpoint_to_resume,
    restore_checkpoint,
    unpack_issues,
    warn_of_changes,
)
from tensormask.engine.run import (
    catch_up_on_evaluation,
    evaluate,
    log_start,
    log_summary,
    save,
    store_score_thresholds,
)
from tensormask.engine.signals import StopSignals, TrainingStopped
from tensormask.engine.step import TrainState, train_step
from tensormask.evaluation import verify_results
from tensormask.modeling import build_model
from tensormask.utils.errors import UserError
from tensormask.utils.files import write_atomically
from tensormask.utils.random import seed_everything, set_determinism

logger = logging.getLogger(__name__)

LOG_PERIOD = 20


def train(
    cfg: CfgNode,
    resume: bool = False,
    overwrite: bool = False,
    *,
    callbacks: Sequence[Callback] = (),
    evaluators: Sequence[Evaluator] = (),
    mapper: Mapper | None = None,
    train_loader: Iterable[list[dict[str, Any]]] | None = None,
    model: nn.Module | None = None,
) -> dict[str, Any]:
    """Train the model of a config, evaluate it, and write all files to `OUTPUT_DIR`.

    If `OUTPUT_DIR` holds a run or is in use, this run goes to `<OUTPUT_DIR>_2`, `_3`, ..., which
    the log and the run's `config.yaml` name. The link `<OUTPUT_DIR>_latest` points to the run that
    was started last.

    Args:
        resume: continue from the last checkpoint in `OUTPUT_DIR`; without a checkpoint, start from
            the beginning. A finished run is only evaluated.
        overwrite: start in `OUTPUT_DIR` even if it holds a run, and replace its files.
        callbacks: are called around steps, evaluations and checkpoints, see `Callback`.
        evaluators: functions (or objects with `__call__`) that rank 0 calls in each evaluation as
            `evaluator(model, dataset, folder)`, for weights and averages: with the model in
            evaluation mode, a `CocoDataset`, and the folder that has its results file. The metrics
            that it returns, `{name: number}`, are results under the function's name.
        mapper: changes each training sample in the worker processes, as `mapper(sample, rng)`, and
            returns it (see `TrainingSet`). `rng` depends on `SEED` and the sample's position only.
        train_loader: batches of this rank, lists of samples with `image` and `target`, instead of
            those of `DATASETS.TRAIN`. It is iterated again when it ends, and from its beginning
            when a run is resumed.
        model: the model to train, with the interface of `TensorMask`, on its device, instead of the
            config's. It keeps its weights: `MODEL.WEIGHTS` is not loaded.

    Returns:
        The results of the last evaluation (see `evaluate_all`); with `SOLVER.EMA` also those of the
        averaged weights, under "ema".

    Raises:
        UserError: an invalid config, data set or checkpoint, or another run uses `OUTPUT_DIR`.
        NonFiniteError: a loss or a gradient is NaN or infinite.
        TrainingStopped: SIGTERM or SIGINT was received, and the state is saved.
        DiskFullError: the disk is full; existing checkpoints are intact.
        UnexpectedResultsError: the results differ from `TEST.EXPECTED_RESULTS`.
    """
    if train_loader is not None and mapper is not None:
        raise UserError("mapper is for the samples of DATASETS.TRAIN: apply it in train_loader")
    given_dir, started = cfg.OUTPUT_DIR, time.perf_counter()
    new_run = not (resume or overwrite)
    with open_output_dir(given_dir, new_run=new_run) as output_dir, StopSignals() as stop:
        checkpoint = checkpoint_to_resume(output_dir) if resume else None
        cfg = _complete(distributed.scale_to_world_size(cfg), output_dir, checkpoint)
        with distributed.first_on_machine():  # this can draw a data set
            trained_on = [get_dataset(name) for name in cfg.DATASETS.TRAIN]
            check_evaluation(cfg, trained_on[0] if trained_on else None)
        reporter = build_issue_reporter(cfg, [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
        seed_everything(cfg.SEED)
        set_determinism(deterministic=cfg.DETERMINISTIC, benchmark=cfg.CUDNN_BENCHMARK)
        set_float32_precision(cfg.FLOAT32_PRECISION)

        state = build_state(cfg, model)
        start = 0
        issues: dict[SampleIssue, None] = {}
        saved: dict[str, Any] = {}  # of `Run.state_dict`
        if checkpoint is not None:
            warn_of_changes(checkpoint, cfg)
            start = restore_checkpoint(checkpoint, state)
            issues = dict.fromkeys(unpack_issues(checkpoint))
            reporter.add([{"issues": [issue for issue in issues if issue[0] in reporter.logs]}])
            saved = checkpoint.get("run", {})
            restore_callbacks(callbacks, saved.get("callbacks", {}))
            del checkpoint  # its memory
        elif cfg.MODEL.WEIGHTS and model is not None:
            logger.info("MODEL.WEIGHTS is not loaded: the given model keeps its weights")
        elif cfg.MODEL.WEIGHTS:
            with distributed.first_on_machine():  # this can download a file
                load_weights(distributed.unwrap(state.model), cfg.MODEL.WEIGHTS)
            check_weights(state.model, cfg.MODEL.WEIGHTS)
        distributed.check_same("config or checkpoint", (cfg.dump(), start))
        batches: Iterator[list[dict]] = iter(())
        if train_loader is not None:
            batches = _repeat(train_loader)
        elif start < cfg.SOLVER.MAX_ITER and saved.get("stopped") is None:
            rank, world_size = distributed.get_rank(), distributed.get_world_size()
            batches = build_train_loader(
                cfg, start, rank=rank, world_size=world_size, mapper=mapper
            )

        # All checks of the config are done: an invalid one does not change an earlier run's files.
        if distributed.is_main_process():
            if start == 0:
                (output_dir / LAST_CHECKPOINT).unlink(missing_ok=True)
            write_atomically(output_dir / CONFIG, lambda f: f.write(cfg.dump().encode()))
            if not resume:
                link_latest(given_dir, output_dir)
            record_environment(output_dir)
        with events.MetricsWriter(output_dir, start) as writer:
            run = Run(cfg, state, writer, reporter, stop, issues, callbacks, evaluators, start)
            run.stopped, run.evaluated = saved.get("stopped"), saved.get("evaluated", -1)
            if not run.finished:
                _run_iterations(run, batches)
            results = run.results
            if results is None or run.evaluated != run.done:
                results = evaluate(run)
            store_score_thresholds(run, results)
            reporter.log_new()
            log_summary(run, results, start, time.perf_counter() - started)
        verify_results(cfg.TEST.EXPECTED_RESULTS, results)
    return results


def build_state(cfg: CfgNode, model: nn.Module | None = None) -> TrainState:
    """Build a new model, unless it is given, with its optimizer, schedule, scaler and averages."""
    if cfg.SOLVER.DETECT_ANOMALY and cfg.MODEL.COMPILE:
        raise UserError(
            "SOLVER.DETECT_ANOMALY checks the output of every module, but compiled modules do not "
            "support this: set MODEL.COMPILE to ''"
        )
    if model is None:
        model = build_model(cfg, sum_over_ranks=distributed.all_reduce_sum)
    optimizer = solver.build_optimizer(cfg, model)
    scheduler = solver.build_lr_scheduler(cfg, optimizer)
    ema = solver.build_ema(cfg, model)  # a copy without the hooks of `watch_modules`
    if cfg.SOLVER.DETECT_ANOMALY:
        watch_modules(model)
    _, scaler = build_autocast(cfg, _device(model))
    return TrainState(distributed.wrap(model), optimizer, scheduler, scaler, ema)


def _run_iterations(run: Run, batches: Iterator[list[dict]]) -> None:
    """Train to the last iteration; log, save and evaluate periodically, and save at the end."""
    cfg, state, stop, max_iter = run.cfg, run.state, run.signals, run.cfg.SOLVER.MAX_ITER
    device = _device(state.model)
    step = partial(
        train_step,
        state,
        clip_gradients=solver.build_gradient_clipper(cfg),
        autocast=build_autocast(cfg, device)[0],
        accumulate_steps=cfg.SOLVER.ACCUMULATE_STEPS,
    )
    log_start(run)
    run.writer.write_issues(run.done, run.reporter.pop_record())
    recent = events.RecentMetrics()
    state.model.train()
    saved = run.done
    with events.progress_bar(run.done, max_iter) as bar:
        try:
            if run.done > 0 and _is_due(run.done, cfg.TEST.EVAL_PERIOD):
                catch_up_on_evaluation(run)  # the run was stopped before or during it
            while not run.finished:
                started = time.perf_counter()
                with stop.interruptible():
                    batch = next(batches)
                new = [issue for sample in batch for issue in sample.get("issues", ())]
                new = distributed.gather_lists(new)
                run.reporter.add([{"issues": new}])
                _check_images(batch)
                run.issues |= dict.fromkeys(new)
                for callback in run.callbacks:
                    callback.before_step(run, batch)
                data_time = time.perf_counter() - started
                metrics = step(batch, iteration=run.done)
                run.done += 1
                for callback in run.callbacks:
                    callback.after_step(run, metrics)
                run.agree_on_stop()
                seconds = time.perf_counter() - started
                recent.add(run.with_logged({**metrics, "data_time": data_time, "time": seconds}))
                bar.update()
                if run.done % LOG_PERIOD == 0 or run.finished:
                    medians = recent.pop_medians() | {"max_mem": events.peak_memory(device)}
                    medians["eta_seconds"] = recent.seconds_left(max_iter - run.done)
                    events.log_progress(events.format_progress(run.done - 1, max_iter, medians))
                    bar.set_postfix_str(f"loss {medians['total_loss']:.4g}")
                    run.writer.write(run.done - 1, medians)
                    run.writer.write_issues(run.done - 1, run.reporter.pop_record())
                if not run.finished and _is_due(run.done, cfg.SOLVER.CHECKPOINT_PERIOD):
                    save(run)
                    saved = run.done
                stop.check()
                if not run.finished and _is_due(run.done, cfg.TEST.EVAL_PERIOD):
                    evaluate(run)
            save(run)
            saved = run.done
            stop.check()
        except TrainingStopped as stopped:
            if run.done > saved:
                save(run)
            logger.warning("%s after %d iterations; continue with --resume", stopped, run.done)
            raise


def _repeat(loader: Iterable[list[dict]]) -> Iterator[list[dict]]:
    """Iterate over a loader again and again."""
    while True:
        batch = None
        for batch in loader:
            if not isinstance(batch, list) or not all(isinstance(sample, dict) for sample in batch):
                raise UserError(
                    "train_loader must yield lists of dicts with image and target, got a "
                    f"{type(batch).__name__}: pass collate_fn=list to a DataLoader whose data set "
                    "returns such dicts"
                )
            yield batch
        if batch is None:
            raise UserError("train_loader has no batch, or ends and cannot be iterated again")


def _complete(cfg: CfgNode, output_dir: Path, checkpoint: dict | None) -> CfgNode:
    """Return a copy with the folder of the run, and with a SEED if the config has none.

    The seed is that of the checkpoint; without a checkpoint it is random.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(output_dir)
    if cfg.SEED < 0 and checkpoint is not None:
        cfg.SEED = yaml.safe_load(checkpoint["config"])["SEED"]
    elif cfg.SEED < 0:
        cfg.SEED = distributed.broadcast_object(secrets.randbelow(2**31))
    cfg.freeze()
    logger.info("Seed: %d", cfg.SEED)
    return cfg


def _check_images(batch: list[dict]) -> None:
    """Raise UserError for a sample without an image: too many consecutive files are unreadable."""
    for sample in batch:
        if sample["image"] is None:
            raise UserError(
                f"{len(sample['issues'])} consecutive images cannot be read; the last one is "
                f"{sample['issues'][-1]} (data set, issue, image id). "
                "Check that the folder of images exists and is readable"
            )


def _is_due(done: int, period: int) -> bool:
    return period > 0 and done % period == 0


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
