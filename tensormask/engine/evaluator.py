"""Evaluation of a config: of weights by themselves, and of a model while it is trained."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from tensormask.checkpoint.loading import check_complete, load_weights
from tensormask.config import CfgNode
from tensormask.data import (
    CocoDataset,
    IssueReporter,
    build_test_loader,
    check_dataset,
    get_dataset,
)
from tensormask.data.statistics import check_files
from tensormask.data.transforms import build_test_transform
from tensormask.engine.distributed import (
    broadcast_object,
    first_on_machine,
    gather_lists,
    gather_objects,
    get_rank,
    get_world_size,
    is_main_process,
    sync_buffers,
)
from tensormask.engine.events import append_issues, setup_logging
from tensormask.engine.resume import checkpoint_to_resume, restore_model
from tensormask.engine.run_folder import lock_folder
from tensormask.evaluation import evaluate, evaluate_oracle, results_table, verify_results
from tensormask.modeling import build_model
from tensormask.utils.errors import UserError
from tensormask.utils.random import preserved_random_states
from tensormask.visualization.instances import unique_stem

logger = logging.getLogger(__name__)


def evaluate_only(cfg: CfgNode, resume: bool = False) -> dict[str, dict[str, float]]:
    """Evaluate the weights in `MODEL.WEIGHTS`, or with `resume` the last checkpoint's.

    Returns:
        The results, as `evaluate_all` gives them; with `resume` and `SOLVER.EMA` also those of the
        checkpoint's averaged weights, under "ema".

    Raises:
        ValueError: something in the config, the data or the weights does not fit, or a run uses the
            folder.
        UnexpectedResultsError: the results are not those of `TEST.EXPECTED_RESULTS`.
    """
    output_dir = Path(cfg.OUTPUT_DIR)
    with lock_folder(output_dir):
        if is_main_process():
            setup_logging(output_dir)
        checkpoint = checkpoint_to_resume(output_dir) if resume else None
        with first_on_machine():  # a set may be drawn now
            check_evaluation(cfg)
        reporter = build_issue_reporter(cfg, cfg.DATASETS.TEST)
        model = build_model(cfg)
        if checkpoint is not None:
            restore_model(checkpoint, model)
        elif cfg.MODEL.WEIGHTS:
            with first_on_machine():  # a file may be downloaded now
                loaded = load_weights(model, cfg.MODEL.WEIGHTS)
            check_complete(loaded, cfg.MODEL.WEIGHTS)
        else:
            raise UserError(
                "There are no weights to evaluate: give MODEL.WEIGHTS path/to/model_final.pth, "
                "or --resume to take the last checkpoint in OUTPUT_DIR"
            )
        results = evaluate_all(cfg, model, output_dir, reporter)
        if checkpoint is not None and cfg.SOLVER.EMA.ENABLED and checkpoint.get("ema"):
            logger.info("The same with averaged weights (SOLVER.EMA):")
            restore_model(checkpoint["ema"], model)
            averaged = evaluate_all(cfg, model, output_dir / "ema", reporter)
            results = {**results, "ema": averaged}
        if is_main_process():
            append_issues(output_dir, reporter.pop_record())
        reporter.log_found()
        verify_results(cfg.TEST.EXPECTED_RESULTS, results)
        return results


def check_evaluation(cfg: CfgNode, trained_on: CocoDataset | None = None) -> None:
    """Find mistakes that would else come up only in the evaluation, after hours of training.

    Args:
        trained_on: the set whose classes the test sets must have; an evaluation by itself needs
            no training data.

    Raises:
        ValueError: a test set or an option of the evaluation does not fit.
    """
    build_test_transform(cfg)
    if cfg.TEST.MAX_DETS < 1:
        raise UserError(f"TEST.MAX_DETS is {cfg.TEST.MAX_DETS}; give 1 or more, such as 100")
    for name in cfg.DATASETS.TEST:
        dataset = get_dataset(name)
        check_dataset(cfg, dataset)
        if trained_on is None or dataset.class_names == trained_on.class_names:
            continue
        if sorted(dataset.class_names) == sorted(trained_on.class_names):
            raise UserError(
                f"{name} and {trained_on.name} have their classes in another order, "
                f"{dataset.class_names} and {trained_on.class_names}: give them equal category ids"
            )
        logger.warning(
            "%s and %s name their classes differently, %s and %s; they are matched by their order",
            *(name, trained_on.name, dataset.class_names, trained_on.class_names),
        )


def evaluate_all(
    cfg: CfgNode, model: nn.Module, output_dir: str | Path, reporter: IssueReporter
) -> dict[str, dict[str, float]]:
    """Evaluate on every set in `DATASETS.TEST`, and log the results.

    Several processes take a part of the images each; `output_dir` must be the same folder for
    all. The results are the same in all of them.

    The model's mode and the random generators are afterwards as they were before. Files go to
    `output_dir/inference`, with several sets to a folder for each below it.

    Returns:
        `{"bbox": {"AP", ...}, "segm": {...}}` in percent, with `TEST.ORACLE_ON` also `"oracle"`:
        what true masks score that are seen through the windows. With several sets this is nested
        once more: `{set's name: {"bbox": ...}}`.
    """
    sync_buffers(model)
    names = list(dict.fromkeys(cfg.DATASETS.TEST))
    results, taken = {}, set()
    for name in names:
        folder = Path(output_dir) / "inference"
        if len(names) > 1:
            folder /= unique_stem(re.sub(r"[^\w.-]+", "_", name), taken)
        # A run that is evaluated on the way must train like one that is not.
        with preserved_random_states():
            results[name] = _evaluate_one(cfg, model, name, folder, reporter)
    return results[names[0]] if len(names) == 1 else results


def _evaluate_one(
    cfg: CfgNode, model: nn.Module, name: str, folder: Path, reporter: IssueReporter
) -> dict[str, dict[str, float]]:
    dataset = get_dataset(name)
    logger.info("Evaluating on %s: %d images", name, len(dataset))
    rank, world_size = get_rank(), get_world_size()
    results = evaluate(
        model,
        reporter.watch(build_test_loader(cfg, dataset, rank=rank, world_size=world_size)),
        dataset,
        folder,
        max_dets=cfg.TEST.MAX_DETS,
        num_visualized=cfg.TEST.NUM_VISUALIZED,
        submission_name=Path(cfg.OUTPUT_DIR).resolve().name,
        rank=rank,
        gather=gather_objects,
    )
    reporter.take([{"issues": gather_lists(reporter.pop_found())}])
    if results:  # none: test-dev, where nothing is there to compare with, and above rank 0
        oracle = None
        if cfg.TEST.ORACLE_ON and cfg.MODEL.MASK_ON:
            oracle = evaluate_oracle(
                model, dataset, build_test_transform(cfg), max_dets=cfg.TEST.MAX_DETS
            )["segm"]
        logger.info("Results on %s\n%s", name, results_table(results, oracle))
        results = results if oracle is None else {**results, "oracle": oracle}
    return broadcast_object(results)


def build_issue_reporter(cfg: CfgNode, names: Iterable[str]) -> IssueReporter:
    """The reporter of the issues of some data sets; says those that are known already.

    With `DATASETS.STRICT` all images are opened first.

    Raises:
        ValueError: there are issues and `DATASETS.STRICT` is on.
    """
    datasets = {name: get_dataset(name) for name in names}
    if cfg.DATASETS.STRICT:
        for name, dataset in datasets.items():
            logger.info("DATASETS.STRICT: opening all %d images of %s", len(dataset), name)
            for _ in check_files(dataset, cfg.DATALOADER.NUM_WORKERS):
                pass
    logs = {name: dataset.issues for name, dataset in datasets.items()}
    return IssueReporter(logs, strict=cfg.DATASETS.STRICT)
