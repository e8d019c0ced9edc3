"""A run between its iterations: save checkpoints, evaluate, keep the best weights, log."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from tensormask.config import changes
from tensormask.data import get_dataset
from tensormask.engine import distributed, events, resume
from tensormask.engine.callbacks import Run
from tensormask.engine.evaluator import evaluate_all, score_threshold
from tensormask.engine.memory import training_advice
from tensormask.layers import _native
from tensormask.modeling import TensorMask
from tensormask.utils.memory import OutOfMemory, explain_out_of_memory

logger = logging.getLogger(__name__)


def save(run: Run) -> None:
    """Write the checkpoint after `run.done` iterations, and remove the oldest ones."""
    for callback in run.callbacks:
        callback.before_checkpoint(run)
    path = _write(run)
    for callback in run.callbacks:
        callback.after_checkpoint(run, path)


def _write(run: Run) -> Path:
    """Write a checkpoint if this is rank 0, and return its path."""
    iteration = run.done - 1
    name = resume.FINAL_CHECKPOINT if run.finished else f"model_{iteration:07d}.pth"
    if distributed.is_main_process():
        checkpoint = _pack(run)
        if run.finished and run.state.ema is not None:
            averages = resume.only_weights(checkpoint, averaged=True)
            resume.write_torch(run.output_dir / resume.FINAL_EMA, averages)
        resume.save_checkpoint(run.output_dir, name, checkpoint)
        num_kept = run.cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP
        resume.remove_old_checkpoints(run.output_dir, num_kept, iteration)
    run.saved = run.done
    return run.output_dir / name


@contextmanager
def saved_if_out_of_memory(run: Run) -> Iterator[None]:
    """Save the last complete iteration if the block needs too much memory.

    With several ranks, only rank 0 can save, and without its callbacks: the other ranks do not
    take part any more.

    Raises:
        OutOfMemory: instead of the error of the block; names what to lower and the checkpoint.
    """

    def note_update(*args: object) -> None:
        run.updating = run.done

    hook = run.state.optimizer.register_step_pre_hook(note_update)
    try:
        with explain_out_of_memory("training", training_advice(run.cfg)):
            yield
    except OutOfMemory as error:
        raise OutOfMemory(f"{error} {_save_last_iteration(run)}") from error
    finally:
        hook.remove()


def _save_last_iteration(run: Run) -> str:
    """Save a run whose last iteration has failed, and return where it is, as a sentence."""
    run.state.optimizer.zero_grad()
    problem = ""
    if run.saved < run.done and run.updating == run.done:
        problem = f" (iteration {run.done} has failed while it changed the weights)"
    elif run.saved < run.done:
        try:
            save(run) if distributed.get_world_size() == 1 else _write(run)
        except Exception as error:  # there can be too little memory, or disk, for this as well
            problem = f" (the {run.done} iterations so far cannot be saved: {error})"
    last = resume.find_last_checkpoint(run.output_dir)
    if last is None:
        return f"There is no checkpoint yet{problem}."
    return f"{last} has the run so far{problem}: continue with --resume."


def _pack(run: Run) -> dict:
    return resume.pack_checkpoint(
        run.state,
        iteration=run.done - 1,
        config=run.cfg.dump(),
        class_names=run.classes.names,
        category_ids=run.classes.category_ids,
        issues=run.issues,
        run=run.state_dict(),
    )


def restore(run: Run, checkpoint: dict[str, Any]) -> None:
    """Restore all that a checkpoint has of a run; the log has the changes of the config.

    Raises:
        UserError: the checkpoint belongs to another model or optimizer.
    """
    done = checkpoint["iteration"] + 1
    changed = changes.find_changes(checkpoint["config"], run.cfg, done=done)
    path = resume.find_last_checkpoint(run.output_dir)
    changes.check_changes(changed, path)
    new_seed = "SEED" in changed[changes.Effect.TRAINED]
    run.done = run.saved = resume.restore_checkpoint(checkpoint, run.state, new_seed=new_seed)
    run.issues = dict.fromkeys(resume.unpack_issues(checkpoint))
    issues = [issue for issue in run.issues if issue[0] in run.reporter.logs]
    run.reporter.add([{"issues": issues}])
    run.load_state_dict(checkpoint.get("run", {}))
    run.best = _best_so_far(run)  # also after the checkpoint, which metrics.json forgets now
    changes.log_changes(changed, done=run.done, finished=run.finished)
    if run.finished:
        _log_finished(run)
        if path is not None and path.name != resume.FINAL_CHECKPOINT:
            run.saved = 0  # not as the final one


def _log_finished(run: Run) -> None:
    if run.stopped is not None:
        logger.warning(
            "The run was stopped after %d iterations (%s), so it is only evaluated: to train "
            "further, start a new run from its weights (MODEL.WEIGHTS)",
            *(run.done, run.stopped),
        )
        return
    logger.warning(
        "%d iterations are done and SOLVER.MAX_ITER is %d, so the run is only evaluated: increase "
        "SOLVER.MAX_ITER to train further",
        *(run.done, run.cfg.SOLVER.MAX_ITER),
    )


def evaluate(run: Run) -> dict[str, Any]:
    """Evaluate the weights after `run.done` iterations; averaged weights, if any, under "ema".

    Raises:
        TrainingStopped: a signal was received; the state of the callbacks is that before.
    """
    cfg, output_dir, ema = run.cfg, run.output_dir, run.state.ema
    for callback in run.callbacks:
        callback.before_evaluation(run)
    with run.signals.interruptible():
        options = (run.reporter, run.evaluators, run.classes)
        results = evaluate_all(cfg, run.model, output_dir, *options)
        if ema is not None:
            logger.info("Evaluation of the averaged weights (SOLVER.EMA):")
            model = cast(TensorMask, ema.module)
            averaged = evaluate_all(cfg, model, output_dir / "ema", *options)
            results = {**results, "ema": averaged}
        for prefix in ("", "ema/") if ema is not None else ("",):
            folder = output_dir / prefix / "inference"
            drawn = cfg.TEST.NUM_VISUALIZED > 0
            run.writer.write_evaluation(run.done - 1, folder, drawn=drawn, prefix=prefix)
    metrics = events.flatten_results(results)
    run.evaluated, run.results = run.done, results
    for callback in run.callbacks:
        callback.after_evaluation(run, metrics)
    metrics = run.with_logged(metrics)
    _keep_best(run, metrics)
    run.writer.write(run.done - 1, metrics)
    run.writer.write_issues(run.done - 1, run.reporter.pop_record())
    run.agree_on_stop()
    return results


def catch_up_on_evaluation(run: Run) -> None:
    """Evaluate the weights of a checkpoint that was saved before their evaluation.

    If this was done after the checkpoint, only the callbacks learn of it, from metrics.json.
    """
    metrics = distributed.broadcast_object(_recorded_evaluation(run))
    if metrics is None:
        evaluate(run)
    elif run.evaluated != run.done:
        run.evaluated = run.done
        for callback in run.callbacks:
            callback.after_evaluation(run, metrics)
        run.with_logged({})  # metrics.json has it
        run.agree_on_stop()


def _recorded_evaluation(run: Run) -> dict[str, float] | None:
    """Return what metrics.json, as rank 0 reads it, has of the evaluation of these weights."""
    for record in events.read_metrics(run.output_dir / events.METRICS):
        if record["iteration"] == run.done - 1 and not {"total_loss", "issues"} & record.keys():
            return {
                name: math.nan if value is None else value
                for name, value in record.items()
                if name != "iteration"
            }
    return None


def _keep_best(run: Run, metrics: dict[str, float]) -> None:
    """Write `model_best.pth` if the metric is better than all earlier ones in metrics.json."""
    metric = run.cfg.SOLVER.CHECKPOINT_BEST
    if not metric or not distributed.is_main_process():
        return
    if metric in metrics and math.isnan(metrics[metric]):
        logger.warning(
            "SOLVER.CHECKPOINT_BEST: %s is NaN, as AP is without such objects; %s does not change",
            *(metric, resume.BEST_CHECKPOINT),
        )
        return
    if metric not in metrics:
        logger.warning(
            "SOLVER.CHECKPOINT_BEST is %r, which is not a metric of this evaluation, so no best "
            "checkpoint is saved; the metrics are %s",
            *(metric, ", ".join(metrics)),
        )
        return
    if metrics[metric] > _best_so_far(run):
        averaged, results = metric.startswith("ema/"), run.results or {}
        weights = resume.only_weights(_pack(run), averaged=averaged)
        threshold = score_threshold(results["ema"] if averaged else results)
        if threshold is not None:
            weights["score_threshold"] = threshold
        best = resume.write_torch(run.output_dir / resume.BEST_CHECKPOINT, weights)
        logger.info("%s %.4f is the best so far: %s", metric, metrics[metric], best.name)


def _best_so_far(run: Run) -> float:
    """Return the best value of `SOLVER.CHECKPOINT_BEST` in this run; -inf without any."""
    records = events.read_metrics(run.output_dir / events.METRICS)
    values = [record.get(run.cfg.SOLVER.CHECKPOINT_BEST) for record in records]
    return max([run.best, *(value for value in values if value is not None)])


def log_start(run: Run) -> None:
    """Log the iterations, the data and the size of the model."""
    cfg, parameters = run.cfg, list(run.model.parameters())
    logger.info(
        "Training iterations %d to %d, %d images each, on %s; %d images in %s; "
        "%.2f M parameters, %.2f M of them trainable",
        *(run.done, cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, run.device),
        sum(len(get_dataset(name)) for name in cfg.DATASETS.TRAIN),
        ", ".join(cfg.DATASETS.TRAIN) or "no data set",
        sum(p.numel() for p in parameters) / 1e6,
        sum(p.numel() for p in parameters if p.requires_grad) / 1e6,
    )
    logger.info("swap_align2nat: %s", _native.describe(run.device.type))


def log_summary(run: Run, results: dict[str, Any], start: int, seconds: float) -> None:
    """Log the table at the end of a run."""
    flat = events.flatten_results(results)
    output_dir = run.output_dir
    best = output_dir / resume.BEST_CHECKPOINT
    drawings = sorted(output_dir.glob("inference/**/montage.png"))
    rows = {
        "iterations": f"{start} to {run.done}",
        **({"stopped": run.stopped} if run.stopped else {}),
        "time": timedelta(seconds=round(seconds)),
        "most memory": f"{events.peak_memory(run.device):.0f} MiB",
        **{name: f"{value:.2f}" for name, value in flat.items() if name.endswith("/AP")},
        "weights": output_dir / resume.FINAL_CHECKPOINT,
    }
    if best.is_file() and _best_so_far(run) > -math.inf:  # else it is of another run
        rows["best weights"] = best
    if run.cfg.TEST.NUM_VISUALIZED > 0 and drawings:
        rows["drawings"] = ", ".join(map(str, drawings))
    logger.info("Finished\n%s", events.format_summary(rows))
