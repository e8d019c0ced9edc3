"""Load weights from a file into a model, and report those that do not fit."""

import logging
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.models.resnet import Bottleneck

from tensormask.checkpoint.downloads import resolve
from tensormask.checkpoint.files import (
    check_all_arrays,
    get_description,
    read_checkpoint,
    split_weights,
)
from tensormask.checkpoint.names import find_kind, to_our_names
from tensormask.data.classes import list_names, shared_labels, spelling_hint
from tensormask.modeling.backbone import ResNet
from tensormask.modeling.tensormask import TensorMask
from tensormask.modeling.trunks import TorchvisionTrunk
from tensormask.utils.errors import UserError, shorten

logger = logging.getLogger(__name__)

# The prefixes of DistributedDataParallel, of a user's module around the model, and of compilation.
_WRAPPERS = re.compile(r"^((module|model|_orig_mod)\.)+|(?<=\.)_orig_mod\.")
_ABOVE_BACKBONE = ("fpn", "head", "mask_head")
_CLASSIFIER = ("head.cls_score.weight", "head.cls_score.bias")

# The images and strides that ImageNet weights were trained with, by config key.
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
    """The parameters that did not fit when weights were loaded, by our names."""

    missing: list[str]  # in the model, not in the file
    unexpected: list[str]  # in the file, not in the model
    misshapen: list[str]  # "name: (file's shape) in the file, (model's shape) in the model"


def load_weights(
    model: TensorMask,
    path: str | PathLike[str] | Mapping[str, Any],
    *,
    content: dict[str, Any] | None = None,
    class_names: Sequence[str] = (),
) -> LoadResult:
    """Load weights from a file or a dict into a model.

    The file is a checkpoint of this library or of detectron2's TensorMask, or a backbone: an
    ImageNet ResNet of detectron2 (with Caffe2's names or its own), or one of torchvision's models
    that MODEL.BACKBONE.TRUNK accepts. Its format is that of a ``.pth``, ``.pkl`` or
    ``.safetensors``, whatever its suffix. A batch norm without running statistics in the file gets
    mean 0 and variance 1. The weights can be in an entry "state_dict", and their names can have the
    prefixes of wrappers: ``module.``, ``model.`` and ``_orig_mod.``.

    Args:
        model: gets the weights, in its own dtypes and on its own device.
        path: of the file, or a name or URL for `downloads.resolve`; or what a file contains, a
            dict of weights.
        content: of the file, if `read_checkpoint` has read it already.
        class_names: of the model's labels, to match the classifier's rows with the file's
            `class_names`: rows of classes that both have are loaded, in the order of the model,
            and others keep their initial values. Without names here or in the file, rows are
            matched by position.

    Returns:
        What is missing, unexpected or misshapen, which is also logged, as is the number of weights
        that were loaded. After loading a backbone,
        the rest of the model is missing.

    Raises:
        FileNotFoundError: no such file.
        OSError: the download failed.
        ValueError: the file is not a checkpoint, or contains objects other than arrays and plain
            containers; no entry fits a parameter of the model; the file is another backbone than
            the model's; or its ImageNet weights were trained with other images than the model
            feeds them. The model is unchanged.

    Example:
        >>> from tensormask import build_model, model_zoo
        >>> model = build_model(model_zoo.get_config("tensormask_R_50_FPN_1x"))
        >>> load_weights(model, {"model.fpn.p7.bias": torch.ones(256)}).unexpected
        []
    """
    if isinstance(path, Mapping):
        content, path = _to_cpu(path), "the dict of weights"
    if content is None:
        content = read_checkpoint(resolve(path))
    their_names = get_description(content).get("class_names", [])
    if isinstance(content.get("state_dict"), dict):
        content = {"model": content["state_dict"]}
    arrays, others = split_weights(content, path)
    arrays = _without_prefixes(arrays, path)
    kind = find_kind(arrays)
    _check_images(model, kind, content.get("__author__"), path)
    ours, left_out = to_our_names(arrays, kind, model.windows.mask_sizes)
    if kind == "Caffe2":  # has a solver's options among the weights
        left_out += map(str, others)
    else:
        check_all_arrays(others, path)
    if kind == "detectron2":
        left_out += [name for name in ours if _is_unused_level(ours[name], model)]
    elif kind == "torchvision's features":
        left_out += [name for name in ours if _is_for_classifier(ours[name], model)]
    if left_out:
        logger.info("%s: entries that are not used: %s", path, _list(left_out))

    state = model.state_dict()
    used = ours.keys() - left_out
    weights = {ours[name]: array for name, array in arrays.items() if name in used}
    weights |= _default_statistics(state, weights)
    if class_names:
        weights |= _match_classifier(state, weights, class_names, their_names, path)
    fitting, misshapen = {}, []
    for name, value in weights.items():
        if name in state and value.shape == state[name].shape:
            fitting[name] = value
        elif name in state:
            shapes = f"{tuple(value.shape)} in the file, {tuple(state[name].shape)} in the model"
            misshapen.append(f"{name}: {shapes}")
    if not fitting:
        raise UserError(f"{path}: none of its {len(arrays)} entries fits a parameter of the model")
    # A batch norm counts its batches, a frozen one does not.
    counted = ".num_batches_tracked"
    missing = [n for n in state if n not in weights and not n.endswith(counted)]
    unexpected = [n for n in weights if n not in state and not n.endswith(counted)]
    result = LoadResult(missing, unexpected, misshapen)
    is_backbone = {name.partition(".")[0] for name in weights}.isdisjoint(_ABOVE_BACKBONE)
    if is_backbone:
        _check_whole_backbone(result, path)
    model.load_state_dict(fitting, strict=False)
    logger.info("%s: loaded %d of the model's %d entries", path, len(fitting), len(state))
    changed = _changed_classes(model, state, weights, their_names)
    _log_misfits(result, changed, is_backbone, path)
    return result


def _match_classifier(
    state: dict[str, Tensor],
    weights: dict[str, Tensor],
    names: Sequence[str],
    their_names: Sequence[str],
    path: str | PathLike[str],
) -> dict[str, Tensor]:
    """Return the model's classifier with the rows, of all window sizes, of the shared classes.

    It is empty where the classifiers are matched by position, or differ in more than their classes.
    """
    if not all(name in state and name in weights for name in _CLASSIFIER):
        return {}
    num_sizes, rest = divmod(len(state[_CLASSIFIER[1]]), len(names))
    for name in _CLASSIFIER:
        (rows, *inner), (_, *our_inner) = weights[name].shape, state[name].shape
        if rest or rows != num_sizes * len(their_names) or inner != our_inner:
            if rows == len(state[name]):
                logger.info("%s has no class names: they are matched by position", path)
            return {}
    if list(names) == list(their_names):
        return {}
    pairs = shared_labels(names, their_names)
    ours, theirs = list(pairs), list(pairs.values())
    matched = {}
    for name in _CLASSIFIER:
        value = state[name].detach().cpu().clone()
        by_size = value.unflatten(0, (num_sizes, -1))  # (num_sizes, num_classes, ...), a view
        by_size[:, ours] = weights[name].to(value.dtype).unflatten(0, (num_sizes, -1))[:, theirs]
        matched[name] = value
    new = [name for label, name in enumerate(names) if label not in pairs]
    unused = [name for label, name in enumerate(their_names) if label not in theirs]
    if pairs:
        logger.info(
            "%s: the classifier keeps %d of the %d classes of the file, by name: %s",
            *(path, len(pairs), len(their_names), list_names([names[label] for label in ours])),
        )
    if new:
        hint = spelling_hint(new, unused)
        logger.warning(
            "%s: %d of the model's %d classes keep the initial weights of their classifier: %s%s",
            *(path, len(new), len(names), list_names(new), hint and f". {hint}"),
        )
    return matched


def _to_cpu(value: Any) -> Any:
    """Return a dict of tensors, or of such dicts, on the CPU."""
    if isinstance(value, Mapping):
        return {name: _to_cpu(item) for name, item in value.items()}
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _without_prefixes(arrays: dict[str, Tensor], path: str | PathLike[str]) -> dict[str, Tensor]:
    """Return the weights by names without the prefixes that wrappers of a model add."""
    renamed = {name: _WRAPPERS.sub("", name) for name in arrays}
    if changed := [name for name, own in renamed.items() if name != own]:
        logger.info("%s: prefixes of wrappers are left out: %s", path, _list(changed))
    if len(set(renamed.values())) < len(renamed):
        raise UserError(f"{path}: names are equal without the prefixes of wrappers")
    return {renamed[name]: array for name, array in arrays.items()}


def check_complete(loaded: LoadResult, path: str | PathLike[str]) -> None:
    """Raise ValueError if the weights in a file are not those of this model.

    A part of the model has kept its random start, or the file has statistics of batch norms where
    the model has other norms.
    """
    if loaded.missing or loaded.misshapen:
        first = (loaded.missing + loaded.misshapen)[0]
        raise UserError(
            f"{path} does not fit the model that the config describes: {len(loaded.missing)} "
            f"parameters are missing and {len(loaded.misshapen)} have another shape, such as "
            f"{first}. Give the config that the weights were trained with"
        )
    statistics = [name for name in loaded.unexpected if name.endswith(".running_mean")]
    if statistics:
        raise UserError(
            f"{path} has batch norms where the model has another norm, such as {statistics[0]}. "
            "Give the config that the weights were trained with (MODEL.RESNETS.NORM)"
        )


def _is_unused_level(name: str, model: TensorMask) -> bool:
    """Whether a parameter is of a pyramid level without windows, which only detectron2 has."""
    level = re.match(r"fpn\.(?:\w+\.)?p(\d)\.", name)
    return level is not None and f"p{level[1]}" not in model.windows.level_names


def _is_for_classifier(name: str, model: TensorMask) -> bool:
    """Whether a parameter is of a last layer that a `TorchvisionTrunk` leaves out."""
    layer = re.match(r"backbone\.features\.(\d+)\.", name)
    trunk = model.backbone
    return (
        layer is not None
        and isinstance(trunk, TorchvisionTrunk)
        and int(layer[1]) == len(trunk.features)
    )


def _default_statistics(state: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return mean 0 and variance 1 for batch norms with only scale and shift in the file."""
    statistics = {}
    for mean in (name for name in state if name.endswith(".running_mean")):
        scale, var = (mean.replace("running_mean", leaf) for leaf in ("weight", "running_var"))
        if scale in weights and mean not in weights and var not in weights:
            statistics[mean] = torch.zeros_like(weights[scale])
            statistics[var] = torch.ones_like(weights[scale])
    return statistics


def _check_images(model: TensorMask, kind: str, written_by: Any, path: str | PathLike[str]) -> None:
    """Raise ValueError if ImageNet weights were trained with other images or strides."""
    if kind == "Caffe2":
        author = "MSRA"
    elif kind.startswith("torchvision") or (
        kind.startswith("detectron2's") and written_by == "torchvision"
    ):
        author = "torchvision"
    else:  # a whole model, or a backbone of an unknown author
        return
    given: dict[str, object] = {
        "INPUT.FORMAT": model.channel_order,
        "MODEL.PIXEL_MEAN": model.pixel_mean.flatten().tolist(),
        "MODEL.PIXEL_STD": model.pixel_std.flatten().tolist(),
    }
    is_resnet = isinstance(model.backbone, ResNet)
    blocks = [b for b in model.backbone.modules() if is_resnet and isinstance(b, Bottleneck)]
    if blocks:  # have no choice of the stride
        given["MODEL.RESNETS.STRIDE_IN_1X1"] = any(b.conv1.stride != (1, 1) for b in blocks)
    wanted = _TRAINED_WITH[author]
    wrong = [key for key, value in given.items() if not _agree(value, wanted[key])]
    if wrong:
        overrides = " ".join(f"{key} {_as_word(wanted[key])}" for key in wrong)
        raise UserError(
            f"{path} has {author}'s ImageNet weights, which were trained with other images or "
            f"strides than those of the config: add {overrides}"
        )


def _agree(value: Any, wanted: Any) -> bool:
    if not isinstance(wanted, list):
        return value == wanted
    return all(abs(a - b) < 0.5 for a, b in zip(value, wanted, strict=True))  # of 255


def _as_word(value: Any) -> str:
    """A value as one word of a command line."""
    return f'"{value}"'.replace(" ", "") if isinstance(value, list) else str(value)


def _check_whole_backbone(result: LoadResult, path: str | PathLike[str]) -> None:
    wrong = [text for texts in result for text in texts if text.startswith("backbone.")]
    if wrong:
        raise UserError(
            f"{path} is a backbone, but not the model's: {len(wrong)} parameters are in only one "
            f"of them or have another shape: {_list(wrong)}. Check MODEL.RESNETS.DEPTH, "
            "MODEL.BACKBONE.TRUNK and MODEL.RESNETS.NORM"
        )


def _changed_classes(
    model: TensorMask,
    state: dict[str, Tensor],
    weights: dict[str, Tensor],
    their_names: Sequence[str],
) -> tuple[int, int] | None:
    """Return the classes of file and model, if these are the only difference of the classifiers."""
    if not all(name in state and name in weights for name in _CLASSIFIER):
        return None
    (theirs, *inner), (theirs_of_bias,) = (weights[name].shape for name in _CLASSIFIER)
    (ours, *our_inner), _ = (state[name].shape for name in _CLASSIFIER)
    num_sizes = model.windows.num_sizes
    if theirs == ours or theirs != theirs_of_bias or inner != our_inner or theirs % num_sizes:
        return None
    if their_names and theirs != num_sizes * len(their_names):  # other window sizes
        return None
    return theirs // num_sizes, ours // num_sizes


def _log_misfits(
    result: LoadResult,
    classes: tuple[int, int] | None,
    is_backbone: bool,
    path: str | PathLike[str],
) -> None:
    if is_backbone:
        logger.warning("%s: backbone only: fpn and heads keep their initial weights", path)
        result = result._replace(missing=[])
    if classes:
        logger.warning(
            "%s: trained with %d classes, the model has %d: the classifier keeps its initial "
            "weights; if that is not intended, set MODEL.TENSOR_MASK.NUM_CLASSES %d",
            *(path, *classes, classes[0]),
        )
        others = [text for text in result.misshapen if not text.startswith("head.cls_score.")]
        result = result._replace(misshapen=others)
    for what, names in result._asdict().items():
        if names:
            logger.warning("%s: %d %s: %s", path, len(names), what, _list(names))


def _list(names: list[str]) -> str:
    return ", ".join(map(shorten, names[:8])) + (", ..." if len(names) > 8 else "")
