"""Checkpoint files read as data: PyTorch's two formats, pickles of arrays, safetensors.

What a file is follows from its content, not from its suffix.
"""

import json
import math
import sys
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from tensormask.checkpoint.pickles import RefusedContent, checked_sizes, load_pickle, shorten
from tensormask.utils.errors import UserError

# What a checkpoint of this library says of its weights, in every format.
DESCRIPTION = ("class_names", "category_ids", "config")
_MAX_VIEWS = 4  # tensors may share their numbers: all of them, in sizes of the file


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU, without running anything that it holds.

    Returns:
        what the file holds: a dict of weights, or one that has them as "model" or "blobs"; for
        safetensors ``{"model": weights, ...}`` with `DESCRIPTION` from its metadata. Weights are
        `Tensor` or `numpy.ndarray`.

    Raises:
        FileNotFoundError: no such file.
        OSError: it cannot be opened.
        ValueError: the file is damaged, or holds more than tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    with open(path, "rb") as file:
        start = file.read(9)
    try:
        content = _read(path, start)
    except RefusedContent as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a damaged file fails in many ways, and all of them mean the same
        raise UserError(
            f"{path} cannot be read as a checkpoint of plain data: it is damaged, or of another "
            f"kind ({shorten(f'{type(error).__name__}: {error}', 200)})"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: no dict of weights in it, but {type(content).__name__}")
    return content


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file under the names that they have there.

    Raises:
        FileNotFoundError, ValueError: as of `read_checkpoint`.
        ValueError: there is something else among them.
    """
    weights, others = split_weights(read_checkpoint(path), path)
    check_all_arrays(others, path)
    return weights


def split_weights(
    content: dict[str, Any], path: str | Path
) -> tuple[dict[str, Tensor], dict[Any, Any]]:
    """The tensors of a checkpoint's content by name, and what stands beside them.

    Args:
        content: as of `read_checkpoint`.
        path: of its file, for messages.

    Raises:
        ValueError: there are none, or they are far larger than the file.
    """
    for key in ("model", "blobs"):
        if isinstance(content.get(key), dict):
            content = content[key]
    arrays = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, np.ndarray | Tensor)
    }
    others = {name: value for name, value in content.items() if name not in arrays}
    if not content:
        raise UserError(f"{path}: the dict of weights in it is empty")
    size = sum(array.nbytes for array in arrays.values())
    if size > _MAX_VIEWS * Path(path).stat().st_size:
        raise UserError(f"{path}: its weights would take {size:,} bytes, far more than the file")
    return {name: _to_tensor(array) for name, array in arrays.items()}, others


def check_all_arrays(others: dict[Any, Any], path: str | Path) -> None:
    """Raise ValueError if something stood beside the weights, as `split_weights` found it."""
    for name, value in others.items():
        raise UserError(
            f"{path}: entry {shorten(str(name))} is {type(value).__name__}, not an array of numbers"
        )


def read_description(path: str | Path) -> dict[str, list]:
    """``class_names`` and ``category_ids`` of a checkpoint of this library; {} for other files."""
    content = read_checkpoint(path)
    names, ids = content.get("class_names"), content.get("category_ids")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return {}
    if not isinstance(ids, list) or [type(i) for i in ids] != [int] * len(names):
        return {"class_names": names}
    return {"class_names": names, "category_ids": ids}


def _to_tensor(array: np.ndarray | Tensor) -> Tensor:
    if isinstance(array, Tensor):
        return array
    native = array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype=native, order="C"))  # a copy: bytes cannot change


def _read(path: Path, start: bytes) -> Any:
    if start.startswith(b"PK\x03\x04"):
        return _read_torch_zip(path)
    header_size = int.from_bytes(start[:8], "little")
    if start[8:] == b"{" and header_size <= path.stat().st_size - 8:
        return _read_safetensors(path)
    file = BytesIO(path.read_bytes())
    content = load_pickle(file, _TORCH_FUNCTIONS)
    if type(content) is int and content == _LEGACY_MAGIC:
        return _read_torch_legacy(file)
    return content


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata() or {}
    described = {key: _from_json(metadata[key]) for key in DESCRIPTION if key in metadata}
    return {"model": weights, **described}


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # of another program, which has its own meaning of the key
        return text


# ---- what torch.save writes ----


def _read_torch_zip(path: Path) -> Any:
    """The format since PyTorch 1.6: a pickle, and each storage's numbers as a file, zipped."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        size = sum(entry.file_size for entry in entries)
        if any(entry.compress_type for entry in entries) or size > path.stat().st_size:
            raise RefusedContent("it is a compressed zip file, which torch.save does not write")
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise RefusedContent("it is a zip file that torch.save has not written")
        folder = pickles[0].filename.removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in archive.namelist():
            _check_byte_order(archive.read(order) == b"little")
        load_storage = _storage_loader(lambda key: archive.read(f"{folder}data/{key}"))
        return load_pickle(BytesIO(archive.read(pickles[0])), _TORCH_FUNCTIONS, load_storage)


_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001


def _read_torch_legacy(file: BytesIO) -> Any:
    """The format before it: more pickles, then the numbers. torchvision's older files have it."""
    if load_pickle(file) != _LEGACY_VERSION:
        raise RefusedContent("it is of a version of torch.save that is not known")
    _check_byte_order(load_pickle(file)["little_endian"])
    place = file.tell()
    # The pickle precedes its numbers: it is read to see which they are, and again with them.
    dtypes: dict[str, torch.dtype] = {}
    ignored = {name: lambda *_: None for name in _TORCH_FUNCTIONS if name[0] == "torch._utils"}
    load_pickle(file, _TORCH_FUNCTIONS | ignored, lambda i: dtypes.setdefault(*_storage_id(i)[:2]))
    numbers = {}
    for key in load_pickle(file):
        size = int.from_bytes(file.read(8), "little") * dtypes[key].itemsize
        numbers[key] = file.read(size)
        if len(numbers[key]) != size:
            raise RefusedContent("it ends early, before all of its numbers")
    file.seek(place)
    return load_pickle(file, _TORCH_FUNCTIONS, _storage_loader(numbers.__getitem__))


def _check_byte_order(is_little: bool) -> None:
    if is_little != (sys.byteorder == "little"):
        raise RefusedContent("its numbers have the byte order of another kind of machine")


def _storage_loader(read: Callable[[str], bytes]) -> Callable[[Any], Tensor]:
    """Gives the storage of a persistent id as a tensor of one axis; `read` its bytes, by key."""
    storages: dict[str, bytearray] = {}

    def load(persistent_id: Any) -> Tensor:
        key, dtype, num_elements = _storage_id(persistent_id)
        if key not in storages:
            storages[key] = bytearray(read(key))
        if num_elements * dtype.itemsize != len(storages[key]):
            raise RefusedContent(
                f"it has a storage of {num_elements:,} numbers, not all of them there"
            )
        if not num_elements:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(storages[key], dtype=dtype)

    return load


def _storage_id(persistent_id: Any) -> tuple[str, torch.dtype, int]:
    """Key, dtype and number of elements."""
    _, dtype, key, _, num_elements, *view = persistent_id
    if type(key) is not str or type(num_elements) is not int or not isinstance(dtype, torch.dtype):
        raise RefusedContent("it has a storage that torch.save has not written")
    if num_elements < 0 or view not in ([], [None]):
        raise RefusedContent("it has a storage that is part of another one")
    return key, dtype, num_elements


def _rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_flags: Any
) -> Tensor:
    """A view of a storage, within it and no larger."""
    checked_sizes((offset, *checked_sizes(size), *checked_sizes(stride)))
    num_elements = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if num_elements and max(num_elements, last + 1) > len(storage):
        raise RefusedContent(
            f"it has a tensor of shape {shorten(str(size))} and {len(storage):,} numbers for it"
        )
    return storage.new_empty(0).set_(storage.untyped_storage(), offset, size, stride)


_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_TORCH_FUNCTIONS: dict[tuple[str, str], Any] = {
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
}
