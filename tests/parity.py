"""Parity cases: detectron2's numbers (tests/assets), and the seeded models and images for them."""

import json
import pickle
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as mask_utils
from seeded import image, state_dict

import tensormask
from tensormask.config import CfgNode

DATA = Path(__file__).parent / "assets"
CONFIGS = Path(__file__).parent.parent / "configs"


def load_case(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Return the json of a case and its arrays, empty if it has none."""
    arrays = DATA / f"{name}.npz"
    case = json.loads((DATA / f"{name}.json").read_text())
    return case, dict(np.load(arrays)) if arrays.exists() else {}


def build_model(case: dict, kind: str, folder: Path) -> tensormask.TensorMask:
    """Return the model of a case on the CPU, with weights from a file in detectron2's format."""
    shapes = json.loads((DATA / f"shapes_r50_{kind}.json").read_text())
    checkpoint = {"model": state_dict(shapes, case["weight_seed"]), "__author__": "Detectron2"}
    path = folder / "model_final.pkl"
    path.write_bytes(pickle.dumps(checkpoint))
    model = tensormask.build_model(get_cfg(case))
    assert not any(tensormask.load_weights(model, path))
    return model


def get_cfg(case: dict) -> CfgNode:
    cfg = tensormask.get_cfg()
    cfg.merge_from_file(CONFIGS / case.get("yaml", "tensormask_R_50_FPN_1x.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *case["opts"]])
    return cfg


def make_image(entry: dict) -> torch.Tensor:
    """Return an RGB image (3, H, W) uint8."""
    array = image(entry["height"], entry["width"], entry["seed"])
    return torch.from_numpy(array).permute(2, 0, 1)


def target(entry: dict) -> dict[str, torch.Tensor]:
    """Return the objects of an image, with polygons rasterized by pycocotools."""
    height, width = entry["height"], entry["width"]
    masks = [
        mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(polygons, height, width)))
        for polygons in entry["polygons"]
    ]
    return {
        "boxes": torch.tensor(entry["boxes"]),
        "labels": torch.tensor(entry["classes"]),
        "masks": torch.from_numpy(np.stack(masks)).bool(),
    }
