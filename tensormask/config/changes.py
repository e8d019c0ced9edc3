"""What another config than before does to a resumed run: each key is applied, refused or unused."""

import logging
from collections.abc import Mapping
from enum import Enum
from typing import Any

import yaml

from tensormask.config import CfgNode, get_cfg
from tensormask.config.detectron2 import HEAD_SWITCHES
from tensormask.config.node import leaves
from tensormask.utils.errors import UserError, shorten

logger = logging.getLogger(__name__)


class Effect(Enum):
    """What a changed key does when a run is resumed."""

    TRAINED = "applied to the iterations that are left"
    APPLIED = "applied to the rest of the run, also if only an evaluation is left"
    REFUSED = "the weights or the optimizer's state belong to the old value"
    UNUSED = "does not change what is trained"


_HEAD = "MODEL.TENSOR_MASK"
# Names of keys, or of groups, which include all of their keys.
EFFECTS: dict[Effect, tuple[str, ...]] = {
    Effect.TRAINED: (
        *("INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "INPUT.MAX_SIZE_TRAIN"),
        *("INPUT.RANDOM_FLIP", "INPUT.ROTATE_90", "INPUT.SCALE_JITTER", "INPUT.SCALE_JITTER_SIZE"),
        *("INPUT.CROP", "INPUT.ZOOM_OUT", "INPUT.PHOTOMETRIC", "INPUT.COPY_PASTE"),
        *("DATASETS.TRAIN", "SEED"),
        *("DATALOADER.ASPECT_RATIO_GROUPING", "DATALOADER.FILTER_EMPTY_ANNOTATIONS"),
        *("DATALOADER.SAMPLER_TRAIN", "DATALOADER.REPEAT_THRESHOLD", "DATALOADER.REPEAT_SQRT"),
        *(f"{_HEAD}.FOCAL_LOSS_GAMMA", f"{_HEAD}.FOCAL_LOSS_ALPHA", f"{_HEAD}.MASK_LOSS_WEIGHT"),
        *(f"{_HEAD}.POSITIVE_WEIGHT", f"{_HEAD}.CHECKPOINT_ACTIVATIONS"),
        *(f"{_HEAD}.ASSIGNMENT", f"{_HEAD}.ASSIGN_RADIUS", f"{_HEAD}.ASSIGN_TOPK"),
        f"{_HEAD}.DICE_LOSS_WEIGHT",
        *(f"{_HEAD}.BBOX_REG_LOSS_WEIGHT", f"{_HEAD}.CLS_LOSS"),
        *(f"{_HEAD}.MASK_IOU_LOSS_WEIGHT", f"{_HEAD}.QUERY_SAMPLE"),
        *("SOLVER.LR_SCHEDULER_NAME", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.GAMMA"),
        *("SOLVER.BASE_LR", "SOLVER.BASE_LR_END", "SOLVER.BIAS_LR_FACTOR"),
        *("SOLVER.WARMUP_FACTOR", "SOLVER.WARMUP_ITERS", "SOLVER.WARMUP_METHOD"),
        *("SOLVER.WARMUP_SHARE", "SOLVER.PATIENCE"),
        *("SOLVER.WEIGHT_DECAY", "SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_BIAS"),
        *("SOLVER.MOMENTUM", "SOLVER.NESTEROV", "SOLVER.CLIP_GRADIENTS"),
        *("SOLVER.IMS_PER_BATCH", "SOLVER.ACCUMULATE_STEPS", "SOLVER.REFERENCE_WORLD_SIZE"),
        "SOLVER.REDUCE_DTYPE",
        *("SOLVER.AMP", "SOLVER.EMA.DECAY", "SOLVER.EMA.WARMUP", "SOLVER.DETECT_ANOMALY"),
        *("SOLVER.CHECKPOINT_PERIOD", "SOLVER.CHECKPOINT_MAX_TO_KEEP"),
    ),
    Effect.APPLIED: (
        *("MODEL.SIZE_DIVISOR", "MODEL.CHANNELS_LAST", "MODEL.COMPILE", "SOLVER.EMA.ENABLED"),
        *(f"{_HEAD}.SCORE_THRESH_TEST", f"{_HEAD}.TOPK_CANDIDATES_TEST"),
        *(f"{_HEAD}.NMS_THRESH_TEST", f"{_HEAD}.NMS_ON", f"{_HEAD}.MASK_UNIT"),
        f"{_HEAD}.QUERY_THRESH",
        *("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "DATASETS.TEST", "DATASETS.STRICT"),
        *("DATASETS.MATCH_CLASSES", "SOLVER.CHECKPOINT_BEST", "TEST"),
        *("CUDNN_BENCHMARK", "DETERMINISTIC", "FLOAT32_PRECISION"),
    ),
    Effect.REFUSED: (
        *("MODEL.META_ARCHITECTURE", "MODEL.MASK_ON", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"),
        *("MODEL.BACKBONE", "MODEL.RESNETS", "MODEL.FPN", "MODEL.ANCHOR_GENERATOR"),
        *(f"{_HEAD}.IN_FEATURES", f"{_HEAD}.NUM_CONVS", f"{_HEAD}.CLS_CHANNELS"),
        *(f"{_HEAD}.BBOX_CHANNELS", f"{_HEAD}.MASK_CHANNELS", f"{_HEAD}.NUM_CLASSES"),
        *(f"{_HEAD}.BBOX_REG_WEIGHTS", f"{_HEAD}.HEAD", f"{_HEAD}.ALIGNED_ON"),
        *(f"{_HEAD}.BIPYRAMID_ON", f"{_HEAD}.UPSCALE_LAMBDA", f"{_HEAD}.UPSCALE_MODE"),
        *(f"{_HEAD}.NORM", f"{_HEAD}.BOX_ON", f"{_HEAD}.MASK_IOU_ON"),
        *(f"{_HEAD}.QUERY_ON", f"{_HEAD}.QUERY_LEVELS"),
        *("INPUT.FORMAT", "SOLVER.OPTIMIZER"),
    ),
    Effect.UNUSED: (
        *("VERSION", "OUTPUT_DIR", "MODEL.DEVICE", "MODEL.WEIGHTS", f"{_HEAD}.INIT"),
        *("INPUT.MASK_FORMAT", "DATALOADER.NUM_WORKERS", "DATALOADER.TIMEOUT"),
    ),
}
_EFFECT_OF = {name: effect for effect, names in EFFECTS.items() for name in names}
# Keys without effect unless another one has a certain value; those beside ENABLED need it, too.
_NEEDS: dict[str, tuple[str, object]] = {
    **dict.fromkeys(("SOLVER.MOMENTUM", "SOLVER.NESTEROV"), ("SOLVER.OPTIMIZER", "SGD")),
    **dict.fromkeys(
        ("SOLVER.STEPS", "SOLVER.GAMMA"), ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR")
    ),
    "SOLVER.BASE_LR_END": ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"),
    "SOLVER.WARMUP_ITERS": ("SOLVER.WARMUP_SHARE", 0.0),
}

# By effect the changed keys, each with its old and its new value.
Changes = dict[Effect, dict[str, tuple[object, object]]]


def effect_of(key: str) -> Effect:
    """Return the effect of a key of the config.

    Example:
        >>> effect_of("SOLVER.BASE_LR").name, effect_of("TEST.AMP.ENABLED").name
        ('TRAINED', 'APPLIED')
    """
    name = key
    while name not in _EFFECT_OF:
        name = name[: name.rindex(".")]
    return _EFFECT_OF[name]


def find_changes(saved: str, cfg: CfgNode, *, done: int = 0) -> Changes:
    """Return the keys whose values differ from those in the config of a checkpoint.

    Args:
        saved: YAML text. A key that it lacks, because it is of an earlier version, has its default.
        done: the number of iterations so far.
    """
    defaults, old, new = (
        dict(leaves(yaml.safe_load(text) or {})) for text in (get_cfg().dump(), saved, cfg.dump())
    )
    old = defaults | old
    for values in (old, new):
        values[f"{_HEAD}.HEAD"] = _head(values)
    changes: Changes = {effect: {} for effect in Effect}
    for key, value in new.items():
        if old[key] != value:
            effect = effect_of(key) if _is_used(key, old, new, done) else Effect.UNUSED
            changes[effect][key] = (old[key], value)
    return changes


def _is_used(key: str, old: Mapping[str, Any], new: Mapping[str, Any], done: int) -> bool:
    """Return whether a changed key has its effect with the other values of the config."""
    group, _, leaf = key.rpartition(".")
    if leaf.startswith("WARMUP_") and done >= max(_warmup_end(old), _warmup_end(new)):
        return False
    switch, needed = _NEEDS.get(key, (f"{group}.ENABLED", True))
    return key == switch or new.get(switch, needed) == needed


def _warmup_end(values: Mapping[str, Any]) -> int:
    names = ("WARMUP_SHARE", "WARMUP_ITERS", "MAX_ITER")
    return warmup_iterations(*(values[f"SOLVER.{name}"] for name in names))


def warmup_iterations(share: float, iterations: int, max_iter: int) -> int:
    """Return the length of the warm-up: a share of the run, or if that is 0 a number of iterations.

    Example:
        >>> warmup_iterations(0.03, 1000, 1500), warmup_iterations(0.0, 1000, 1500)
        (45, 1000)
    """
    return min(round(share * max_iter), max_iter - 1) if share > 0 else iterations


def _head(values: dict[str, object]) -> object:
    """Return the mask head; with "auto", that of the switches."""
    switches = (values[f"{_HEAD}.ALIGNED_ON"], values[f"{_HEAD}.BIPYRAMID_ON"])
    of_switches = [name for name, has in HEAD_SWITCHES.items() if has == switches]
    head = values[f"{_HEAD}.HEAD"]
    return of_switches[0] if head == "auto" and of_switches else head


def check_changes(changes: Changes, checkpoint: object) -> None:
    """Refuse the changes that a run cannot have in the middle.

    Args:
        checkpoint: the name of the file, for the message.

    Raises:
        UserError: there is one.
    """
    if refused := changes[Effect.REFUSED]:
        raise UserError(
            f"--resume cannot change {_format(refused)}: the weights or the optimizer's state in "
            f"the checkpoint belong to the old value. Resume with the old value, or start a new "
            f"run from these weights: MODEL.WEIGHTS {checkpoint}, without --resume"
        )


def log_changes(changes: Changes, *, done: int, finished: bool) -> None:
    """Log all changes with their effects, old and new values.

    Args:
        done: the number of iterations so far.
        finished: none is left.
    """
    applied, unused = dict(changes[Effect.APPLIED]), dict(changes[Effect.UNUSED])
    (unused if finished else applied).update(changes[Effect.TRAINED])
    if applied:
        start = "to the evaluation" if finished else f"from iteration {done} on"
        logger.warning(
            "Resuming with another config than before, applied %s: %s", start, _format(applied)
        )
    if unused:
        logger.warning("Other config values without effect on this run: %s", _format(unused))
    batch = "SOLVER.IMS_PER_BATCH"
    if not finished and batch in applied:
        logger.warning(
            "%s: the %d iterations so far had %s images each; MAX_ITER, STEPS and the periods "
            "count iterations of any size",
            *(batch, done, applied[batch][0]),
        )


def _format(changes: dict[str, tuple[object, object]]) -> str:
    return "; ".join(
        f"{key} {shorten(str(old)) or '(empty)'} -> {shorten(str(new)) or '(empty)'}"
        for key, (old, new) in changes.items()
    )
