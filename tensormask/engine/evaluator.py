"""Evaluation of a config's data sets: of a weights file, and of a model in training."""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensormask.checkpoint.downloads import resolve
from tensormask.checkpoint.files import get_description, read_checkpoint
from tensormask.checkpoint.loading import check_complete, load_weights
from tensormask.config import CfgNode
from tensormask.data import (
    CocoDataset,
    IssueReporter,
    build_test_loader,
    check_dataset,
    get_dataset,
)
from tensormask.data.augmentation import build_test_transform
from tensormask.data.catalog import fixed_datasets
from tensormask.data.classes import (
    UNKNOWN,
    Classes,
    log_match,
    match_dataset,
    stored_classes,
)
from tensormask.data.statistics import check_files
from tensormask.data.whole_set import check_sets
from tensormask.engine import distributed
from tensormask.engine.anomaly import check_weights
from tensormask.engine.events import append_issues, flatten_results
from tensormask.engine.memory import evaluation_advice
from tensormask.engine.output_dir import open_output_dir, record_start
from tensormask.engine.resume import (
    FINAL_CHECKPOINT,
    FINAL_EMA,
    LAST_CHECKPOINT,
    checkpoint_to_resume,
    find_last_checkpoint,
    restore_model,
    store_score_threshold,
)
from tensormask.evaluation import evaluate, evaluate_oracle, results_table, verify_results
from tensormask.evaluation.coco import evaluation_mode
from tensormask.evaluation.evaluators import check_evaluator
from tensormask.evaluation.metrics import evaluator_name, explain_zero
from tensormask.evaluation.tta import build_augmented_detector, check_sizes
from tensormask.modeling import TensorMask, build_model
from tensormask.utils.errors import UserError, shorten
from tensormask.utils.files import expand_home
from tensormask.utils.memory import explain_out_of_memory
from tensormask.utils.random import preserved_random_states
from tensormask.visualization.instances import unique_stem

logger = logging.getLogger(__name__)

# Called as evaluator(model, dataset, folder), see `trainer.train`.
Evaluator = Callable[[nn.Module, CocoDataset, Path], Mapping[str, Any]]


@fixed_datasets()
def evaluate_only(
    cfg: CfgNode, resume: bool = False, *, evaluators: Sequence[Evaluator] = ()
) -> dict[str, Any]:
    """Evaluate `MODEL.WEIGHTS`, or with `resume` the last checkpoint in `OUTPUT_DIR`.

    The classes of each data set are matched with those of the weights (`match_dataset`).

    Files go to `OUTPUT_DIR/inference`, and replace those there; in a folder without a training,
    `config.yaml` and `environment.txt` say what was evaluated. A file in `MODEL.WEIGHTS` is not
    changed; with `resume`, the final checkpoint gets the `score_threshold`, as from `train`.

    Args:
        evaluators: as of `train`.

    Returns:
        The results of `evaluate_all`; with `resume` and `SOLVER.EMA` also those of the checkpoint's
        averaged weights, under "ema".

    Raises:
        UserError: an invalid config, data set or weights file, or another run uses `OUTPUT_DIR`.
        UnexpectedResultsError: the results differ from `TEST.EXPECTED_RESULTS`.
    """
    output_dir = Path(expand_home(cfg.OUTPUT_DIR))
    with open_output_dir(output_dir):
        checkpoint = checkpoint_to_resume(output_dir) if resume else None
        content, classes = checkpoint, UNKNOWN
        with distributed.first_on_machine():  # this can download a file and draw a data set
            if content is None and cfg.MODEL.WEIGHTS:
                content = read_checkpoint(resolve(cfg.MODEL.WEIGHTS))
            if content is not None:
                source = "the checkpoint" if checkpoint else cfg.MODEL.WEIGHTS
                classes = stored_classes(cfg, get_description(content), source)
            check_evaluation(cfg, classes)
        reporter = build_issue_reporter(cfg, cfg.DATASETS.TEST)
        model = build_model(cfg)
        if checkpoint is not None:
            restore_model(checkpoint, model)
        elif content is not None:
            loaded = load_weights(model, cfg.MODEL.WEIGHTS, content=content)
            check_complete(loaded, cfg.MODEL.WEIGHTS)
            check_weights(model, cfg.MODEL.WEIGHTS)
        else:
            raise UserError(
                "No weights to evaluate: give MODEL.WEIGHTS path/to/model_final.pth, "
                "or --resume to use the last checkpoint in OUTPUT_DIR"
            )
        del content  # its memory
        # A training's folder keeps the config and the environment of the training.
        if distributed.is_main_process() and not (output_dir / LAST_CHECKPOINT).exists():
            record_start(output_dir, cfg)
        results = evaluate_all(cfg, model, output_dir, reporter, evaluators, classes)
        if checkpoint is not None and cfg.SOLVER.EMA.ENABLED and checkpoint.get("ema"):
            logger.info("Evaluation of the averaged weights (SOLVER.EMA):")
            restore_model(checkpoint["ema"], model)
            averaged = evaluate_all(cfg, model, output_dir / "ema", reporter, evaluators, classes)
            results = {**results, "ema": averaged}
        if checkpoint is not None:
            store_score_thresholds(output_dir, results)
        if distributed.is_main_process():
            append_issues(output_dir, reporter.pop_record())
        reporter.log_new()
        verify_results(cfg.TEST.EXPECTED_RESULTS, results)
        return results


def check_evaluation(cfg: CfgNode, classes: Classes) -> None:
    """Check the evaluation's options and data sets, before hours of training.

    The log has how the classes of each set are matched with those of the model.

    Raises:
        UserError: an invalid test set or option, or a test set with other classes.
    """
    build_test_transform(cfg)
    check_sizes(cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE)
    if cfg.TEST.MAX_DETS < 1:
        raise UserError(f"TEST.MAX_DETS is {cfg.TEST.MAX_DETS}; give 1 or more, such as 100")
    for name in cfg.DATASETS.TEST:
        dataset = get_dataset(name)
        matched = match_dataset(cfg, dataset, classes)
        check_dataset(cfg, matched)
        sizes = map(dataset.image_size, dataset.image_ids)
        check_evaluator(cfg.TEST.EVALUATOR, boundary=cfg.TEST.BOUNDARY_AP, sizes=sizes)
        log_match(dataset, matched, classes)


def evaluate_all(
    cfg: CfgNode,
    model: TensorMask,
    output_dir: str | Path,
    reporter: IssueReporter,
    evaluators: Sequence[Evaluator] = (),
    classes: Classes = UNKNOWN,
) -> dict[str, Any]:
    """Evaluate a model on every set in `DATASETS.TEST`, and log the results.

    Each rank runs the model on its share of the images; `output_dir` must be the same folder for
    all. Every rank returns the same results. The model's mode and the random generators are
    restored. Files are written to `output_dir/inference`, for several sets to one subfolder each.
    `classes` are those of the model; the sets get its labels.

    Returns:
        `{"bbox": {"AP", ...}, "segm": {...}}` in percent, with `TEST.ORACLE_ON` also `"oracle"`:
        the score of ground-truth masks represented in the model's windows, and the metrics of each
        of `evaluators` under its name. Several sets add a level: `{name of the set: {...}}`.
    """
    distributed.sync_buffers(model)
    names = list(dict.fromkeys(cfg.DATASETS.TEST))
    results: dict[str, Any] = {}
    taken: set[str] = set()
    for name in names:
        folder = Path(output_dir) / "inference"
        if len(names) > 1:
            folder /= unique_stem(re.sub(r"[^\w.-]+", "_", name), taken)
        # Training must not depend on whether and when a run is evaluated.
        what, advice = f"the evaluation on {name}", evaluation_advice(cfg)
        with preserved_random_states(), explain_out_of_memory(what, advice):
            dataset = match_dataset(cfg, get_dataset(name), classes)
            results[name] = _evaluate_one(cfg, model, dataset, folder, reporter, evaluators)
    return results[names[0]] if len(names) == 1 else results


def _evaluate_one(
    cfg: CfgNode,
    model: TensorMask,
    dataset: CocoDataset,
    folder: Path,
    reporter: IssueReporter,
    evaluators: Sequence[Evaluator],
) -> dict[str, Any]:
    logger.info("Evaluating on %s: %d images", dataset.name, len(dataset))
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    results = evaluate(
        build_augmented_detector(cfg, model) or model,
        reporter.wrap(build_test_loader(cfg, dataset, rank=rank, world_size=world_size)),
        dataset,
        folder,
        max_dets=cfg.TEST.MAX_DETS,
        evaluator=cfg.TEST.EVALUATOR,
        boundary=cfg.TEST.BOUNDARY_AP,
        num_visualized=cfg.TEST.NUM_VISUALIZED,
        submission_name=Path(cfg.OUTPUT_DIR).resolve().name,
        rank=rank,
        gather=distributed.gather_objects,
    )
    distributed.barrier()  # Rank 0's scoring can take longer than collectives on GPUs wait.
    reporter.add([{"issues": distributed.gather_lists(reporter.pop_new())}])
    oracle = None
    has_windows = isinstance(model, TensorMask) and cfg.MODEL.MASK_ON
    if cfg.TEST.ORACLE_ON and has_windows and dataset.has_annotations:
        oracle = evaluate_oracle(
            model,
            dataset,
            build_test_transform(cfg),
            max_dets=cfg.TEST.MAX_DETS,
            evaluator=cfg.TEST.EVALUATOR,
            rank=rank,
            world_size=world_size,
            gather=distributed.gather_objects,
        ).get("segm")
    if results:  # empty for test-dev, which has no annotations, and above rank 0
        logger.info("Results on %s\n%s", dataset.name, results_table(results, oracle))
        if oracle is not None:
            logger.info("oracle: ground-truth masks at the windows' resolution, a limit of AP")
        explain_zero(dataset.name, results)
        for task, metrics in results.items():
            if "best_f1" in metrics:
                f1, threshold = metrics["best_f1"], metrics["best_f1_threshold"]
                logger.info("%s: best F1 at IoU 0.5 is %.2f, at score %.2f", task, f1, threshold)
        results = results if oracle is None else {**results, "oracle": oracle}
    if rank == 0 and evaluators:
        results = {**results, **_run_evaluators(evaluators, model, dataset, folder, {*results})}
    return distributed.broadcast_object(results)


def _run_evaluators(
    evaluators: Sequence[Evaluator],
    model: TensorMask,
    dataset: CocoDataset,
    folder: Path,
    taken: set[str],
) -> dict[str, dict[str, float]]:
    """Return the metrics of evaluators by their names; `taken` are names that they cannot have."""
    results: dict[str, dict[str, float]] = {}
    for evaluator in evaluators:
        name = evaluator_name(evaluator)
        if name in {*taken, *results, "ema"}:
            raise UserError(f"two evaluators are named {name}: rename the function or class")
        with evaluation_mode(model), torch.no_grad():
            metrics = evaluator(model, dataset, folder)
        try:
            results[name] = {key: float(v) for key, v in flatten_results(metrics).items()}
        except (AttributeError, TypeError, ValueError) as error:
            given = shorten(repr(metrics))
            raise UserError(
                f"evaluator {name} must return a dict of numbers, got {given}"
            ) from error
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in results[name].items())
        logger.info("%s: %s", name, numbers)
    return results


def score_threshold(results: dict[str, Any]) -> float | None:
    """Return the threshold with the best F1 of masks, or of boxes from a model without masks.

    Args:
        results: of `evaluate_all`; of several data sets the first counts that has a threshold.
    """
    own = flatten_results({name: value for name, value in results.items() if name != "ema"})
    for task in ("segm", "bbox"):
        for name, value in own.items():
            if f"/{name}".endswith(f"/{task}/best_f1_threshold"):
                return value
    return None


def store_score_thresholds(output_dir: Path, results: dict[str, Any]) -> None:
    """Add the thresholds of an evaluation of a run's last checkpoint to it, if it is the final one.

    Those of the averaged weights, under "ema" in the results, are for their own file.
    """
    final = output_dir / FINAL_CHECKPOINT
    if distributed.is_main_process() and find_last_checkpoint(output_dir) == final:
        store_score_threshold(final, score_threshold(results))
        store_score_threshold(output_dir / FINAL_EMA, score_threshold(results.get("ema", {})))


def build_issue_reporter(cfg: CfgNode, names: Iterable[str]) -> IssueReporter:
    """Build the reporter of the data sets' issues; log the known ones, and those of whole sets.

    With `DATASETS.STRICT`, all images are opened first.

    Raises:
        UserError: nothing of a set can be used, or a set has issues and `DATASETS.STRICT` is on.
    """
    datasets = {name: get_dataset(name) for name in names}
    if cfg.DATASETS.STRICT:
        for name, dataset in datasets.items():
            logger.info("DATASETS.STRICT: opening all %d images of %s", len(dataset), name)
            for _ in check_files(dataset, cfg.DATALOADER.NUM_WORKERS):
                pass
    check_sets(datasets.values(), strict=cfg.DATASETS.STRICT)
    logs = {name: dataset.issues for name, dataset in datasets.items()}
    return IssueReporter(logs, strict=cfg.DATASETS.STRICT)
