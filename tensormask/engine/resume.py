"""Checkpoints: everything that a run needs to go on as if it had never stopped.

A checkpoint is a plain dict in `torch.save`'s format, read as data (weight_files.py). Files appear
under their name only when they are complete.
"""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torchvision
import yaml
from torch import nn
from torch.optim.swa_utils import AveragedModel

import tensormask
from tensormask.checkpoint.files import read_checkpoint
from tensormask.config import CfgNode
from tensormask.config.node import leaves
from tensormask.engine.distributed import unwrap
from tensormask.engine.step import TrainState
from tensormask.utils.errors import UserError
from tensormask.utils.files import write_atomically
from tensormask.utils.random import get_random_states, set_random_states

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last_checkpoint"
BEST_CHECKPOINT = "model_best.pth"
FINAL_CHECKPOINT = "model_final.pth"
FINAL_EMA = "model_final_ema.pth"
KEYS = ("model", "optimizer", "scheduler", "iteration", "random_states", "config")
_PERIODIC = re.compile(r"model_(\d{7,})\.pth")


def pack_checkpoint(
    state: TrainState,
    *,
    iteration: int,
    config: str,
    class_names: list[str],
    category_ids: list[int],
    issues: Iterable[tuple] = (),
) -> dict[str, Any]:
    """Make the checkpoint of a run: references to what it holds, no copies.

    The place in the data needs no entry of its own: batches are a function of the seed, which is
    in the config, and of the iteration.

    Args:
        iteration: index, from 0, of the last iteration that is in the weights; detectron2's
            meaning, so `model_0000999.pth` holds 999 and training goes on with 1000.
        config: the run's config as YAML text.
        class_names, category_ids: name and COCO id of each label, in their order.
        issues: those found in training samples, as the samples have them.
    """
    ema = state.ema
    return {
        "model": unwrap(state.model).state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(),
        "scaler": state.scaler.state_dict(),
        "ema": ema and {"model": ema.module.state_dict(), "n_averaged": int(ema.n_averaged)},
        "iteration": iteration,
        "random_states": get_random_states(),
        "issues": [list(issue) for issue in issues],
        "config": config,
        "class_names": list(class_names),
        "category_ids": list(category_ids),
        "versions": {
            "tensormask": tensormask.__version__,
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
        },
    }


def only_weights(checkpoint: dict[str, Any], *, averaged: bool) -> dict[str, Any]:
    """What `MODEL.WEIGHTS` and the predictor read of a checkpoint, its averages or the weights."""
    about = ("iteration", "config", "class_names", "category_ids", "versions")
    weights = checkpoint["ema"]["model"] if averaged else checkpoint["model"]
    return {"model": weights, **{key: checkpoint[key] for key in about}}


def save_checkpoint(output_dir: str | Path, name: str, checkpoint: dict[str, Any]) -> Path:
    """Write the checkpoint `output_dir/name`, then point `last_checkpoint` to it.

    Raises:
        DiskFullError: there is no space for it; `last_checkpoint` names the one before, which is
            whole.
    """
    path = write_torch(Path(output_dir) / name, checkpoint)
    write_atomically(path.parent / LAST_CHECKPOINT, lambda file: file.write(name.encode()))
    return path


def write_torch(path: str | Path, content: dict[str, Any]) -> Path:
    """Write a file of plain data in `torch.save`'s format, whole or not at all."""
    write_atomically(path, lambda file: torch.save(content, file))
    return Path(path)


def remove_old_checkpoints(output_dir: str | Path, num_kept: int, iteration: int) -> None:
    """Remove all `model_<iteration>.pth` but the last `num_kept` up to `iteration`; 0 keeps all.

    Later ones are of an earlier run and stay. So do the final and the best one, and the one that
    `last_checkpoint` names.
    """
    if num_kept < 1:
        return
    matches = (_PERIODIC.fullmatch(path.name) for path in Path(output_dir).iterdir())
    own = sorted((int(m[1]), m[0]) for m in matches if m and int(m[1]) <= iteration)
    pointed = find_last_checkpoint(output_dir)
    for _, name in own[:-num_kept]:
        if pointed is None or name != pointed.name:
            (Path(output_dir) / name).unlink(missing_ok=True)


def find_last_checkpoint(output_dir: str | Path) -> Path | None:
    """Give the checkpoint that `output_dir/last_checkpoint` names; None without such a file.

    Raises:
        ValueError: the file names a checkpoint that is not there, or one of another folder.
    """
    pointer = Path(output_dir) / LAST_CHECKPOINT
    if not pointer.is_file():
        return None
    name = pointer.read_text().strip()
    path = pointer.parent / name
    if name != path.name or not path.is_file():
        raise UserError(
            f"{pointer} names {name!r}, which is no file in {pointer.parent}: "
            f"write the name of one of its checkpoints into it, or start without --resume"
        )
    return path


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this library to the CPU, without running anything that it holds.

    Raises:
        ValueError: the file is broken, or lacks a part that resuming needs.
    """
    checkpoint = read_checkpoint(path)
    missing = [key for key in KEYS if key not in checkpoint]
    if missing:
        raise UserError(
            f"{path} is no checkpoint to resume from, it lacks {', '.join(missing)}: "
            "give it as MODEL.WEIGHTS to start a new run from its weights"
        )
    return checkpoint


def restore_checkpoint(checkpoint: dict[str, Any], state: TrainState) -> int:
    """Put weights, optimiser, schedule, loss scale, averages and random states back.

    Returns:
        The index of the iteration to go on with.

    Raises:
        ValueError: the checkpoint is of another model or another optimiser.
    """
    restore_model(checkpoint, unwrap(state.model))
    # PyTorch takes the state of another kind of optimiser, and fails in its first step.
    saved, current = (
        optimizer["param_groups"]
        for optimizer in (checkpoint["optimizer"], state.optimizer.state_dict())
    )
    if [_layout(group) for group in saved] != [_layout(group) for group in current]:
        raise UserError(
            "The checkpoint's optimiser does not fit this config: its kind, its groups or the "
            "frozen stages differ. Resume with the config.yaml beside the checkpoint"
        )
    state.optimizer.load_state_dict(checkpoint["optimizer"])
    state.scheduler.load_state_dict(checkpoint["scheduler"])
    if state.scaler.is_enabled() and checkpoint.get("scaler"):
        state.scaler.load_state_dict(checkpoint["scaler"])
    if state.ema is not None:
        restore_ema(checkpoint, state.ema)
    set_random_states(checkpoint["random_states"])
    return checkpoint["iteration"] + 1


def restore_ema(checkpoint: dict[str, Any], ema: AveragedModel) -> None:
    """Put the averages back; without any in the checkpoint, they begin with its weights."""
    saved = checkpoint.get("ema")
    if saved is None:
        logger.warning("The checkpoint has no averages (SOLVER.EMA): they begin with its weights")
        saved = {"model": checkpoint["model"], "n_averaged": 1}
    restore_model(saved, ema.module)
    ema.n_averaged.fill_(saved["n_averaged"])


def warn_of_changes(checkpoint: dict[str, Any], cfg: CfgNode) -> None:
    """Say which keys a run resumes with that differ from the checkpoint's.

    With any of them it is not the continuation to the bit of the run that was stopped.
    """
    saved, current = (dict(leaves(yaml.safe_load(t))) for t in (checkpoint["config"], cfg.dump()))
    changes = [
        f"{key} {saved.get(key)} -> {value}"
        for key, value in current.items()
        if saved.get(key) != value and key != "OUTPUT_DIR"
    ]
    if changes:
        logger.warning("Resuming with another config than before: %s", "; ".join(changes))


def _layout(group: dict[str, Any]) -> tuple[set[str], int]:
    return set(group) - {"params"}, len(group["params"])


def restore_model(checkpoint: dict[str, Any], model: nn.Module) -> None:
    """Put the weights back; every one must be there and have its shape.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise UserError(
            "The checkpoint holds another model than this config describes; "
            f"resume with the config.yaml beside it. {error}"
        ) from error


def checkpoint_to_resume(output_dir: str | Path) -> dict | None:
    """Load the last checkpoint of a folder, and say which; None if there is none."""
    path = find_last_checkpoint(output_dir)
    if path is None:
        logger.info("Nothing to resume in %s", output_dir)
        return None
    logger.info("Resuming from %s", path)
    return load_checkpoint(path)
