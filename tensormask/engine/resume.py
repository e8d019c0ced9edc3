"""Checkpoints of a run: what is saved, and how a run resumes as if it had never stopped.

A checkpoint is a dict of tensors and plain data in `torch.save`'s format. Files are written
atomically, so that a file with its final name is complete.
"""

import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision
import yaml
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import tensormask
from tensormask.checkpoint.files import read_checkpoint
from tensormask.config import get_cfg
from tensormask.data.checks.issues import Identity, current_kind
from tensormask.engine.distributed import unwrap
from tensormask.engine.solver import build_optimizer
from tensormask.engine.step import TrainState
from tensormask.utils.errors import UserError
from tensormask.utils.files import expand_home, write_atomically
from tensormask.utils.random import get_random_states, set_random_states

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last_checkpoint"
BEST_CHECKPOINT = "model_best.pth"
FINAL_CHECKPOINT = "model_final.pth"
FINAL_EMA = "model_final_ema.pth"
KEYS = ("model", "optimizer", "scheduler", "iteration", "random_states", "config")
_PERIODIC = re.compile(r"model_(\d{7,})\.pth")

# An issue of a training sample: data set, kind, id.
SampleIssue = tuple[str, str, Identity]


def pack_checkpoint(
    state: TrainState,
    *,
    iteration: int,
    config: str,
    class_names: Sequence[str],
    category_ids: Sequence[Identity],
    issues: Iterable[SampleIssue] = (),
    run: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Make the checkpoint of a run; its tensors are references, not copies.

    The position in the data needs no entry: batches are a function of the seed, which is in the
    config, and of the iteration.

    Args:
        iteration: index, from 0, of the last iteration that the weights include, as in detectron2:
            `model_0000999.pth` has 999, and training continues with 1000.
        config: the run's config as YAML text.
        class_names, category_ids: name and COCO id of each label, in order of the labels.
        issues: the distinct issues of training samples so far.
        run: state of the run and of its callbacks, as `Run.state_dict` returns it.
    """
    ema = state.ema
    return {
        "model": unwrap(state.model).state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "parameter_names": parameter_names(state),
        "scheduler": state.scheduler.state_dict(),
        "scaler": state.scaler.state_dict(),
        "ema": ema and {"model": ema.module.state_dict(), "n_averaged": int(ema.n_averaged)},
        "iteration": iteration,
        "random_states": get_random_states(),
        "issues": pack_issues(issues),
        "run": run or {},
        "config": config,
        "class_names": list(class_names),
        "category_ids": list(category_ids),
        "versions": {
            "tensormask": tensormask.__version__,
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
        },
    }


def pack_issues(issues: Iterable[SampleIssue]) -> dict[str, dict[str, Tensor | list[Identity]]]:
    """Group issues as `{set: {kind: ids}}`; ids are an int64 tensor where all of them fit.

    Example:
        >>> pack_issues([("train", "box_empty", 7), ("train", "box_empty", 9)])
        {'train': {'box_empty': tensor([7, 9])}}
    """
    groups: dict[str, dict[str, list[Identity]]] = {}
    for name, kind, identity in issues:
        groups.setdefault(name, {}).setdefault(kind, []).append(identity)
    return {
        name: {kind: _as_tensor(ids) for kind, ids in kinds.items()}
        for name, kinds in groups.items()
    }


def unpack_issues(checkpoint: dict[str, Any]) -> list[SampleIssue]:
    """Return the issues in a checkpoint, also of earlier versions (a list in "faults")."""
    issues = [tuple(issue) for issue in checkpoint.get("faults", ())]
    for name, kinds in checkpoint.get("issues", {}).items():
        for kind, ids in kinds.items():
            ids = ids.tolist() if isinstance(ids, Tensor) else ids
            issues += [(name, kind, identity) for identity in ids]
    return [(name, current_kind(kind), identity) for name, kind, identity in issues]


def _as_tensor(ids: list[Identity]) -> Tensor | list[Identity]:
    if all(type(i) is int and -(2**63) <= i < 2**63 for i in ids):
        return torch.tensor(ids, dtype=torch.int64)
    return ids


def only_weights(checkpoint: dict[str, Any], *, averaged: bool) -> dict[str, Any]:
    """Return the part of a checkpoint that `MODEL.WEIGHTS` and the predictor read.

    Args:
        averaged: take the averaged weights.
    """
    about = ("iteration", "config", "class_names", "category_ids", "versions")
    weights = checkpoint["ema"]["model"] if averaged else checkpoint["model"]
    return {"model": weights, **{key: checkpoint[key] for key in about}}


def save_checkpoint(output_dir: str | Path, name: str, checkpoint: dict[str, Any]) -> Path:
    """Write the checkpoint `output_dir/name`, then point `last_checkpoint` to it.

    Raises:
        DiskFullError: the disk is full; `last_checkpoint` still names the previous checkpoint,
            which is intact.
    """
    path = write_torch(Path(output_dir) / name, checkpoint)
    write_atomically(path.parent / LAST_CHECKPOINT, lambda file: file.write(name.encode()))
    return path


def write_torch(path: str | Path, content: dict[str, Any]) -> Path:
    """Write a file in `torch.save`'s format atomically."""
    write_atomically(path, lambda file: torch.save(content, file))
    return Path(path)


def store_score_threshold(path: str | Path, threshold: float | None) -> None:
    """Set `score_threshold` in a checkpoint file, atomically, unless it is None or the same.

    Tensors are mapped, not copied to memory (on Windows a mapped file cannot be replaced).
    """
    if threshold is None or not Path(path).is_file():
        return
    content = read_checkpoint(path, mmap=os.name == "posix")
    if content.get("score_threshold") != threshold:
        write_torch(path, {**content, "score_threshold": threshold})


def remove_old_checkpoints(output_dir: str | Path, num_kept: int, iteration: int) -> None:
    """Remove all `model_<iteration>.pth` up to `iteration` but the last `num_kept`; 0 keeps all.

    Later ones belong to an earlier run and are kept. The final and the best checkpoint, and the one
    that `last_checkpoint` names, are kept too.
    """
    if num_kept < 1:
        return
    matches = (_PERIODIC.fullmatch(path.name) for path in Path(output_dir).iterdir())
    periodic = sorted((int(m[1]), m[0]) for m in matches if m and int(m[1]) <= iteration)
    last = find_last_checkpoint(output_dir)
    for _, name in periodic[:-num_kept]:
        if last is None or name != last.name:
            (Path(output_dir) / name).unlink(missing_ok=True)


def find_last_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the checkpoint that `output_dir/last_checkpoint` names; None without such a file.

    Raises:
        UserError: the named checkpoint does not exist in this folder.
    """
    pointer = Path(expand_home(output_dir)) / LAST_CHECKPOINT
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8-sig").strip()
    path = pointer.parent / name
    if name != path.name or not path.is_file():
        raise UserError(
            f"{pointer} names {name!r}, which is not a file in {pointer.parent}: "
            "write the name of an existing checkpoint into it, or start without --resume"
        )
    return path


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this library to the CPU, as data: no code in it is run.

    Raises:
        UserError: the file is damaged, or lacks an entry that resuming needs.
    """
    # Not mapped: the optimizer keeps these tensors, and the file may be replaced or removed.
    checkpoint = read_checkpoint(path, mmap=False)
    missing = [key for key in KEYS if key not in checkpoint]
    if missing:
        raise UserError(
            f"{path} is not a checkpoint to resume from: it lacks {', '.join(missing)}. "
            "Give it as MODEL.WEIGHTS to start a new run from its weights"
        )
    return checkpoint


def restore_checkpoint(
    checkpoint: dict[str, Any], state: TrainState, *, new_seed: bool = False
) -> int:
    """Restore weights, optimizer, schedule, loss scale, averages and random states.

    The optimizer keeps its hyperparameters, and the schedule its form: those of the config, which
    can be another one than that of the checkpoint.

    Args:
        new_seed: keep the random states instead of the checkpoint's.

    Returns:
        The index of the iteration to continue with.

    Raises:
        UserError: the checkpoint has another model or another optimizer.
    """
    restore_model(checkpoint, unwrap(state.model))
    restore_optimizer(checkpoint, state)
    restore_schedule(checkpoint["scheduler"], state)
    if state.scaler.is_enabled() and checkpoint.get("scaler"):
        state.scaler.load_state_dict(checkpoint["scaler"])
    if state.ema is not None:
        restore_ema(checkpoint, state.ema)
    if not new_seed:
        set_random_states(checkpoint["random_states"])
    return checkpoint["iteration"] + 1


def parameter_names(state: TrainState) -> list[str]:
    """Return the model's names of the optimizer's parameters, in the order of its `state_dict`."""
    names = {parameter: name for name, parameter in unwrap(state.model).named_parameters()}
    return [names[p] for group in state.optimizer.param_groups for p in group["params"]]


def restore_optimizer(checkpoint: dict[str, Any], state: TrainState) -> None:
    """Restore the optimizer's state of each parameter, such as its momentum, by the names.

    Groups of parameters can differ, since they follow from learning rates and weight decays.

    Raises:
        UserError: the checkpoint has another optimizer, or other parameters are frozen.
    """
    saved, groups = checkpoint["optimizer"], state.optimizer.state_dict()["param_groups"]
    saved_groups, names = saved["param_groups"], parameter_names(state)
    saved_names = checkpoint.get("parameter_names") or _names_by_config(checkpoint, state)
    # PyTorch accepts the state of another kind of optimizer, and then fails in its first step.
    if set(saved_groups[0]) != set(groups[0]) or sorted(saved_names) != sorted(names):
        raise UserError(
            "The checkpoint's optimizer does not match this config: its type, its groups or the "
            "frozen stages differ. Resume with the config.yaml beside the checkpoint, or start a "
            "new run from its weights (MODEL.WEIGHTS)"
        )
    indices = [index for group in saved_groups for index in group["params"]]
    by_name = {
        name: saved["state"][index]
        for name, index in zip(saved_names, indices, strict=True)
        if index in saved["state"]  # SGD without momentum has no state
    }
    by_index = {index: by_name[name] for index, name in enumerate(names) if name in by_name}
    state.optimizer.load_state_dict({"state": by_index, "param_groups": groups})


def _names_by_config(checkpoint: dict[str, Any], state: TrainState) -> list[str]:
    """Return `parameter_names` for a checkpoint of an earlier version, which lacks them.

    They are those of the optimizer that its config describes; empty if that has other groups.
    """
    cfg = get_cfg()
    saved = yaml.safe_load(checkpoint["config"])["SOLVER"]
    cfg.SOLVER.update({key: value for key, value in saved.items() if key in cfg.SOLVER})
    old = replace(state, optimizer=build_optimizer(cfg, unwrap(state.model)))
    sizes, saved_sizes = (
        [len(group["params"]) for group in groups]
        for groups in (old.optimizer.param_groups, checkpoint["optimizer"]["param_groups"])
    )
    return parameter_names(old) if sizes == saved_sizes else []


def restore_schedule(saved: dict[str, Any], state: TrainState) -> None:
    """Continue the schedule, as the config describes it, at the iteration of a checkpoint."""
    scheduler, iteration = state.scheduler, saved["last_epoch"]
    rates = [
        base_lr * factor(iteration)
        for base_lr, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, lr in zip(state.optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    position = {key: saved[key] for key in ("last_epoch", "_step_count")}
    scheduler.load_state_dict({**scheduler.state_dict(), **position, "_last_lr": rates})


def restore_ema(checkpoint: dict[str, Any], ema: AveragedModel) -> None:
    """Restore the averaged weights; if the checkpoint has none, start from its weights."""
    saved = checkpoint.get("ema")
    if saved is None:
        logger.warning("The checkpoint has no averages (SOLVER.EMA): they start from its weights")
        saved = {"model": checkpoint["model"], "n_averaged": 1}
    restore_model(saved, ema.module)
    ema.n_averaged.fill_(saved["n_averaged"])


def restore_model(checkpoint: dict[str, Any], model: nn.Module) -> None:
    """Restore the weights; names and shapes must match.

    Raises:
        UserError: the checkpoint has another model.
    """
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise UserError(
            "The checkpoint has another model than this config describes; resume with the "
            f"config.yaml beside it, or start a new run from its weights (MODEL.WEIGHTS). {error}"
        ) from error


def checkpoint_to_resume(output_dir: str | Path) -> dict | None:
    """Load the last checkpoint of a folder, and log its name; None without one."""
    path = find_last_checkpoint(output_dir)
    if path is None:
        logger.info("No checkpoint to resume from in %s", output_dir)
        return None
    logger.info("Resuming from %s", path)
    return load_checkpoint(path)
