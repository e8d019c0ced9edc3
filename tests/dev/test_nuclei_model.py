"""`dev/model_card.py` and `dev/make_nuclei_model.py`: what they measure and write."""

import json
import runpy
import shutil
from pathlib import Path

import make_nuclei_model
import model_card
import pytest
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from tiny import build, get_cfg

from tensormask import Predictor
from tensormask.checkpoint import zoo
from tensormask.checkpoint.files import read_checkpoint
from tensormask.checkpoint.trained import find_trained_model
from tensormask.data.catalog import _NUCLEI_ROOT
from tensormask.utils.errors import UserError

OPTS = ["MODEL.TENSOR_MASK.NUM_CLASSES", 1, "MODEL.RESNETS.NORM", "BN", "INPUT.MIN_SIZE_TEST", 32]
OPTS += ["INPUT.MAX_SIZE_TEST", 32, "MODEL.WEIGHTS", "/a/b.pth", "OUTPUT_DIR", "/of/the/run"]
COMMAND = "train --config-file nuclei DATASETS.TRAIN \"['a b.json@images']\" OUTPUT_DIR /of/the/run"
ENVIRONMENT = f"""\
==== 2026-01-01T00:00:00+00:00
command                  /venv/bin/python /venv/bin/tensormask {COMMAND}
git                      0123456789abcdef0123456789abcdef01234567, changed: README.md

==== 2026-01-02T00:00:00+00:00
command                  /venv/bin/python /venv/bin/tensormask {COMMAND} --resume
git                      fedcba9876543210fedcba9876543210fedcba98, no changes
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run with a checkpoint of a tiny model."""
    folder = tmp_path_factory.mktemp("run")
    content = {"model": build(opts=OPTS).state_dict(), "config": get_cfg(opts=OPTS).dump()}
    content |= {"class_names": ["nucleus"], "category_ids": [1], "iteration": 99, "optimizer": {}}
    torch.save(content, folder / "model_final.pth")
    (folder / "environment.txt").write_text(ENVIRONMENT)
    return folder


def square(x: int, side: int) -> dict:
    """Return a segmentation in an image of 100 x 40 px."""
    mask = torch.zeros(40, 100, dtype=torch.uint8)
    mask[:side, x : x + side] = 1
    rle = mask_utils.encode(mask.numpy().T.copy().T)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def small_set(sides_per_image: list[list[int]]) -> COCO:
    coco, annotations = COCO(), []
    for image_id, sides in enumerate(sides_per_image, start=1):
        for i, side in enumerate(sides):
            x = 40 * (i % 2)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0}
                | {"area": side**2, "bbox": [x, 0, side, side], "segmentation": square(x, side)}
            )
    images = [{"id": i, "height": 40, "width": 100} for i in range(1, len(sides_per_image) + 1)]
    coco.dataset = {"images": images, "annotations": annotations}
    coco.dataset["categories"] = [{"id": 1, "name": "nucleus"}]
    coco.createIndex()
    return coco


def result(image_id: int, x: int, side: int, score: float) -> dict:
    box = [float(value) for value in (x, 0, side, side)]
    found = {"image_id": image_id, "category_id": 1, "score": score, "bbox": box}
    return found | {"segmentation": square(x, side)}


def test_counts_by_hand():
    """Two nuclei of 20 and 10 px; one is found twice, one is half missed, one image is empty."""
    coco = small_set([[20, 10], []])
    found = [result(1, 0, 20, 0.9), result(1, 0, 19, 0.8), result(1, 40, 7, 0.7)]
    found += [result(1, 80, 10, 0.6)]
    assert model_card.count_matches(coco, found, coco.imgToAnns[1]) == 1  # 49 / 100 < 0.5
    row = model_card.count(coco, found, [1, 2])
    assert row == {"images": 2, "nuclei": 2, "found": 50.0, "right": 25.0}
    assert model_card.count(coco, found, [2]) == {"images": 1, "nuclei": 0, "found": 0.0}


def test_groups_of_images():
    coco = small_set([[8], [8, 8, 32], [30] * 21, [14] * 101, []])
    assert model_card.find_groups(coco) == {
        "up to 20 nuclei": [1, 2, 5],
        "21 to 100 nuclei": [3],
        "more than 100 nuclei": [4],
        "nuclei below 12 px": [1, 2, 5],
        "nuclei of 12 to 30 px": [4],
        "nuclei above 30 px": [3],
    }


@pytest.mark.parametrize("name", model_card.CHANGES)
def test_changed_images(name):
    image = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8)
    changed = model_card.CHANGES[name](image)
    scale = {"half the size": 0.5, "twice the size": 2}.get(name, 1)
    assert changed.dtype == torch.uint8
    assert changed.shape == (3, 32 * scale, 48 * scale)
    assert (name == "unchanged") == torch.equal(changed, image)


def test_the_checkpoint_of_a_run(tmp_path):
    with pytest.raises(UserError, match=r"has neither model_best\.pth nor"):
        make_nuclei_model.find_checkpoint(tmp_path)
    for name in ("model_final.pth", "model_final_ema.pth", "model_best.pth"):
        (tmp_path / name).touch()
        assert make_nuclei_model.find_checkpoint(tmp_path) == tmp_path / name
    path = tmp_path / "model_final.pth"
    assert make_nuclei_model.find_checkpoint(path) == path


def test_content_of_the_file(run, tmp_path, monkeypatch):
    """Weights are rounded; of the config, what differs from the defaults but for paths is kept."""
    content = make_nuclei_model.make_content(run / "model_final.pth")
    path = tmp_path / "m.safetensors"
    assert content["about"]["training"] == {
        "command": f"tensormask {COMMAND}",
        "commit": "fedcba9876543210fedcba9876543210fedcba98",
        "iterations": 100,
        "start": "b.pth",
        "parameters": sum(p.numel() for p in build(opts=OPTS).state_dict().values()),
    }
    with pytest.raises(UserError, match=r"m\.safetensors has 22\.\d\d MB, the limit is 5"):
        make_nuclei_model.write(path, content)
    assert not path.exists()
    monkeypatch.setattr(make_nuclei_model, "MAX_BYTES", 30_000_000)
    make_nuclei_model.write(path, content)
    predictor = Predictor(path, device="cpu")
    for name, value in torch.load(run / "model_final.pth")["model"].items():
        expected = value.half().float() if value.dim() > 1 else value
        assert torch.equal(predictor.model.state_dict()[name], expected), name
    trained, cfg = get_cfg(opts=OPTS), find_trained_model(path).cfg
    assert (cfg.SOLVER, cfg.INPUT) == (trained.SOLVER, trained.INPUT)
    for group in ("RESNETS", "FPN", "ANCHOR_GENERATOR", "TENSOR_MASK", "PIXEL_STD"):
        assert cfg.MODEL[group] == trained.MODEL[group]
    config = read_checkpoint(path)["config"]
    assert "DETECTIONS_PER_IMAGE: 400" in config
    assert "SCORE_THRESH_TEST" not in config
    assert "/" not in config


def test_all_files_are_written(run, tmp_path, monkeypatch):
    """With the measurements of two images: the row of the zoo, which is Python, and the card."""
    nuclei, package = tmp_path / "nuclei", tmp_path / "package"
    nuclei.mkdir()
    shutil.copytree(_NUCLEI_ROOT / "val", nuclei / "val")
    content = json.loads((_NUCLEI_ROOT / "val.json").read_text())
    content["images"] = content["images"][:2]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] <= 2]
    (nuclei / "instances_val.json").write_text(json.dumps(content))
    source = tmp_path / "zoo.py"
    shutil.copy(zoo.__file__, source)
    monkeypatch.setattr(zoo, "__file__", str(source))
    monkeypatch.setattr(zoo, "WEIGHTS", package)
    monkeypatch.setattr(make_nuclei_model, "MAX_BYTES", 30_000_000)
    commands = []
    monkeypatch.setattr(
        make_nuclei_model.subprocess, "run", lambda words, **_: commands.append(words)
    )
    monkeypatch.setattr(model_card, "CHANGES", {"inverted": lambda image: 255 - image})
    monkeypatch.setattr(model_card, "CHANGED_SET", f"{nuclei}/instances_val.json@{nuclei}/val")
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(nuclei / "val" / "003.jpg", photos)
    words = [str(run), "--nuclei", str(nuclei), "--photos", str(photos)]
    assert make_nuclei_model.main(words) == 0

    file = read_checkpoint(package / make_nuclei_model.FILE_NAME)
    measured = file["about"]["measured"]
    assert measured["val"]["all"]["images"] == measured["changes"]["inverted"]["images"] == 2
    assert measured["photos"]["images"] == 1
    card = (package / "README.md").read_text()
    assert card == model_card.render(file["about"], file["score_threshold"])
    images = {name: row["images"] for name, row in measured["val"].items()}
    assert images == {"all": 2, "fluorescence": 2}
    assert "| inverted | 2 | " in card
    text = source.read_text()
    assert max(map(len, text.splitlines())) <= 100
    row = runpy.run_path(str(source))["MODELS"][zoo.PACKAGED]
    assert row.command == file["about"]["training"]["command"]
    assert row.metrics["mask AP"] == measured["val"]["all"]["AP"]
    assert len(row.sha256) == 64
    ((_, script),) = commands
    assert Path(script).name == "make_model_zoo.py"
    # Again: the same bytes, and the row is replaced.
    threshold = file["score_threshold"]
    monkeypatch.setattr(model_card, "measure", lambda *_: (measured, threshold))
    first = (package / make_nuclei_model.FILE_NAME).read_bytes()
    assert make_nuclei_model.main(words) == 0
    assert (package / make_nuclei_model.FILE_NAME).read_bytes() == first
    assert source.read_text() == text
