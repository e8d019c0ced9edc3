"""Names of the metrics that the evaluations of a run give, and what an AP of 0 can mean."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tensormask.config import CfgNode
from tensormask.data import CocoDataset
from tensormask.evaluation.scoring import AREA_RANGES
from tensormask.utils.errors import UserError, nearest_name, shorten

logger = logging.getLogger(__name__)

_TASKS = {"bbox": "boxes", "segm": "masks"}
_SHOWN_AS_ZERO = 0.005  # in percent, with two digits


def check_metrics(
    cfg: CfgNode,
    test_sets: Iterable[CocoDataset],
    wanted: Iterable[tuple[str, str]],
    *,
    evaluators: Iterable[object] = (),
    own_model: bool = False,
    can_log: bool = False,
) -> None:
    """Check the names of metrics that a run needs, before hours of training.

    Args:
        test_sets: those of `DATASETS.TEST`.
        wanted: pairs of what wants a metric, such as "SOLVER.CHECKPOINT_BEST", and its name.
        evaluators: those of `train`, whose metrics are known only after an evaluation.
        own_model: the model can have masks although `MODEL.MASK_ON` is off.
        can_log: callbacks can add metrics: an unknown name is a warning only.

    Raises:
        UserError: no evaluation gives one of these metrics.
    """
    sets = dict(zip(cfg.DATASETS.TEST, test_sets, strict=True))
    prefixes = {name: f"{name}/" if len(sets) > 1 else "" for name in sets}
    averages = ("", "ema/") if cfg.SOLVER.EMA.ENABLED else ("",)
    known = [
        f"{average}{prefixes[name]}{metric}"
        for average in averages
        for name, dataset in sets.items()
        for metric in _metrics_of_set(cfg, dataset, own_model)
    ]
    own = tuple(
        f"{average}{prefix}{evaluator_name(evaluator)}/"
        for average in averages
        for prefix in prefixes.values()
        for evaluator in evaluators
    )
    for source, name in wanted:
        if name in known or name.startswith(own):
            continue
        message = f"{source} is {shorten(name)!r}, but {_reason(cfg, name, known)}"
        if not can_log:
            raise UserError(message)
        logger.warning("%s; or does a callback log it?", message)


def evaluator_name(evaluator: object) -> str:
    """Return the name of an evaluator's results: that of the function, or of the object's class."""
    return getattr(evaluator, "__name__", type(evaluator).__name__)


def _metrics_of_set(cfg: CfgNode, dataset: CocoDataset, own_model: bool) -> Iterator[str]:
    if not dataset.has_annotations:
        return
    max_dets = cfg.TEST.MAX_DETS
    names = ["AP", "AP50", "AP75", *AREA_RANGES, "best_f1", "best_f1_threshold"]
    names += [f"AP@{max_dets}", f"AR@{max_dets}"] * (max_dets != 100)
    counts = Counter(dataset.class_names)
    for name, category in zip(dataset.class_names, dataset.category_ids, strict=True):
        names.append(f"AP-{name}" if counts[name] == 1 else f"AP-{name} (id {category})")
    tasks = ["bbox"]
    tasks += ["segm"] * (cfg.MODEL.MASK_ON or own_model)
    tasks += ["boundary"] * (cfg.TEST.BOUNDARY_AP and "segm" in tasks)
    tasks += ["oracle"] * (cfg.MODEL.MASK_ON and cfg.TEST.ORACLE_ON)
    for task in tasks:
        yield from (f"{task}/{name}" for name in names)


def _reason(cfg: CfgNode, name: str, known: Sequence[str]) -> str:
    """Say why a metric is not known."""
    if not cfg.DATASETS.TEST:
        return "DATASETS.TEST is empty, so that nothing is evaluated"
    if not known:
        return "no set in DATASETS.TEST has annotations, so that nothing is scored"
    text = f"no evaluation of this run gives that; the nearest name is {nearest_name(name, known)}"
    parts = name.split("/")
    for part, key, switched_on in (
        ("ema", "SOLVER.EMA.ENABLED", cfg.SOLVER.EMA.ENABLED),
        ("segm", "MODEL.MASK_ON", cfg.MODEL.MASK_ON),
        ("boundary", "TEST.BOUNDARY_AP", cfg.TEST.BOUNDARY_AP),
        ("oracle", "TEST.ORACLE_ON", cfg.TEST.ORACLE_ON),
    ):
        if part in parts and not switched_on:
            text += f" ({key} is False)"
    others = [other for other in known if "/AP-" not in other]
    return f"{text}. Known: {', '.join(others)}, and AP-<class> of these"


def explain_zero(name: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Log the likely causes if a set with objects has an AP of 0.00.

    Args:
        name: of the data set.
        results: by "bbox" and "segm"; an AP without objects is NaN.
    """
    scores = {what: results.get(task, {}).get("AP", math.nan) for task, what in _TASKS.items()}
    zeros = [what for what, score in scores.items() if score < _SHOWN_AS_ZERO]
    if zeros == ["masks"] and scores["boxes"] >= _SHOWN_AS_ZERO:
        logger.warning(
            "The masks on %s have an AP of 0.00, but not the boxes. Likely causes: weights without "
            "this mask head, or of another one (MODEL.TENSOR_MASK.HEAD, MODEL.WEIGHTS); too few "
            "iterations; masks in the annotations that do not fit their boxes (tensormask check)",
            name,
        )
    elif zeros:
        logger.warning(
            "The %s on %s, which has objects, have an AP of 0.00. Likely causes: too few "
            "iterations, or a learning rate near 0 (SOLVER.MAX_ITER, BASE_LR, WARMUP_ITERS, for "
            "averages also EMA.DECAY); weights that are not trained, or of another config "
            "(MODEL.WEIGHTS, INPUT.FORMAT, MODEL.PIXEL_MEAN); classes in another order; windows or "
            "images of another size than the objects need (MODEL.ANCHOR_GENERATOR.SIZES, "
            "INPUT.MIN_SIZE_TEST; TEST.ORACLE_ON shows it); annotations that do not fit the images "
            "(tensormask check)",
            *(" and ".join(zeros), name),
        )
