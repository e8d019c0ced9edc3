"""Checkpoints: everything that a run needs to go on as if it had never stopped.

A checkpoint is a plain dict in `torch.save`'s format, read as data (weight_files.py). Files appear
under their name only when they are complete.
"""

import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torchvision
from torch import nn

import tensormask
from tensormask.engine.weight_files import read_checkpoint

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last_checkpoint"
KEYS = ("model", "optimizer", "scheduler", "iteration", "random_states", "config")


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that `path` holds, at any moment, all of the old content or of the new.

    The content goes to a temporary name in the same folder, reaches the disk, and is renamed.
    What fails on the way leaves `path` alone and no temporary file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # Without this a power cut can undo the rename. Windows has no such call.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def get_random_states() -> dict[str, Any]:
    """Read the states of Python's, NumPy's and PyTorch's global generators as plain data."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (the global one)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put the global generators into `states`, as `get_random_states` gave them.

    The states of GPUs are left out where this machine has another number of them.
    """
    random.setstate(states["python"])
    name, keys, position, has_gauss, cached = states["numpy"]
    numpy_state = (name, keys.numpy().astype(np.uint32), position, has_gauss, cached)
    np.random.set_state(numpy_state)  # noqa: NPY002 (the global one)
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


@contextmanager
def preserved_random_states() -> Iterator[None]:
    """Run a block whose use of the global generators leaves no trace after it."""
    states = get_random_states()
    try:
        yield
    finally:
        set_random_states(states)


def save_checkpoint(
    output_dir: str | Path,
    name: str,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    iteration: int,
    config: str,
    class_names: list[str],
    category_ids: list[int],
) -> Path:
    """Write the checkpoint `output_dir/name`, then point `last_checkpoint` to it.

    Args:
        iteration: index, from 0, of the last iteration that is in the weights; detectron2's
            meaning, so `model_0000999.pth` holds 999 and training goes on with 1000.
        config: the run's config as YAML text.
        class_names, category_ids: name and COCO id of each label, in their order.

    Returns:
        The path of the checkpoint.
    """
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "iteration": iteration,
        "random_states": get_random_states(),
        "config": config,
        "class_names": list(class_names),
        "category_ids": list(category_ids),
        "versions": {
            "tensormask": tensormask.__version__,
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
        },
    }
    path = Path(output_dir) / name
    write_atomically(path, lambda file: torch.save(checkpoint, file))
    write_atomically(path.parent / LAST_CHECKPOINT, lambda file: file.write(name.encode()))
    return path


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
        raise ValueError(
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
        raise ValueError(
            f"{path} is no checkpoint to resume from, it lacks {', '.join(missing)}: "
            "give it as MODEL.WEIGHTS to start a new run from its weights"
        )
    return checkpoint


def restore_checkpoint(
    checkpoint: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> int:
    """Put weights, optimiser, schedule and random states back.

    Returns:
        The index of the iteration to go on with.

    Raises:
        ValueError: the checkpoint is of another model or another optimiser.
    """
    restore_model(checkpoint, model)
    # PyTorch takes the state of another kind of optimiser, and fails in its first step.
    saved, current = (
        state["param_groups"] for state in (checkpoint["optimizer"], optimizer.state_dict())
    )
    if [_layout(group) for group in saved] != [_layout(group) for group in current]:
        raise ValueError(
            "The checkpoint's optimiser does not fit this config: its kind, its groups or the "
            "frozen stages differ. Resume with the config.yaml beside the checkpoint"
        )
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["scheduler"])
    set_random_states(checkpoint["random_states"])
    return checkpoint["iteration"] + 1


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
        raise ValueError(
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
