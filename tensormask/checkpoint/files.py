"""Read checkpoint files as data: PyTorch's two formats, pickles of arrays, safetensors.

The format follows from the content of a file, not from its suffix. No code that a file names is
run: PyTorch's files are read with ``weights_only=True``, other pickles with a table of a few names.
"""

import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tensormask.utils.errors import UserError, shorten
from tensormask.utils.files import expand_home

# Entries of this library's checkpoints that describe the weights, in every format. Nothing reads
# "about", which says how the model that comes with the package was made and how good it is.
DESCRIPTION = ("class_names", "category_ids", "config", "score_threshold", "about")
_LEGACY_START = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)


def read_checkpoint(path: str | PathLike[str], *, mmap: bool = True) -> dict[str, Any]:
    """Read the content of a checkpoint file to the CPU, without running any code that it names.

    Args:
        path: of the file, which may have any suffix.
        mmap: map the tensors of a ``.pth`` into memory, and read them when they are used. False
            copies them: for tensors that are kept when the file is replaced or removed.

    Returns:
        The content of the file: a dict of weights, or a dict with the weights as "model" or
        "blobs". For safetensors ``{"model": weights, ...}`` with `DESCRIPTION` from the metadata.
        Weights are `Tensor` or `numpy.ndarray`.

    Raises:
        FileNotFoundError: no such file.
        OSError: it cannot be opened.
        ValueError: the file is damaged, or contains more than tensors and plain containers.
    """
    path = Path(expand_home(path))
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    with open(path, "rb") as file:
        try:
            content = _read(file, path, mmap)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except Exception as error:  # each reader has its own errors for a damaged file
            raise UserError(f"{path} {_explain(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: it contains {type(content).__name__}, not a dict of weights")
    return content


def read_metadata(path: str | PathLike[str]) -> dict[str, Any]:
    """Return `DESCRIPTION` from the metadata of a safetensors file, without reading its weights.

    Raises:
        ValueError: it is another or a damaged file, which is not read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return _described(file)
    except (SafetensorError, OSError) as error:
        reason = shorten(f"{type(error).__name__}: {error}", 200)
        raise UserError(f"{path} is damaged, or not a safetensors file ({reason})") from None


def read_weights(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file under their names in the file.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`.
        ValueError: an entry is not an array of numbers.
    """
    weights, others = split_weights(read_checkpoint(path), path)
    check_all_arrays(others, path)
    return weights


def split_weights(
    content: dict[str, Any], path: str | PathLike[str]
) -> tuple[dict[str, Tensor], dict[Any, Any]]:
    """Return the tensors by name of what `read_checkpoint` returned, and the entries beside them.

    Raises:
        ValueError: the dict of weights is empty.
    """
    for key in ("model", "blobs"):
        if isinstance(content.get(key), dict):
            content = content[key]
    if not content:
        raise UserError(f"{path}: the dict of weights is empty")
    weights, others = {}, {}
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, np.ndarray):
            weights[name] = _to_tensor(value)
        elif isinstance(name, str) and isinstance(value, Tensor) and _is_plain(value):
            weights[name] = value.detach()
        else:
            others[name] = value
    return weights, others


def check_all_arrays(others: dict[Any, Any], path: str | PathLike[str]) -> None:
    """Raise ValueError if `split_weights` returned `others` beside the weights."""
    for name, value in others.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: the name {shorten(str(name))} of an entry is not a text")
        kind = type(value).__name__
        if isinstance(value, Tensor) and not _is_plain(value):
            kind = f"a {kind} of {value.layout} and {value.dtype} on {value.device}"
        raise UserError(f"{path}: entry {shorten(str(name))} is {kind}, not an array of numbers")


def get_description(content: dict[str, Any]) -> dict[str, Any]:
    """Return what `read_checkpoint` returned beside the weights; what is invalid is left out.

    Returns:
        `class_names`, a list of str; with them `category_ids`, as many int or str; `config`, the
        YAML text of the training run's config, which is not parsed here; and `score_threshold`, a
        float in 0..1, not 1, with the best F1 in the last evaluation.
    """
    names, ids = content.get("class_names"), content.get("category_ids")
    config, threshold = content.get("config"), content.get("score_threshold")
    description: dict[str, Any] = {}
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        description["class_names"] = names
        if isinstance(ids, list) and len(ids) == len(names) and {*map(type, ids)} <= {int, str}:
            description["category_ids"] = ids
    if isinstance(config, str):
        description["config"] = config
    if isinstance(threshold, float) and 0 <= threshold < 1:
        description["score_threshold"] = threshold
    return description


def safetensors_bytes(weights: dict[str, Tensor], description: Mapping[str, Any]) -> bytes:
    """Return a file of safetensors, always with the same bytes.

    Args:
        weights: contiguous tensors that share no memory.
        description: its entries of `DESCRIPTION` become the metadata.
    """
    metadata = {key: json.dumps(description[key]) for key in DESCRIPTION if key in description}
    data = safetensors.torch.save(weights, metadata)
    # The order of the metadata that the library writes is random.
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # arrays are aligned
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor consists of real numbers in memory, as every parameter of a model."""
    is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return is_dense and not tensor.is_complex()


def _to_tensor(array: np.ndarray) -> Tensor:
    native = array.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(array, native, ["C_CONTIGUOUS", "WRITEABLE"]))


def _read(file: BinaryIO, path: Path, mmap: bool) -> Any:
    start = file.read(len(_LEGACY_START))
    file.seek(0)
    if start.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type for entry in archive.infolist()):
                raise UserError("it is a compressed zip file, which torch.save does not write")
        return _load_torch(file, path, mmap)
    if start == _LEGACY_START:  # the format before PyTorch 1.6; torchvision's older files have it
        return _load_torch(file, path, mmap=False)
    header_size = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header_size <= path.stat().st_size - 8:
        return _read_safetensors(path)
    return _ArrayUnpickler(file, encoding="latin1").load()


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}
        return {"model": weights, **_described(file)}


def _described(file: Any) -> dict[str, Any]:
    metadata = file.metadata() or {}
    return {key: _from_json(metadata[key]) for key in DESCRIPTION if key in metadata}


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # another program may use the key for something else
        return text


def _load_torch(file: BinaryIO, path: Path, mmap: bool) -> Any:
    file.seek(0)
    allowed: list[Any] = [(function, name) for name, function in _NUMPY_NAMES.items()]
    # PyTorch maps the file of a path only, and takes any path with this suffix for that format.
    is_mapped = mmap and not path.name.endswith(".safetensors")
    source = path if is_mapped else file
    with torch.serialization.safe_globals(allowed):
        return torch.load(source, map_location="cpu", mmap=is_mapped, weights_only=True)


def _explain(error: Exception) -> str:
    """Say what is wrong with a file, from the error of its reader."""
    text = " ".join(str(error).rpartition("WeightsUnpickler error: ")[2].split())
    if foreign := re.search(r"\bGLOBAL (\S+)", text):  # of PyTorch or `_ArrayUnpickler`
        return (
            f"asks for {shorten(foreign[1])}, which is neither an array nor a plain container and "
            "is not loaded: save only the weights"
        )
    return (
        "cannot be read as a checkpoint of plain data: it is damaged, or not a checkpoint "
        f"({shorten(f'{type(error).__name__}: {text}', 200)})"
    )


# ---- the arrays of NumPy in pickles ----

_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


class _Dtype:
    """Stand-in for `numpy.dtype` in a pickle: numbers only, in either byte order.

    NumPy's own takes flags from the file, and false flags would make it read out of bounds.
    """

    def __init__(self, code: str, *_flags: Any) -> None:
        if code not in _NUMBERS:
            raise UserError(f"it has an array of dtype {shorten(str(code))}, not of numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """Stand-in for `numpy.ndarray` in a pickle: created empty, then filled by its state.

    A pickle can set attributes of a class that it names; `__setstate__`, here and in `_Dtype`,
    prevents this.
    """

    def __new__(cls, *_: Any) -> Self:
        return super().__new__(cls, 0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *_, shape, dtype, is_fortran, data = state  # the first of five is a version
        clean: Any = (1, shape, _dtype_of(dtype), bool(is_fortran), data)
        super().__setstate__(clean)

    @classmethod
    def from_buffer(cls, data: bytes, dtype: _Dtype, shape: Any, order: Any) -> np.ndarray:
        return np.frombuffer(data, _dtype_of(dtype)).reshape(shape, order=order)

    @classmethod
    def scalar(cls, dtype: _Dtype, data: bytes | str) -> int | float | bool:
        data = data.encode("latin1") if isinstance(data, str) else data  # str: of Python 2
        return np.frombuffer(data, _dtype_of(dtype)).item()


def _dtype_of(dtype: _Dtype) -> np.dtype:
    if type(dtype) is not _Dtype:
        raise UserError("it has an array that NumPy has not written")
    return dtype.dtype


# A pickle can set attributes of the objects that it names. None of these objects allows it.
_NUMPY_NAMES: dict[str, Any] = {"numpy.ndarray": _Array, "numpy.dtype": _Dtype}
for _core in ("numpy._core", "numpy.core"):  # since NumPy 2, and before
    _NUMPY_NAMES[f"{_core}.multiarray._reconstruct"] = _Array
    _NUMPY_NAMES[f"{_core}.multiarray.scalar"] = _Array.scalar
    _NUMPY_NAMES[f"{_core}.numeric._frombuffer"] = _Array.from_buffer
_NAMES: dict[str, Any] = {
    **_NUMPY_NAMES,
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": dict,
    "_codecs.encode": str.encode,  # Python 3 writes bytes with it in the protocols before 3
    "__builtin__.bytes": "".encode,  # and an empty bytes object with this
}


class _ArrayUnpickler(pickle.Unpickler):
    """Python's unpickler, restricted to a table of names."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _NAMES:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return _NAMES[f"{module}.{name}"]
