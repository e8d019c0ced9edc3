"""The table of models: the one that comes with the package, and published ones with their URLs."""

from pathlib import Path
from typing import NamedTuple

DETECTRON2_URL = "https://dl.fbaipublicfiles.com/detectron2/"
TORCHVISION_URL = "https://download.pytorch.org/models/"

# The model that comes with the package, which `tensormask predict` uses without --weights.
PACKAGED = "tensormask_v2_nuclei"
WEIGHTS = Path(__file__).parents[1] / "weights"  # its file, and the model card


class ZooModel(NamedTuple):
    """A row of the model zoo. MODEL_ZOO.md is made from the rows."""

    name: str  # for MODEL.WEIGHTS and `load_weights`
    config: str | None  # its YAML, relative to the repository; None for a backbone, or in the file
    url: str | None  # None if no weights were released, or if they come with the package
    sha256: str | None  # of the file, or its first digits
    metrics: dict[str, float]  # in percent
    source: str  # where the metrics come from
    path: Path | None = None  # of a file that comes with the package, and contains its config
    command: str = ""  # of the training, if it was here

    @property
    def is_backbone(self) -> bool:
        return self.config is None and self.path is None


def _tensormask(name: str, url: str | None, metrics: dict[str, float], source: str) -> ZooModel:
    return ZooModel(name, f"configs/{name}.yaml", url, None, metrics, source)


def _packaged(sha256: str | None, metrics: dict[str, float], command: str) -> ZooModel:
    source, path = "nuclei_dsb2018 val", WEIGHTS / f"{PACKAGED}.safetensors"
    return ZooModel(PACKAGED, None, None, sha256, metrics, source, path, command)


def _msra(depth: int) -> ZooModel:
    url = f"{DETECTRON2_URL}ImageNetPretrained/MSRA/R-{depth}.pkl"
    return ZooModel(f"MSRA_R_{depth}", None, url, None, {}, "detectron2, a copy of MSRA's")


def _torchvision(name: str, weights: str, file: str, top1: float) -> ZooModel:
    """Return the row of weights of torchvision, of a file whose name has digits of its SHA-256."""
    sha256, source = file.rpartition("-")[2], f"torchvision, {weights}"
    url = f"{TORCHVISION_URL}{file}.pth"
    return ZooModel(f"torchvision_{name}", None, url, sha256, {"top-1": top1}, source)


def _torchvision_resnet(depth: int, sha256: str, top1: float, version: int = 1) -> ZooModel:
    name = f"R_{depth}" if version == 1 else f"R_{depth}_V{version}"
    weights = f"ResNet{depth}_Weights.IMAGENET1K_V{version}"
    return _torchvision(name, weights, f"resnet{depth}-{sha256}", top1)


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
    _packaged(  # dev/make_nuclei_model.py writes these lines
        sha256="6d14d8a8b80604b96ee6b33453833ea4558929de7d038d94d21f8fa58123e0a9",
        metrics={"mask AP": 52.93, "mask AP@400": 56.63, "box AP": 54.25},
        command="tensormask train --config-file dev/nuclei_model.yaml DATALOADER.NUM_WORKERS 0",
    ),
    _msra(50),
    _msra(101),
    _torchvision_resnet(18, "f37072fd", 69.758),
    _torchvision_resnet(34, "b627a593", 73.314),
    _torchvision_resnet(50, "0676ba61", 76.130),
    _torchvision_resnet(101, "63fe2227", 77.374),
    _torchvision_resnet(50, "11ad3fa6", 80.858, version=2),
    _torchvision_resnet(101, "cd907fc2", 81.886, version=2),
    _torchvision(
        "mobilenet_v2", "MobileNet_V2_Weights.IMAGENET1K_V2", "mobilenet_v2-7ebf99e0", 72.154
    ),
    _torchvision(
        "mobilenet_v3_large",
        "MobileNet_V3_Large_Weights.IMAGENET1K_V2",
        "mobilenet_v3_large-5c1a4163",
        75.274,
    ),
    _torchvision(
        "convnext_tiny", "ConvNeXt_Tiny_Weights.IMAGENET1K_V1", "convnext_tiny-983f1562", 82.520
    ),
)
MODELS: dict[str, ZooModel] = {model.name: model for model in _ROWS}
