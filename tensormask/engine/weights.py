"""Weights from files, read as data: this project's checkpoints and detectron2's."""

import io
import logging
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# detectron2's parameter names -> ours, by the first pattern that matches.
_FROM_DETECTRON2 = [
    (r"backbone\.bottom_up\.stem\.conv1\.norm\.(.+)", r"backbone.stem.bn1.\1"),
    (r"backbone\.bottom_up\.stem\.conv1\.(.+)", r"backbone.stem.conv1.\1"),
    (r"backbone\.bottom_up\.(res\d\.\d+)\.shortcut\.norm\.(.+)", r"backbone.\1.downsample.1.\2"),
    (r"backbone\.bottom_up\.(res\d\.\d+)\.shortcut\.(.+)", r"backbone.\1.downsample.0.\2"),
    (r"backbone\.bottom_up\.(res\d\.\d+)\.conv(\d)\.norm\.(.+)", r"backbone.\1.bn\2.\3"),
    (r"backbone\.bottom_up\.(res\d\.\d+)\.conv(\d)\.(.+)", r"backbone.\1.conv\2.\3"),
    (r"backbone\.fpn_(lateral|output)(\d)\.norm\.(.+)", r"fpn.\1.p\2.1.\3"),
    (r"backbone\.fpn_(lateral|output)(\d)\.(.+)", r"fpn.\1.p\2.\3"),
    (r"backbone\.top_block\.(p[67])\.(.+)", r"fpn.\1.\2"),
    (r"head\.(mask_subnet|mask_fuse)\.(.+)", r"mask_head.\1.\2"),
    (r"head\.mask_pred_(\d+)\.(.+)", r"mask_head.mask_pred.[\1].\2"),
    (r"head\.(cls_subnet|cls_score|bbox_subnet|bbox_pred)\.(.+)", r"head.\1.\2"),
]
# Entries of old detectron2 checkpoints that are configuration here.
_IGNORED = re.compile(r"pixel_mean|pixel_std|anchor_generator\.cell_anchors\.\d+")


class LoadResult(NamedTuple):
    """What did not fit when weights were loaded, by our parameter names."""

    missing: list[str]  # parameters of the model that the file does not have
    unexpected: list[str]  # entries of the file that the model does not have
    misshapen: list[str]  # "name: (file's shape) in the file, (model's shape) in the model"


def load_weights(model: nn.Module, path: str | Path) -> LoadResult:
    """Load the weights of a checkpoint into a model.

    Args:
        model: a `TensorMask`.
        path: a ``.pth`` of this project or of detectron2, or a ``.pkl`` of detectron2.

    Returns:
        what was missing, unexpected or misshapen; all three are empty when everything fitted, and
        are logged if not.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no checkpoint, holds objects other than arrays and plain containers,
            or has no parameter in common with the model.
    """
    own = model.state_dict()
    weights = _to_our_names(read_weights(path), model)
    fitting, misshapen = {}, []
    for name, value in weights.items():
        if name in own and value.shape != own[name].shape:
            misshapen.append(
                f"{name}: {tuple(value.shape)} in the file, {tuple(own[name].shape)} in the model"
            )
        elif name in own:
            fitting[name] = value
    if not fitting:
        raise ValueError(
            f"{path}: none of its {len(weights)} entries fits a parameter of the model"
        )
    model.load_state_dict(fitting, strict=False)
    # Batch norms count their batches; a file of frozen ones does not.
    counted = ".num_batches_tracked"
    missing = [n for n in own if n not in weights and not n.endswith(counted)]
    unexpected = [n for n in weights if n not in own and not n.endswith(counted)]
    result = LoadResult(missing, unexpected, misshapen)
    for what, names in result._asdict().items():
        if names:
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            logger.warning("%s: %d %s: %s", path, len(names), what, shown)
    return result


def check_complete(loaded: LoadResult, path: str | Path) -> None:
    """Raise ValueError where `load_weights` left a part of the model at random."""
    # Checkpoints of frozen batch norm may have scale and shift only: mean 0 and variance 1.
    missing = [name for name in loaded.missing if ".running_" not in name]
    if missing or loaded.misshapen:
        first = (missing + loaded.misshapen)[0]
        raise ValueError(
            f"{path} is not of the model that the config describes: {len(missing)} parameters "
            f"are missing in it and {len(loaded.misshapen)} have another shape, such as {first}; "
            "give the config that the weights were trained with"
        )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file under the names they have there."""
    if "://" in str(path):
        raise ValueError(
            f"weights are read from files: download {path} and give the path (MODEL.WEIGHTS)"
        )
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    content = _read_pickle(path) if path.suffix == ".pkl" else read_torch(path)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: no dict of weights in it, but {type(content).__name__}")
    weights = {}
    for name, value in content.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = torch.from_numpy(np.array(value))  # a copy: the file's arrays may be read-only
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: entry {name!r} is {type(value).__name__}, not an array of numbers"
            )
        weights[name] = value
    return weights


def _to_our_names(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename detectron2's entries; ours pass as they are."""
    if not any(
        name.startswith(("backbone.bottom_up.", "backbone.fpn_", "head.mask_")) for name in weights
    ):
        return weights
    mask_head = getattr(model, "mask_head", None)
    sides = [round(pred.out_channels**0.5) for pred in mask_head.mask_pred] if mask_head else []
    renamed = {}
    for name, value in weights.items():
        if _IGNORED.fullmatch(name):
            continue
        for pattern, replacement in _FROM_DETECTRON2:
            if re.fullmatch(pattern, name):
                name = re.sub(pattern, replacement, name)
                break
        # detectron2 names the mask predictors by their mask size, we number them.
        for i, side in enumerate(sides):
            name = name.replace(f".[{side}].", f".{i}.")
        renamed[name] = value
    return renamed


# ---- reading files as data ----


def read_torch(path: str | Path) -> Any:
    """The content of a `torch.save` file, on the CPU, without running anything that it holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is broken, or holds more than tensors and plain containers.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file fails in many ways, and all of them mean the same
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a checkpoint of plain data ({reason})"
        ) from None


def _read_pickle(path: Path) -> Any:
    try:
        return _ArrayUnpickler(io.BytesIO(path.read_bytes())).load()
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:
        raise ValueError(
            f"{path}: not a readable pickle ({type(error).__name__}: {error})"
        ) from None


class _Refused(pickle.UnpicklingError):
    pass


def _encode_latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in the protocols before 3."""
    if encoding != "latin1":
        raise _Refused(f"it holds bytes encoded as {encoding!r}")
    return text.encode("latin1")


# What an array is made of in a pickle. Resolved here once: nothing is imported on a file's behalf.
_PLAIN_GLOBALS = {
    ("_codecs", "encode"): _encode_latin1,
    ("collections", "OrderedDict"): dict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy._core.multiarray", "scalar"): np._core.multiarray.scalar,
    ("numpy._core.numeric", "_frombuffer"): np._core.numeric._frombuffer,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays and plain containers; anything else is refused by name, not imported."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="latin1")  # arrays of Python 2 pickles

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")  # before numpy 2
        if (module, name) in _PLAIN_GLOBALS:
            return _PLAIN_GLOBALS[module, name]
        raise _Refused(
            f"it asks for {module}.{name}, which is neither an array nor a plain container, "
            "and is not loaded"
        )
