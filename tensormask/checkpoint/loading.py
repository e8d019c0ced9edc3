"""Weights from files into a model, and what is said of those that do not fit."""

import logging
import re
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from tensormask.checkpoint.files import check_all_arrays, read_checkpoint, split_weights
from tensormask.checkpoint.names import find_kind, to_our_names
from tensormask.checkpoint.pickles import shorten
from tensormask.model_zoo import resolve
from tensormask.utils.errors import UserError

logger = logging.getLogger(__name__)

_ABOVE_BACKBONE = ("fpn", "head", "mask_head")
_CLASSIFIER = ("head.cls_score.weight", "head.cls_score.bias")

# What ImageNet weights were trained with, by the config's keys.
_TRAINED_WITH: dict[str, dict[str, Any]] = {
    "MSRA": {
        "INPUT.FORMAT": "BGR",
        "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
        "MODEL.RESNETS.STRIDE_IN_1X1": True,
    },
    "torchvision": {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    },
}


class LoadResult(NamedTuple):
    """What did not fit when weights were loaded, by our parameter names."""

    missing: list[str]  # parameters of the model that the file does not have
    unexpected: list[str]  # entries of the file that the model does not have
    misshapen: list[str]  # "name: (file's shape) in the file, (model's shape) in the model"


def load_weights(model: nn.Module, path: str | PathLike[str]) -> LoadResult:
    """Load weights into a model.

    A batch norm without running statistics in the file gets mean 0 and variance 1.

    Args:
        model: a `TensorMask`.
        path: of a file, or what `model_zoo.resolve` takes in its place. A checkpoint of this
            library or of detectron2's TensorMask; or a backbone alone, an ImageNet ResNet of
            detectron2 (with Caffe2's names or its own) or of torchvision. A ``.pth``, ``.pkl`` or
            ``.safetensors``, whatever its suffix.

    Returns:
        what was missing, unexpected or misshapen, which is logged as well. After a backbone alone,
        all the rest of the model is missing.

    Raises:
        FileNotFoundError: no such file.
        OSError: it could not be downloaded.
        ValueError: the file is no checkpoint, or holds objects other than arrays and plain
            containers; no parameter of the model fits it; it is a backbone, and another one than
            the model's; it has ImageNet weights that go with other images than the model feeds
            them. The model is as before.
    """
    file = resolve(path)
    content = read_checkpoint(file)
    arrays, others = split_weights(content, file)
    kind = find_kind(arrays)
    _check_images(model, kind, content.get("__author__"), path)
    ours, left_out = to_our_names(arrays, kind, _mask_sizes(model))
    if kind == "Caffe2":  # a solver's options stand among the weights
        left_out += map(str, others)
    else:
        check_all_arrays(others, path)
    if kind == "detectron2":
        left_out += [name for name in ours if _is_unused_level(ours[name], model)]
    if left_out:
        logger.info("%s: left out, of no use here: %s", path, _list(left_out))

    own = model.state_dict()
    used = ours.keys() - left_out
    weights = {ours[name]: array for name, array in arrays.items() if name in used}
    weights |= _missing_statistics(own, weights)
    fitting, misshapen = {}, []
    for name, value in weights.items():
        if name in own and value.shape == own[name].shape:
            fitting[name] = value
        elif name in own:
            shapes = f"{tuple(value.shape)} in the file, {tuple(own[name].shape)} in the model"
            misshapen.append(f"{name}: {shapes}")
    if not fitting:
        raise UserError(f"{path}: none of its {len(arrays)} entries fits a parameter of the model")
    # Batch norms count their batches; a file of frozen ones does not.
    counted = ".num_batches_tracked"
    missing = [n for n in own if n not in weights and not n.endswith(counted)]
    unexpected = [n for n in weights if n not in own and not n.endswith(counted)]
    result = LoadResult(missing, unexpected, misshapen)
    is_backbone = {name.partition(".")[0] for name in weights}.isdisjoint(_ABOVE_BACKBONE)
    if is_backbone:
        _check_whole_backbone(result, path)
    model.load_state_dict(fitting, strict=False)
    _log_misfits(result, _changed_classes(model, own, weights), is_backbone, path)
    return result


def check_complete(loaded: LoadResult, path: str | PathLike[str]) -> None:
    """Raise ValueError where `load_weights` left a part of the model at random."""
    if loaded.missing or loaded.misshapen:
        first = (loaded.missing + loaded.misshapen)[0]
        raise UserError(
            f"{path} is not of the model that the config describes: {len(loaded.missing)} "
            f"parameters are missing in it and {len(loaded.misshapen)} have another shape, such as "
            f"{first}; give the config that the weights were trained with"
        )


def _mask_sizes(model: nn.Module) -> list[int]:
    windows = getattr(model, "windows", None)
    return windows.mask_sizes if windows else []


def _is_unused_level(name: str, model: nn.Module) -> bool:
    """detectron2 makes p2..p7 whichever of them carry windows, we make those only."""
    level = re.match(r"fpn\.(?:\w+\.)?p(\d)\.", name)
    return level is not None and not model.fpn.first <= int(level[1]) <= model.fpn.last


def _missing_statistics(own: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean 0 and variance 1 where a batch norm has scale and shift only."""
    statistics = {}
    for mean in (name for name in own if name.endswith(".running_mean")):
        scale, var = (mean.replace("running_mean", leaf) for leaf in ("weight", "running_var"))
        if scale in weights and mean not in weights and var not in weights:
            statistics[mean] = torch.zeros_like(weights[scale])
            statistics[var] = torch.ones_like(weights[scale])
    return statistics


def _check_images(model: nn.Module, kind: str, written_by: Any, path: str | PathLike[str]) -> None:
    """Raise ValueError if the model feeds ImageNet weights other images than they know."""
    if kind == "Caffe2":
        author = "MSRA"
    elif kind == "torchvision" or (kind.startswith("detectron2's") and written_by == "torchvision"):
        author = "torchvision"
    else:  # a whole model, or a backbone that does not say whose it is
        return
    block = model.backbone.res3[0]
    in_1x1 = block.conv1.stride != (1, 1)
    given = {
        "INPUT.FORMAT": model.channel_order,
        "MODEL.PIXEL_MEAN": model.pixel_mean.flatten().tolist(),
        "MODEL.PIXEL_STD": model.pixel_std.flatten().tolist(),
    }
    if isinstance(block, Bottleneck):  # have the stride in one place
        given["MODEL.RESNETS.STRIDE_IN_1X1"] = in_1x1
    wanted = _TRAINED_WITH[author]
    wrong = [key for key, value in given.items() if not _agree(value, wanted[key])]
    if wrong:
        overrides = " ".join(f"{key} {_as_word(wanted[key])}" for key in wrong)
        raise UserError(
            f"{path} has {author}'s ImageNet weights, which were trained with other images or "
            f"strides than the config says: add {overrides}"
        )


def _agree(value: Any, wanted: Any) -> bool:
    if not isinstance(wanted, list):
        return value == wanted
    return all(abs(a - b) < 0.5 for a, b in zip(value, wanted, strict=True))  # of 255


def _as_word(value: Any) -> str:
    """A value as one word of a command line."""
    return f'"{value}"'.replace(" ", "") if isinstance(value, list) else str(value)


def _check_whole_backbone(result: LoadResult, path: str | PathLike[str]) -> None:
    wrong = [
        text
        for text in (*result.missing, *result.misshapen, *result.unexpected)
        if text.startswith("backbone.")
    ]
    if wrong:
        raise UserError(
            f"{path} is a backbone, but not the one of the model: {len(wrong)} parameters are on "
            f"one side only or have another shape: {_list(wrong)}. Do MODEL.RESNETS.DEPTH and "
            "MODEL.RESNETS.NORM fit?"
        )


def _changed_classes(
    model: nn.Module, own: dict[str, Tensor], weights: dict[str, Tensor]
) -> tuple[int, int] | None:
    """How many classes file and model have, where nothing else separates their classifiers."""
    if not all(name in own and name in weights for name in _CLASSIFIER):
        return None
    (theirs, *inner), (theirs_of_bias,) = (weights[name].shape for name in _CLASSIFIER)
    (ours, *own_inner), _ = (own[name].shape for name in _CLASSIFIER)
    num_sizes = model.windows.num_sizes
    if theirs == ours or theirs != theirs_of_bias or inner != own_inner or theirs % num_sizes:
        return None
    return theirs // num_sizes, ours // num_sizes


def _log_misfits(
    result: LoadResult,
    classes: tuple[int, int] | None,
    is_backbone: bool,
    path: str | PathLike[str],
) -> None:
    if is_backbone:
        logger.warning("%s: backbone only: fpn and heads start fresh", path)
        result = result._replace(missing=[])
    if classes:
        logger.warning(
            "%s: trained with %d classes, the model has %d: the classifier starts fresh; if that "
            "is not intended, set MODEL.TENSOR_MASK.NUM_CLASSES %d",
            *(path, *classes, classes[0]),
        )
        others = [text for text in result.misshapen if not text.startswith("head.cls_score.")]
        result = result._replace(misshapen=others)
    for what, names in result._asdict().items():
        if names:
            logger.warning("%s: %d %s: %s", path, len(names), what, _list(names))


def _list(names: list[str]) -> str:
    return ", ".join(map(shorten, names[:8])) + (", ..." if len(names) > 8 else "")
