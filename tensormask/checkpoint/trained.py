"""Find a trained model: its config and its weights, from a checkpoint, a name or both files."""

import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tensormask.checkpoint.downloads import resolve
from tensormask.checkpoint.files import get_description, read_checkpoint
from tensormask.checkpoint.zoo import MODELS, PACKAGED
from tensormask.config import CfgNode, get_cfg
from tensormask.config.files import config_names
from tensormask.utils.errors import UserError, unknown_name
from tensormask.utils.files import expand_home

_YAML_SUFFIXES = (".yaml", ".yml")
_CHECKPOINT_SUFFIXES = (".pth", ".pt", ".pkl", ".safetensors")
_BACKBONE_URLS = ("torchvision://", "detectron2://ImageNetPretrained/")


class TrainedModel(NamedTuple):
    """A config, the local path of a checkpoint, and the content of this file."""

    cfg: CfgNode
    path: Path
    content: dict[str, Any]


def find_trained_model(
    source: CfgNode | str | PathLike[str],
    weights: str | PathLike[str] | None = None,
    overrides: Sequence[Any] = (),
) -> TrainedModel:
    """Return config and weights of a model to predict with.

    Args:
        source: a checkpoint of this library, as a path, a URL, a folder of `save_pretrained`,
            `hf://user/model`, or the name of the one that comes with the package, whose own config
            is taken;
            or a config: a tree, which is not changed, the path of a YAML file, or a name, whose
            weights are those of the model zoo if there are any. The device and MODEL.COMPILE of a
            checkpoint's config are those of its training, and are reset.
        weights: of a config: a path, a name or a URL for `resolve`; None takes MODEL.WEIGHTS.
        overrides: `[KEY, VALUE, ...]` of the config.

    Raises:
        UserError: an unknown name, a config without trained weights, or a checkpoint without
            config.
        FileNotFoundError: the checkpoint does not exist.
        OSError: the checkpoint could not be downloaded.
    """
    cfg = _read_config(source)
    if cfg is None:
        assert not isinstance(source, CfgNode)
        if weights is not None:
            raise UserError(
                f"{source} is a checkpoint, which contains its config and is given alone (a device "
                f"as device=...), or after a config; got a second file, {weights}"
            )
        path = resolve(source)
        content = read_checkpoint(path)
        cfg = _stored_config(content, path)
        cfg.MODEL.DEVICE, cfg.MODEL.COMPILE = "auto", ""
        cfg.merge_from_list(overrides)
        return TrainedModel(cfg, path, content)
    cfg.merge_from_list(overrides)
    path = resolve(_trained_weights(cfg, source, weights))
    return TrainedModel(cfg, path, read_checkpoint(path))


def _read_config(source: CfgNode | str | PathLike[str]) -> CfgNode | None:
    """Return a config that is not frozen; None if `source` is a checkpoint."""
    if isinstance(source, CfgNode):
        cfg = source.clone()
        cfg.defrost()
        return cfg
    text, names = expand_home(source), config_names()
    suffix = Path(text).suffix.lower()
    if text == PACKAGED and not os.path.isfile(text):
        return None
    if text in MODELS and text not in names and not os.path.isfile(text):
        raise UserError(f"{text} is a backbone, to train from; expected a trained model")
    if os.path.isdir(text) and text not in names:
        return None
    is_config = suffix in _YAML_SUFFIXES or text in names
    if os.path.isfile(text) and suffix not in (*_YAML_SUFFIXES, *_CHECKPOINT_SUFFIXES):
        is_config = _is_text(text)
    elif not is_config and "://" not in text and Path(text).name == text and not suffix:
        known = [*names, PACKAGED, "a path"]
        raise UserError(unknown_name("a checkpoint or the name of a config", text, known))
    if not is_config:
        return None
    cfg = get_cfg()
    cfg.merge_from_file(text)
    if text in MODELS:
        cfg.MODEL.WEIGHTS = text if MODELS[text].url else ""
    return cfg


def _is_text(path: str) -> bool:
    """Whether a file is YAML rather than a checkpoint, all of which are binary."""
    with open(path, "rb") as file:
        start = file.read(1024)
    return b"\0" not in start and start[:1] != b"\x80"


def _trained_weights(
    cfg: CfgNode,
    source: CfgNode | str | PathLike[str],
    weights: str | PathLike[str] | None,
) -> str | PathLike[str]:
    """Return `weights` or MODEL.WEIGHTS, if these can be of a trained model."""
    given = weights or cfg.MODEL.WEIGHTS
    name = "the config" if isinstance(source, CfgNode) else os.fspath(source)
    call = "give a trained checkpoint too: Predictor(config, weights), --weights, or MODEL.WEIGHTS"
    if not given:
        raise UserError(f"{name} has no trained weights (MODEL.WEIGHTS): {call}")
    text = os.fspath(given)
    is_backbone = text in MODELS and MODELS[text].is_backbone
    if is_backbone or text.startswith(_BACKBONE_URLS):
        raise UserError(f"{text}, the weights of {name}, are a backbone to train from: {call}")
    return given


def _stored_config(content: Mapping[str, Any], path: Path) -> CfgNode:
    """Return the config that a checkpoint contains."""
    text = get_description(dict(content)).get("config")
    if text is None:
        raise UserError(
            f"{path} contains no config, like all files of detectron2: give the config too, such "
            f"as {_likely_config(content, path)}: Predictor(config, weights), or --config-file"
        )
    cfg = get_cfg()
    cfg.merge_from_text(text, f"the config in {path}")
    return cfg


def _likely_config(content: Mapping[str, Any], path: Path) -> str:
    """Return the name of the config that a checkpoint without one probably has."""
    for model in MODELS.values():
        if model.config and model.url and PurePosixPath(model.url).name == path.name:
            return model.name
    weights = content.get("model", content)
    has_101_layers = any("res4.22." in str(name) for name in weights)
    return "tensormask_R_101_FPN_6x" if has_101_layers else "tensormask_R_50_FPN_1x"
