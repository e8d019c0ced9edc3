"""A run between its iterations: save checkpoints, evaluate, keep the best weights, log."""

import logging
import math
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from tensormask.config import CfgNode
from tensormask.data import IssueReporter, get_dataset
from tensormask.engine import distributed, events, resume
from tensormask.engine.evaluator import evaluate_all, score_threshold
from tensormask.engine.step import TrainState
from tensormask.layers import _native
from tensormask.modeling import TensorMask

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Config, training state and reporting of a run."""

    cfg: CfgNode
    state: TrainState
    writer: events.MetricsWriter
    reporter: IssueReporter
    issues: dict[resume.SampleIssue, None]  # of training samples, in order of their detection


def save(run: Run, done: int) -> None:
    """Write the checkpoint after `done` iterations, and remove the oldest ones."""
    if not distributed.is_main_process():
        return
    output_dir = run.cfg.OUTPUT_DIR
    checkpoint = _pack(run, done)
    if done < run.cfg.SOLVER.MAX_ITER:
        resume.save_checkpoint(output_dir, f"model_{done - 1:07d}.pth", checkpoint)
    else:
        if run.state.ema is not None:
            averages = resume.only_weights(checkpoint, averaged=True)
            resume.write_torch(Path(output_dir) / resume.FINAL_EMA, averages)
        resume.save_checkpoint(output_dir, resume.FINAL_CHECKPOINT, checkpoint)
    resume.remove_old_checkpoints(output_dir, run.cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP, done - 1)


def _pack(run: Run, done: int) -> dict:
    dataset = get_dataset(run.cfg.DATASETS.TRAIN[0])
    return resume.pack_checkpoint(
        run.state,
        iteration=done - 1,
        config=run.cfg.dump(),
        class_names=dataset.class_names,
        category_ids=dataset.category_ids,
        issues=run.issues,
    )


def evaluate(run: Run, done: int) -> dict[str, Any]:
    """Evaluate the weights after `done` iterations; averaged weights, if any, under "ema"."""
    cfg, output_dir = run.cfg, Path(run.cfg.OUTPUT_DIR)
    model, ema = distributed.unwrap(run.state.model), run.state.ema
    results = evaluate_all(cfg, model, output_dir, run.reporter)
    if ema is not None:
        logger.info("Evaluation of the averaged weights (SOLVER.EMA):")
        averages = cast(TensorMask, ema.module)
        averaged = evaluate_all(cfg, averages, output_dir / "ema", run.reporter)
        results = {**results, "ema": averaged}
    for prefix in ("", "ema/") if ema is not None else ("",):
        folder = output_dir / prefix / "inference"
        drawn = cfg.TEST.NUM_VISUALIZED > 0
        run.writer.write_evaluation(done - 1, folder, drawn=drawn, prefix=prefix)
    _keep_best(run, done, results)
    run.writer.write(done - 1, events.flatten_results(results))
    run.writer.write_issues(done - 1, run.reporter.pop_record())
    return results


def store_score_thresholds(run: Run, results: dict[str, Any]) -> None:
    """Add the thresholds of the last evaluation to the final checkpoints, which it evaluated."""
    folder = Path(run.cfg.OUTPUT_DIR)
    last = resume.find_last_checkpoint(folder)
    if distributed.is_main_process() and last == folder / resume.FINAL_CHECKPOINT:
        resume.store_score_threshold(last, score_threshold(results))
        averaged = score_threshold(results.get("ema", {}))
        resume.store_score_threshold(folder / resume.FINAL_EMA, averaged)


def _keep_best(run: Run, done: int, results: dict[str, Any]) -> None:
    """Write `model_best.pth` if the metric is better than all earlier ones in metrics.json."""
    metric, output_dir = run.cfg.SOLVER.CHECKPOINT_BEST, Path(run.cfg.OUTPUT_DIR)
    if not metric or not distributed.is_main_process():
        return
    metrics = events.flatten_results(results)
    if metric not in metrics:
        logger.warning(
            "SOLVER.CHECKPOINT_BEST is %r, which is not a metric of this evaluation, so no best "
            "checkpoint is saved; the metrics are %s",
            *(metric, ", ".join(metrics)),
        )
        return
    records = events.read_metrics(output_dir / events.METRICS)
    earlier = [record[metric] for record in records if record.get(metric) is not None]
    if metrics[metric] > max(earlier, default=-math.inf):
        averaged = metric.startswith("ema/")
        weights = resume.only_weights(_pack(run, done), averaged=averaged)
        if threshold := score_threshold(results["ema"] if averaged else results):
            weights["score_threshold"] = threshold
        best = resume.write_torch(output_dir / resume.BEST_CHECKPOINT, weights)
        logger.info("%s %.4f is the best so far: %s", metric, metrics[metric], best.name)


def is_evaluated(run: Run, done: int) -> bool:
    """Return whether metrics.json, as rank 0 reads it, has results after `done` iterations."""
    evaluated = any(
        record["iteration"] == done - 1 and not {"total_loss", "issues"} & record.keys()
        for record in events.read_metrics(Path(run.cfg.OUTPUT_DIR) / events.METRICS)
    )
    return distributed.broadcast_object(evaluated)


def log_start(run: Run, start: int) -> None:
    """Log the iterations, the data and the size of the model."""
    cfg, parameters = run.cfg, list(run.state.model.parameters())
    logger.info(
        "Training iterations %d to %d, %d images each, on %s; %d images in %s; "
        "%.2f M parameters, %.2f M of them trainable",
        *(start, cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, parameters[0].device),
        sum(len(get_dataset(name)) for name in cfg.DATASETS.TRAIN),
        ", ".join(cfg.DATASETS.TRAIN),
        sum(p.numel() for p in parameters) / 1e6,
        sum(p.numel() for p in parameters if p.requires_grad) / 1e6,
    )
    logger.info("swap_align2nat: %s", _native.describe(parameters[0].device.type))


def log_summary(run: Run, results: dict[str, Any], start: int, seconds: float) -> None:
    """Log the table at the end of a run."""
    flat = events.flatten_results(results)
    output_dir = Path(run.cfg.OUTPUT_DIR)
    best = output_dir / resume.BEST_CHECKPOINT
    drawings = sorted(output_dir.glob("inference/**/montage.png"))
    rows = {
        "iterations": f"{start} to {run.cfg.SOLVER.MAX_ITER}",
        "time": timedelta(seconds=round(seconds)),
        "most memory": f"{events.peak_memory(next(run.state.model.parameters()).device):.0f} MiB",
        **{name: f"{value:.2f}" for name, value in flat.items() if name.endswith("/AP")},
        "weights": output_dir / resume.FINAL_CHECKPOINT,
    }
    if run.cfg.SOLVER.CHECKPOINT_BEST and best.is_file():
        rows["best weights"] = best
    if run.cfg.TEST.NUM_VISUALIZED > 0 and drawings:
        rows["drawings"] = ", ".join(map(str, drawings))
    logger.info("Finished\n%s", events.format_summary(rows))
