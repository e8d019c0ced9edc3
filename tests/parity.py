"""detectron2's numbers for seeded weights (tests/assets), and their models and images."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as mask_utils
from safetensors.torch import save_file
from seeded import image, state_dict

import tensormask
from tensormask.commands import convert_weights

DATA = Path(__file__).parent / "assets"
CONFIGS = Path(__file__).parent.parent / "configs"


def load_case(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The json of a case and, where there is one, its arrays."""
    arrays = DATA / f"{name}.npz"
    case = json.loads((DATA / f"{name}.json").read_text())
    return case, dict(np.load(arrays)) if arrays.exists() else {}


def build_model(case: dict, kind: str, folder: Path) -> tensormask.TensorMask:
    """The model of a case on the CPU, its weights from a file in detectron2's format."""
    shapes = json.loads((DATA / f"shapes_r50_{kind}.json").read_text())
    checkpoint = {"model": state_dict(shapes, case["weight_seed"]), "__author__": "Detectron2"}
    path = folder / "model_final.pkl"
    path.write_bytes(pickle.dumps(checkpoint))
    model = tensormask.build_model(get_cfg(case))
    assert not any(tensormask.load_weights(model, path))
    return model


def checkpoints(folder: Path, model: tensormask.TensorMask) -> Iterator[Path]:
    """The weights of `model`, which are in `folder` as `build_model` left them, in other files.

    Each is there until the next one is asked for.
    """
    released = pickle.loads((folder / "model_final.pkl").read_bytes())
    theirs = {name: torch.from_numpy(array) for name, array in released["model"].items()}
    ours = {name: value.clone() for name, value in model.state_dict().items()}
    writers = {
        "detectron2_2.pkl": lambda path: path.write_bytes(pickle.dumps(released, protocol=2)),
        "detectron2.pth": lambda path: torch.save({"model": theirs, "iteration": 5}, path),
        "detectron2.safetensors": lambda path: save_file(theirs, path),
        "ours.pth": lambda path: torch.save({"model": ours}, path),
        "ours_legacy.pth": lambda path: torch.save(
            ours, path, _use_new_zipfile_serialization=False
        ),
        "ours.safetensors": lambda path: save_file(ours, path),
        "converted_to_ours.pth": lambda path: _convert(folder / "model_final.pkl", path),
    }
    for name, write in writers.items():
        path = folder / name
        write(path)
        yield path
        path.unlink()
    # And back, from ours as it was converted.
    _convert(folder / "model_final.pkl", folder / "ours.pth")
    _convert(folder / "ours.pth", folder / "converted_back.pkl")
    yield folder / "converted_back.pkl"


def _convert(source: Path, path: Path) -> None:
    assert convert_weights.main([str(source), str(path)]) == 0


def get_cfg(case: dict):
    cfg = tensormask.get_cfg()
    cfg.merge_from_file(CONFIGS / case.get("yaml", "tensormask_R_50_FPN_1x.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *case["opts"]])
    return cfg


def make_image(entry: dict) -> torch.Tensor:
    """RGB (3, H, W) uint8."""
    array = image(entry["height"], entry["width"], entry["seed"])
    return torch.from_numpy(array).permute(2, 0, 1)


def target(entry: dict) -> dict[str, torch.Tensor]:
    """Objects of an image, polygons made bitmaps by pycocotools."""
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
