"""The model zoo: a table of the published models, and their configs by name."""

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from tensormask.config import CfgNode, get_cfg
from tensormask.utils.errors import UserError

DETECTRON2_URL = "https://dl.fbaipublicfiles.com/detectron2/"
TORCHVISION_URL = "https://download.pytorch.org/models/"
_ROOT = Path(__file__).parent.parent  # of the repository, with configs/


class ZooModel(NamedTuple):
    """A row of the model zoo. MODEL_ZOO.md is made from the rows."""

    name: str  # for MODEL.WEIGHTS and `load_weights`
    config: str | None  # its YAML, relative to the repository; None for a backbone
    url: str | None  # None if no weights were released
    sha256: str | None  # of the file, or its first digits
    metrics: dict[str, float]  # in percent
    source: str  # where the metrics come from


def _tensormask(name: str, url: str | None, metrics: dict[str, float], source: str) -> ZooModel:
    return ZooModel(name, f"configs/{name}.yaml", url, None, metrics, source)


def _msra(depth: int) -> ZooModel:
    url = f"{DETECTRON2_URL}ImageNetPretrained/MSRA/R-{depth}.pkl"
    return ZooModel(f"MSRA_R_{depth}", None, url, None, {}, "detectron2, a copy of MSRA's")


def _torchvision(depth: int, sha256: str, top1: float) -> ZooModel:
    url = f"{TORCHVISION_URL}resnet{depth}-{sha256}.pth"
    source = f"torchvision, ResNet{depth}_Weights.IMAGENET1K_V1"
    return ZooModel(f"torchvision_R_{depth}", None, url, sha256, {"top-1": top1}, source)


_ROWS = (
    _tensormask(
        "tensormask_R_50_FPN_1x",
        f"{DETECTRON2_URL}TensorMask/tensormask_R_50_FPN_1x/152549419/model_final_8f325c.pkl",
        {"box AP": 37.6, "mask AP": 32.4},
        "detectron2, COCO val2017",
    ),
    _tensormask(
        "tensormask_R_50_FPN_6x",
        f"{DETECTRON2_URL}TensorMask/tensormask_R_50_FPN_6x/153538791/model_final_e8df31.pkl",
        {"box AP": 41.4, "mask AP": 35.8},
        "detectron2, COCO val2017",
    ),
    _tensormask("tensormask_R_101_FPN_6x", None, {"mask AP": 37.1}, "the paper, COCO test-dev"),
    _msra(50),
    _msra(101),
    _torchvision(18, "f37072fd", 69.758),
    _torchvision(34, "b627a593", 73.314),
    _torchvision(50, "0676ba61", 76.130),
    _torchvision(101, "63fe2227", 77.374),
)
MODELS: dict[str, ZooModel] = {model.name: model for model in _ROWS}


def get_config(name: str) -> CfgNode:
    """Return the config of a model of the zoo, with its weights as MODEL.WEIGHTS if it has any.

    Raises:
        ValueError: no such model, or a backbone, which has no config.
        FileNotFoundError: the package was installed without the repository's configs.

    Example:
        >>> cfg = get_config("tensormask_R_50_FPN_6x")
        >>> cfg.MODEL.WEIGHTS, cfg.MODEL.RESNETS.DEPTH
        ('tensormask_R_50_FPN_6x', 50)
    """
    if name not in MODELS:
        raise UserError(unknown_name("a model of the zoo", name, MODELS))
    model = MODELS[name]
    if model.config is None:
        raise UserError(f"{name} is a backbone: give it as MODEL.WEIGHTS to a config of a model")
    path = _ROOT / model.config
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: the installed package is without the repository's YAML files. "
            f"Get {model.config} from the repository and read it with cfg.merge_from_file"
        )
    cfg = get_cfg()
    cfg.merge_from_file(path)
    if model.url is not None:
        cfg.MODEL.WEIGHTS = name
    return cfg


def unknown_name(what: str, name: str, known: Collection[str]) -> str:
    """Say that a name is unknown, with the nearest known name and all of them."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"{name!r} is not {what}; the nearest name is {nearest!r}. Known: {', '.join(known)}"
