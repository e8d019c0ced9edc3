"""The model that comes with the package: found by its name and by `predict`, checked, no network.

A file of the tests stands in for it. The last tests are of the file itself, if it is there.
"""

import hashlib
import json
import re
from pathlib import Path

import make_nuclei_model
import model_card
import pytest
import torch
from bright import BrightModel, bright_cfg, make_image
from PIL import Image

from tensormask import Predictor, cli, load_weights, model_zoo
from tensormask import predictor as predictor_module
from tensormask.checkpoint import downloads
from tensormask.checkpoint.files import get_description, read_checkpoint
from tensormask.commands import convert_weights, predict
from tensormask.data import get_dataset
from tensormask.model_zoo import MODELS, PACKAGED
from tensormask.utils.errors import UserError

THERE = MODELS[PACKAGED].path
DESCRIBED = {"class_names": ["nucleus", "b", "c"], "category_ids": [7, 8, 9]}


@pytest.fixture
def packaged(tmp_path, monkeypatch) -> Path:
    """The file in the place of the package's; it must not be downloaded."""
    path = tmp_path / "package" / "weights" / f"{PACKAGED}.safetensors"
    path.parent.mkdir(parents=True)
    content = {"model": {"bias": torch.ones(1)}, "config": bright_cfg().dump(), **DESCRIBED}
    convert_weights.writer_of(path, content | {"score_threshold": 0.7})(path.open("wb"))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(MODELS, PACKAGED, MODELS[PACKAGED]._replace(path=path, sha256=sha256))
    monkeypatch.setattr(downloads, "download", None)
    for module in (predictor_module, model_zoo):
        monkeypatch.setattr(module, "build_model", lambda cfg: BrightModel())
    monkeypatch.setattr(predict.logging, "basicConfig", lambda **options: None)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Image.fromarray(make_image()).save("image.png")
    return path


def test_its_name_is_all_that_is_needed(packaged):
    for source in (PACKAGED, model_zoo.get_config(PACKAGED)):
        predictor = Predictor(source)
        assert predictor.class_names == ["nucleus", "b", "c"]
        assert predictor.score_threshold == 0.7
        assert predictor.model.bias == 1
        assert predictor("image.png").num_detections == 2
    model = model_zoo.build(PACKAGED)
    assert model.bias == 0
    assert not any(load_weights(model, PACKAGED))
    assert model.bias == 1
    with pytest.raises(UserError, match="is a checkpoint, which contains its config"):
        Predictor(PACKAGED, "other.pth")


def test_predict_without_weights(packaged, capsys):
    assert cli.main(["predict", "image.png", "--output", "out"]) == 0
    printed = capsys.readouterr().out
    assert f"model {PACKAGED}, finds cell nuclei; other objects need --weights\n" in printed
    assert "threshold 0.7 (the best F1" in printed
    (result, _) = json.loads(Path("out/detections.json").read_text())
    assert (result["category_id"], result["category_name"]) == (7, "nucleus")
    assert Path("out/image.png").is_file()
    with pytest.raises(SystemExit):  # these are not replaced by others in silence
        cli.main(["predict", "image.png", "MODEL.WEIGHTS", "model_final.pth"])


def test_files_with_its_name(packaged, capsys):
    """A folder is not taken for it. A file is, like one with any other name of the zoo."""
    Path(PACKAGED).mkdir()
    assert Predictor(PACKAGED).class_names[0] == "nucleus"
    assert cli.main(["predict", "image.png"]) == 0
    Path(PACKAGED).rmdir()
    Path(PACKAGED).write_text("no model")
    assert cli.main(["predict", "image.png"]) == 0
    assert cli.main(["predict", "image.png", "--weights", PACKAGED]) == 2
    assert "no model" in capsys.readouterr().err
    assert model_zoo.get_config(PACKAGED).MODEL.TENSOR_MASK.NUM_CLASSES == 3


def test_a_damaged_file_is_not_used(packaged, capsys):
    content = bytearray(packaged.read_bytes())
    content[-1] ^= 1
    packaged.write_bytes(content)
    for use in (Predictor, model_zoo.build, lambda name: load_weights(BrightModel(), name)):
        with pytest.raises(UserError, match=re.escape(f"{packaged} is damaged: its SHA-256 is ")):
            use(PACKAGED)
    assert cli.main(["predict", "image.png"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {packaged} is damaged")


def test_a_clone_without_the_file(packaged, capsys):
    packaged.unlink()
    with pytest.raises(SystemExit) as error:
        cli.main(["predict", "image.png"])
    assert error.value.code == 2
    assert "error: name a model: --weights, with a checkpoint" in capsys.readouterr().err
    for use in (Predictor, model_zoo.get_config, downloads.resolve):
        with pytest.raises(UserError, match=f"{PACKAGED} did not come with this copy"):
            use(PACKAGED)
    assert cli.main(["env"]) == 0
    assert re.search(r"^packaged model +none: predict", capsys.readouterr().out, re.MULTILINE)


def test_env_and_help_name_it(packaged, capsys):
    assert cli.main(["env"]) == 0
    assert re.search(rf"^packaged model +{PACKAGED} ", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(SystemExit):
        cli.main(["predict", "--help"])
    assert capsys.readouterr().out.count(PACKAGED) == 2


# ---- the file itself ----

needs_the_file = pytest.mark.skipif(
    not THERE.is_file(), reason=f"{THERE.name} is not in this clone: dev/make_nuclei_model.py"
)


@needs_the_file
def test_the_file_its_row_and_its_card():
    row, content = MODELS[PACKAGED], read_checkpoint(THERE)
    assert row.sha256 == hashlib.sha256(THERE.read_bytes()).hexdigest()
    assert THERE.stat().st_size <= make_nuclei_model.MAX_BYTES
    assert get_description(content).keys() == {*DESCRIBED, "config", "score_threshold"}
    about = content["about"]
    assert row.command == about["training"]["command"]
    assert row.metrics["mask AP"] == about["measured"]["val"]["all"]["AP"]
    card = model_card.render(about, content["score_threshold"])
    assert model_card.CARD.read_text(encoding="utf-8") == card, "run: dev/make_nuclei_model.py"


@needs_the_file
def test_the_file_finds_nuclei():
    dataset = get_dataset("nuclei_val")
    image_id = dataset.image_ids[0]
    rgb, nuclei = dataset.load(image_id)
    predictor = Predictor(PACKAGED, device="cpu")
    found = predictor(rgb, threshold=predictor.score_threshold).to_coco(image_id=image_id)
    matches = model_card.count_matches(dataset.to_coco(), found, nuclei)
    assert matches >= 0.5 * len(nuclei)


@pytest.mark.skipif(THERE.is_file(), reason="the card is that of the file")
def test_without_the_file_the_card_says_so():
    assert model_card.CARD.read_text(encoding="utf-8") == model_card.render(None)
