"""Models by name: the configs of the published ones, and any config's model in one line."""

from os import PathLike

import torch

from tensormask.checkpoint.downloads import packaged_file
from tensormask.checkpoint.loading import load_weights
from tensormask.checkpoint.trained import find_trained_model
from tensormask.checkpoint.zoo import MODELS, PACKAGED, ZooModel
from tensormask.config import CfgNode, get_cfg
from tensormask.config.files import CONFIGS
from tensormask.modeling import TensorMask, build_model
from tensormask.utils.errors import UserError, unknown_name

__all__ = ["MODELS", "PACKAGED", "ZooModel", "build", "get_config"]


def build(
    name: str | PathLike[str],
    *,
    num_classes: int | None = None,
    weights: str | PathLike[str] | None = None,
    device: str | torch.device | None = None,
) -> TensorMask:
    """Return the model of a config, as `build_model` and `load_weights` make it.

    Like torchvision's, it is in train mode: call ``model.eval()`` before inference.

    Args:
        name: of a config, such as "tensormask_R_50_FPN_1x", of the model that comes with the
            package, or the path of a YAML file.
        num_classes: without the background; None: the config's.
        weights: a path, a name in `MODELS` or a URL, see `load_weights`. If its number of
            classes is not ``num_classes``, all but the classifier is loaded. None: random weights.
        device: None: the config's, which is the GPU if there is one, else the CPU.

    Raises:
        UserError: an unknown name, or an invalid config, weights file or device.
        OSError: the weights were not found, or their download failed.

    Example:
        >>> model = build("tensormask_R_50_FPN_1x", num_classes=3, device="cpu")
        >>> model.num_classes, model.training
        (3, True)
    """
    if name == PACKAGED:
        cfg = get_config(PACKAGED)
    else:
        cfg = get_cfg()
        cfg.merge_from_file(name)
    if num_classes is not None:
        cfg.merge_from_list(["MODEL.TENSOR_MASK.NUM_CLASSES", num_classes])
    if device is not None:
        cfg.MODEL.DEVICE = str(device)
    model = build_model(cfg)
    if weights is not None:
        load_weights(model, weights)
    return model


def get_config(name: str) -> CfgNode:
    """Return the config of a model of the zoo, with its weights as MODEL.WEIGHTS if it has any.

    Raises:
        UserError: no such model; a backbone, which has no config; or the file that comes with the
            package is damaged or missing.

    Example:
        >>> cfg = get_config("tensormask_R_50_FPN_6x")
        >>> cfg.MODEL.WEIGHTS, cfg.MODEL.RESNETS.DEPTH
        ('tensormask_R_50_FPN_6x', 50)
    """
    if name not in MODELS:
        raise UserError(unknown_name("a model of the zoo", name, MODELS))
    model = MODELS[name]
    if name == PACKAGED:
        cfg = find_trained_model(packaged_file()).cfg
        cfg.MODEL.WEIGHTS = name
        return cfg
    if model.config is None:
        raise UserError(f"{name} is a backbone: give it as MODEL.WEIGHTS to a config of a model")
    cfg = get_cfg()
    cfg.merge_from_file(CONFIGS / f"{name}.yaml")
    if model.url is not None:
        cfg.MODEL.WEIGHTS = name
    return cfg
