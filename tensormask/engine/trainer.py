"""The training loop: `train` sets up a run, `_run_iterations` is the loop."""

import logging
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from tensormask.checkpoint.files import get_description
from tensormask.checkpoint.loading import load_weights
from tensormask.config import CfgNode
from tensormask.data import build_train_loader, get_dataset
from tensormask.data.catalog import fixed_datasets
from tensormask.data.classes import UNKNOWN, matches_by_name, stored_classes, training_classes
from tensormask.data.loader import check_batch, repeat
from tensormask.data.samples import Mapper
from tensormask.engine import distributed, events, solver
from tensormask.engine.anomaly import check_weights, watch_modules
from tensormask.engine.callbacks import Callback, EarlyStopping, Run, build_early_stopping
from tensormask.engine.evaluator import (
    Evaluator,
    build_issue_reporter,
    check_evaluation,
    store_score_thresholds,
)
from tensormask.engine.output_dir import holds_run, link_latest, open_output_dir, record_start
from tensormask.engine.precision import build_autocast, set_float32_precision
from tensormask.engine.resume import LAST_CHECKPOINT, checkpoint_to_resume
from tensormask.engine.run import (
    catch_up_on_evaluation,
    evaluate,
    log_start,
    log_summary,
    restore,
    save,
    saved_if_out_of_memory,
)
from tensormask.engine.signals import StopSignals, TrainingStopped
from tensormask.engine.step import TrainState, train_step
from tensormask.evaluation import verify_results
from tensormask.evaluation.metrics import check_metrics
from tensormask.modeling import build_model
from tensormask.utils.errors import UserError
from tensormask.utils.random import seed_everything, set_determinism

logger = logging.getLogger(__name__)

LOG_PERIOD = 20


@fixed_datasets()
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
        OutOfMemory: the memory is full; the state is saved.
        UnexpectedResultsError: the results differ from `TEST.EXPECTED_RESULTS`.
    """
    if train_loader is not None and mapper is not None:
        raise UserError("mapper is for the samples of DATASETS.TRAIN: apply it in train_loader")
    given_dir, started = cfg.OUTPUT_DIR, time.perf_counter()
    new_run = not (resume or overwrite)
    with open_output_dir(given_dir, new_run=new_run) as output_dir, StopSignals() as stop:
        checkpoint = checkpoint_to_resume(output_dir) if resume else None
        cfg = _complete(distributed.scale_to_world_size(cfg), output_dir, checkpoint)
        callbacks = [*callbacks, *build_early_stopping(cfg)]
        with distributed.first_on_machine():  # this can draw a data set
            train_sets = [get_dataset(name) for name in cfg.DATASETS.TRAIN]
            test_sets = [get_dataset(name) for name in cfg.DATASETS.TEST]
            stored = UNKNOWN
            if checkpoint is not None:
                stored = stored_classes(cfg, get_description(checkpoint), "the checkpoint")
            classes = training_classes(
                cfg, train_sets, test_sets, stored, maps_labels=train_loader is None
            )
            check_evaluation(cfg, classes)
            check_metrics(
                cfg,
                test_sets,
                _wanted_metrics(cfg, callbacks),
                evaluators=evaluators,
                own_model=model is not None,
                can_log=any(type(callback) is not EarlyStopping for callback in callbacks),
            )
        reporter = build_issue_reporter(cfg, [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
        seed_everything(cfg.SEED)
        set_determinism(deterministic=cfg.DETERMINISTIC, benchmark=cfg.CUDNN_BENCHMARK)
        set_float32_precision(cfg.FLOAT32_PRECISION)

        run = Run(cfg, build_state(cfg, model), reporter, stop, callbacks, evaluators, classes)
        if checkpoint is not None:
            restore(run, checkpoint)
            del checkpoint  # its memory
        elif cfg.MODEL.WEIGHTS and model is not None:
            logger.info("MODEL.WEIGHTS is not loaded: the given model keeps its weights")
        elif cfg.MODEL.WEIGHTS:
            with distributed.first_on_machine():  # this can download a file
                names = classes.names if matches_by_name(cfg) else ()
                load_weights(run.model, cfg.MODEL.WEIGHTS, class_names=names)
            check_weights(run.model, cfg.MODEL.WEIGHTS)
        distributed.check_same("config or checkpoint", (cfg.dump(), run.done))
        start = run.done
        batches: Iterator[list[dict]] = iter(())
        if train_loader is not None:
            batches = repeat(train_loader)
        elif not run.finished:
            rank, world_size = distributed.get_rank(), distributed.get_world_size()
            batches = build_train_loader(
                cfg, start, rank=rank, world_size=world_size, mapper=mapper, classes=classes
            )

        # All checks of the config are done: an invalid one does not change an earlier run's files.
        if distributed.is_main_process():
            if start == 0:
                (output_dir / LAST_CHECKPOINT).unlink(missing_ok=True)
            if not (resume and holds_run(output_dir)):
                link_latest(given_dir, output_dir)
            record_start(output_dir, cfg)
        with events.MetricsWriter(output_dir, start) as run.writer, saved_if_out_of_memory(run):
            if not run.finished:
                _run_iterations(run, batches)
            elif run.saved < run.done:  # SOLVER.MAX_ITER was decreased
                save(run)
            results = run.results
            if results is None or run.evaluated != run.done:
                results = evaluate(run)
            store_score_thresholds(output_dir, results)
            reporter.log_new()
            log_summary(run, results, start, time.perf_counter() - started)
        verify_results(cfg.TEST.EXPECTED_RESULTS, results)
    return results


def _wanted_metrics(cfg: CfgNode, callbacks: Sequence[Callback]) -> Iterator[tuple[str, str]]:
    """Yield the metrics that a run reads from its evaluations, each after what needs it."""
    if cfg.SOLVER.CHECKPOINT_BEST:
        yield "SOLVER.CHECKPOINT_BEST", cfg.SOLVER.CHECKPOINT_BEST
    for callback in callbacks:
        if isinstance(callback, EarlyStopping):
            yield "the metric of EarlyStopping", callback.metric
    for row in cfg.TEST.EXPECTED_RESULTS:
        yield "a row of TEST.EXPECTED_RESULTS", "/".join(map(str, row[:2]))


def build_state(cfg: CfgNode, model: nn.Module | None = None) -> TrainState:
    """Build a new model, unless it is given, with its optimizer, schedule, scaler and averages."""
    if cfg.SOLVER.DETECT_ANOMALY and cfg.MODEL.COMPILE:
        raise UserError(
            "SOLVER.DETECT_ANOMALY checks the output of every module, but compiled modules do not "
            "support this: set MODEL.COMPILE to ''"
        )
    if model is None:
        model = build_model(cfg, sum_over_ranks=distributed.all_reduce_sum)
    num_classes = cfg.MODEL.TENSOR_MASK.NUM_CLASSES
    if (given := getattr(model, "num_classes", num_classes)) != num_classes:
        raise UserError(
            f"the given model has {given} classes, but MODEL.TENSOR_MASK.NUM_CLASSES, which its "
            f"checkpoints will name, is {num_classes}: make them equal"
        )
    optimizer = solver.build_optimizer(cfg, model)
    scheduler = solver.build_lr_scheduler(cfg, optimizer)
    ema = solver.build_ema(cfg, model)  # a copy without the hooks of `watch_modules`
    if cfg.SOLVER.DETECT_ANOMALY:
        watch_modules(model)
    _, scaler = build_autocast(cfg, next(model.parameters()).device)
    return TrainState(
        distributed.wrap(model, cfg.SOLVER.REDUCE_DTYPE), optimizer, scheduler, scaler, ema
    )


def _run_iterations(run: Run, batches: Iterator[list[dict]]) -> None:
    """Train to the last iteration; log, save and evaluate periodically, and save at the end."""
    cfg, stop, max_iter = run.cfg, run.signals, run.cfg.SOLVER.MAX_ITER
    step = partial(
        train_step,
        run.state,
        clip_gradients=solver.build_gradient_clipper(cfg),
        autocast=build_autocast(cfg, run.device)[0],
        accumulate_steps=cfg.SOLVER.ACCUMULATE_STEPS,
    )
    log_start(run)
    run.writer.write_issues(run.done, run.reporter.pop_record())
    recent = events.RecentMetrics()
    # EarlyStopping decides after evaluations, which agree on it themselves.
    can_stop = any(type(callback) is not EarlyStopping for callback in run.callbacks)
    run.state.model.train()
    with events.progress_bar(run.done, max_iter) as bar:
        try:
            if run.done > 0 and _is_due(run.done, cfg.TEST.EVAL_PERIOD):
                catch_up_on_evaluation(run)  # the run was stopped before or during it
            while not run.finished:
                started = time.perf_counter()
                with stop.interruptible():
                    batch = next(batches)
                check_batch(batch)
                new = [issue for sample in batch for issue in sample.get("issues", ())]
                for callback in run.callbacks:
                    callback.before_step(run, batch)
                data_time = time.perf_counter() - started
                flags = {"issues": bool(new), "stop": stop.received is not None}
                metrics = step(batch, iteration=run.done, flags=flags)
                run.done += 1
                if flags["issues"]:
                    new = distributed.gather_lists(new)
                    run.reporter.add([{"issues": new}])
                    run.issues |= dict.fromkeys(new)
                for callback in run.callbacks:
                    callback.after_step(run, metrics)
                if can_stop:
                    run.agree_on_stop()
                seconds = time.perf_counter() - started
                recent.add(run.with_logged({**metrics, "data_time": data_time, "time": seconds}))
                bar.update()
                if run.done % LOG_PERIOD == 0 or run.finished:
                    medians = recent.pop_medians() | {"max_mem": events.peak_memory(run.device)}
                    medians["eta_seconds"] = recent.seconds_left(max_iter - run.done)
                    events.log_progress(events.format_progress(run.done - 1, max_iter, medians))
                    bar.set_postfix_str(f"loss {medians['total_loss']:.4g}")
                    run.writer.write(run.done - 1, medians)
                    run.writer.write_issues(run.done - 1, run.reporter.pop_record())
                if not run.finished and _is_due(run.done, cfg.SOLVER.CHECKPOINT_PERIOD):
                    save(run)
                stop.check(flags["stop"])
                if not run.finished and _is_due(run.done, cfg.TEST.EVAL_PERIOD):
                    evaluate(run)
            save(run)
            stop.check()
        except TrainingStopped as stopped:
            if run.done > run.saved:
                save(run)
            logger.warning("%s after %d iterations; continue with --resume", stopped, run.done)
            raise


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


def _is_due(done: int, period: int) -> bool:
    return period > 0 and done % period == 0
