"""Checkpoints of other origin for tests: with commands in them, and forged pickles and archives."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch


class Call:
    """An object that is pickled as ``function(*arguments)``, and BUILD with `state` if given."""

    def __init__(self, function: Callable, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def command(marker: Path) -> Call:
    """Return an object that makes the folder `marker` when plain pickle reads it."""
    return Call(os.mkdir, str(marker))


def torch_bytes(content: Any, *, legacy: bool = False) -> bytes:
    """Return what `torch.save` writes; `legacy`: before PyTorch 1.6."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def torch_zip(data_pickle: bytes, **storages: bytes) -> bytes:
    """Return an archive like `torch.save`'s, with any pickle and any storages."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data_pickle)
        archive.writestr("archive/byteorder", "little")
        for key, numbers in storages.items():
            archive.writestr(f"archive/data/{key.lstrip('_')}", numbers)
    return file.getvalue()


def _load_torch_blindly(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


# The writer of each format, and a loader that runs the commands in a file.
FORMATS: dict[str, tuple[Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    "pickle 0": (partial(pickle.dumps, protocol=0), pickle.loads),
    "pickle 5": (partial(pickle.dumps, protocol=5), pickle.loads),
    "torch": (torch_bytes, _load_torch_blindly),
    "legacy torch": (partial(torch_bytes, legacy=True), _load_torch_blindly),
}
