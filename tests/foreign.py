"""Files of other makers for tests: commands in checkpoints, and forged pickles and archives."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Call:
    """Pickles as a call of ``function(*arguments)``, and a BUILD with `state` if there is one."""

    def __init__(self, function: Callable, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def command(marker: Path) -> Call:
    """What makes the folder `marker` when it is unpickled by Python's own loader."""
    return Call(os.mkdir, str(marker))


def torch_bytes(content: Any, *, legacy: bool = False) -> bytes:
    """What `torch.save` writes; `legacy`: before PyTorch 1.6."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def torch_zip(
    data_pickle: bytes, compression: int = zipfile.ZIP_STORED, **storages: bytes
) -> bytes:
    """An archive like `torch.save`'s, of any pickle and any numbers."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data_pickle)
        archive.writestr("archive/byteorder", "little")
        for key, numbers in storages.items():
            archive.writestr(f"archive/data/{key.lstrip('_')}", numbers)
    return file.getvalue()


def inst_of_mkdir(marker: Path) -> bytes:
    """The same command by the instruction of Python 2's old classes."""
    return b"(dS'model'\n(V" + str(marker).encode("raw_unicode_escape") + b"\nios\nmkdir\ns."


def _pickled(protocol: int) -> Callable[[Any, Path], bytes]:
    return lambda content, marker: pickle.dumps(content, protocol)


def _torch(legacy: bool) -> Callable[[Any, Path], bytes]:
    return lambda content, marker: torch_bytes(content, legacy=legacy)


# Suffix, writer of a content that has a command, and a loader that would run it.
COMMAND_FORMATS: dict[str, tuple[str, Callable[[Any, Path], bytes], Callable[[bytes], Any]]] = {
    "pickle 0": (".pkl", _pickled(0), pickle.loads),
    "pickle 2 as .pth": (".pth", _pickled(2), pickle.loads),
    "pickle 5 as .safetensors": (".safetensors", _pickled(5), pickle.loads),
    "INST": (".pkl", lambda _, marker: inst_of_mkdir(marker), pickle.loads),
    "torch": (".pth", _torch(False), lambda data: torch.load(io.BytesIO(data), weights_only=False)),
    "torch as .pkl": (
        ".pkl",
        _torch(False),
        lambda data: torch.load(io.BytesIO(data), weights_only=False),
    ),
    "legacy torch": (
        ".pth",
        _torch(True),
        lambda data: torch.load(io.BytesIO(data), weights_only=False),
    ),
}
