"""The published models by name, and the local files of names, addresses and paths."""

import difflib
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple
from urllib.request import url2pathname

from tensormask.checkpoint.downloads import download
from tensormask.config import CfgNode, get_cfg
from tensormask.utils.errors import UserError

_DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/"
_TORCHVISION = "https://download.pytorch.org/models/"
_SCHEMES = ("https", "http", "detectron2", "torchvision", "file")
_DEPTHS = (18, 34, 50, 101)  # of MODEL.RESNETS.DEPTH
_ROOT = Path(__file__).parent.parent  # of the repository, which has the configs


class ZooModel(NamedTuple):
    """A row of the model zoo. MODEL_ZOO.md is made from the rows."""

    name: str  # what MODEL.WEIGHTS and `resolve` call it
    config: str | None  # its YAML, from the top of the repository; None for a backbone
    url: str | None  # None where no weights were released
    sha256: str | None  # of the file: as many of the first digits as are known
    metrics: dict[str, float]  # in percent
    source: str  # where the metrics come from


def _tensormask(name: str, url: str | None, metrics: dict[str, float], source: str) -> ZooModel:
    return ZooModel(name, f"configs/{name}.yaml", url, None, metrics, source)


def _msra(depth: int) -> ZooModel:
    url = f"{_DETECTRON2}ImageNetPretrained/MSRA/R-{depth}.pkl"
    return ZooModel(f"MSRA_R_{depth}", None, url, None, {}, "detectron2, a copy of MSRA's")


def _torchvision(depth: int, sha256: str, top1: float) -> ZooModel:
    url = f"{_TORCHVISION}resnet{depth}-{sha256}.pth"
    source = f"torchvision, ResNet{depth}_Weights.IMAGENET1K_V1"
    return ZooModel(f"torchvision_R_{depth}", None, url, sha256, {"top-1": top1}, source)


_ROWS = (
    _tensormask(
        "tensormask_R_50_FPN_1x",
        f"{_DETECTRON2}TensorMask/tensormask_R_50_FPN_1x/152549419/model_final_8f325c.pkl",
        {"box AP": 37.6, "mask AP": 32.4},
        "detectron2, COCO val2017",
    ),
    _tensormask(
        "tensormask_R_50_FPN_6x",
        f"{_DETECTRON2}TensorMask/tensormask_R_50_FPN_6x/153538791/model_final_e8df31.pkl",
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
    """The config of a model of the zoo, with its name as MODEL.WEIGHTS where it has weights.

    `tensormask.Predictor(get_config("tensormask_R_50_FPN_6x"))` is ready for images.

    Raises:
        ValueError: there is no such model, or it is a backbone, which has no config.
        FileNotFoundError: the package was installed without the repository's configs.
    """
    if name not in MODELS:
        raise UserError(_unknown("model of the zoo", name, MODELS))
    model = MODELS[name]
    if model.config is None:
        raise UserError(f"{name} is a backbone: give it as MODEL.WEIGHTS to a config of a model")
    path = _ROOT / model.config
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: the YAML files are in the repository and not in the installed "
            f"package; get {model.config} from there and read it with cfg.merge_from_file"
        )
    cfg = get_cfg()
    cfg.merge_from_file(path)
    if model.url is not None:
        cfg.MODEL.WEIGHTS = name
    return cfg


def resolve(name: str | os.PathLike[str]) -> Path:
    """The local file of a path, a model of the zoo, or an address, downloaded where need be.

    Args:
        name: one of

            - the path of a file, which comes back as it is (also where it is not there: that is
              for the reader to say);
            - a name in `MODELS`;
            - an address: ``https://...``, ``http://...`` or ``file:///...``;
            - ``detectron2://...``, a file of detectron2's server;
            - ``torchvision://ResNet50_Weights.IMAGENET1K_V2``, weights as torchvision names them
              (18, 34, 50 or 101 layers), or ``torchvision://resnet50``, which is IMAGENET1K_V1, as
              in torchvision's own detection models.

    Raises:
        ValueError: the address is broken or its kind unknown; or a bare name, without folder and
            suffix, is neither a file nor in the zoo.
        OSError: the download failed.
    """
    if isinstance(name, os.PathLike) or os.path.isfile(name):
        return Path(name)
    scheme, separator, rest = name.partition("://")
    scheme = scheme.lower()
    if name in MODELS:
        url = _url(MODELS[name])
    elif not separator:
        return _path(name)
    elif scheme == "file":
        return _path_of_address(name, rest)
    elif scheme in ("https", "http"):
        url = name
    elif scheme == "detectron2":
        url = _DETECTRON2 + rest
    elif scheme == "torchvision":
        url = _torchvision_url(rest)
    else:
        raise UserError(f"{name!r}: {_unknown('kind of address', scheme, _SCHEMES)}")
    return download(url, _sha256(url))


def _url(model: ZooModel) -> str:
    if model.url is None:
        raise UserError(
            f"no weights of {model.name} were released: train it with "
            f"tools/train_net.py --config-file {model.config}"
        )
    return model.url


def _torchvision_url(name: str) -> str:
    from torchvision.models import get_model_weights

    known = {}
    for depth in _DEPTHS:
        weights = get_model_weights(f"resnet{depth}")
        known[f"resnet{depth}"] = weights.IMAGENET1K_V1
        known |= {str(entry): entry for entry in weights}
    if name not in known:
        raise UserError(_unknown("backbone of torchvision that fits", name, known))
    return known[name].url


def _sha256(url: str) -> str | None:
    """The first digits of a file's SHA-256, where known: torchvision has them in its file names."""
    listed = next((model.sha256 for model in _ROWS if model.url == url), None)
    named = re.fullmatch(re.escape(_TORCHVISION) + r"[^/]+-([0-9a-f]{8,64})\.pth", url)
    return listed or (named[1] if named else None)


def _path(name: str) -> Path:
    path = Path(name)
    if path.name == name and not path.suffix:
        raise UserError(_unknown("file and no model of the zoo", name, MODELS))
    return path


def _path_of_address(address: str, rest: str) -> Path:
    host, _, path = rest.partition("/")
    if host not in ("", "localhost") or not path:
        raise UserError(f"{address!r} is no address of a file: write file:///folder/file")
    return Path(url2pathname(f"/{path}"))


def _unknown(what: str, name: str, known: Collection[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"{name!r} is no {what}; the nearest one is {nearest!r}. There are: {', '.join(known)}"
