"""Models in a local folder and on a server that speaks the Hub's API, also without network."""

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image

import tensormask
from tensormask import Predictor
from tensormask.checkpoint.downloads import resolve
from tensormask.checkpoint.files import read_checkpoint, read_weights
from tensormask.checkpoint.hub import find_in_folder, find_on_hub
from tensormask.checkpoint.zoo import MODELS, PACKAGED
from tensormask.commands.predict import main as predict
from tensormask.utils.errors import UserError

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")

from hub_server import HubServer  # noqa: E402
from loopback import serve  # noqa: E402

from tensormask.hub import mixin  # noqa: E402

IMAGE = Path(tensormask.__file__).parent / "data" / "nuclei" / "val" / "001.jpg"
RESULTS = {"bbox": {"AP": 41.25, "AP-cell": 1.0}, "segm": {"AP": 40.123, "AP50": 60.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tensormask.save_pretrained(PACKAGED, tmp_path_factory.mktemp("hub") / "cells")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    constants = huggingface_hub.constants
    with serve(HubServer) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        url = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def serve_folder(hub: HubServer, folder, name="me/cells"):
    hub.models[name] = {"main": {path.name: path.read_bytes() for path in folder.iterdir()}}


# ---- a folder ----


def test_a_folder_has_the_weights_in_their_precision_and_predicts_the_same(folder):
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.json", "model.safetensors")
    }
    original = read_weights(MODELS[PACKAGED].path)
    saved = read_weights(folder / "model.safetensors")
    assert saved.keys() == original.keys()
    for name, value in original.items():
        assert saved[name].dtype == value.dtype
        assert torch.equal(saved[name], value)
    ours, theirs = (Predictor(source, device="cpu") for source in (folder, PACKAGED))
    assert ours.class_names == theirs.class_names == ["nucleus"]
    assert ours.score_threshold == theirs.score_threshold
    found, expected = (predictor(IMAGE, threshold=0.5) for predictor in (ours, theirs))
    assert len(expected["scores"]) > 5
    assert torch.equal(found["masks"], expected["masks"])


def test_from_pretrained_returns_a_model_to_predict_with(folder):
    for source in (folder, str(folder / "model.safetensors")):
        model = tensormask.from_pretrained(source, device="cpu", overrides=["TEST.MAX_DETS", 7])
        assert isinstance(model, tensormask.TensorMask)
        assert not model.training


def test_config_json_is_a_copy_for_people(folder):
    content, metadata = (
        json.loads((folder / "config.json").read_text()),
        read_checkpoint(folder / "model.safetensors"),
    )
    assert content["config"] == json.loads(json.dumps(yaml.safe_load(metadata["config"])))
    assert content["class_names"] == ["nucleus"]
    assert content["score_threshold"] == metadata["score_threshold"]


def test_an_edited_copy_is_said_to_have_no_effect(folder, tmp_path, caplog):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert resolve(tmp_path) == tmp_path / "model.safetensors"
    assert not caplog.records
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"nucleus"', '"cell"'))
    resolve(tmp_path)
    assert "config.json differs from the config in model.safetensors" in caplog.text
    (tmp_path / "config.json").write_text("{")
    caplog.clear()
    resolve(tmp_path)
    assert not caplog.records


def test_predict_reads_a_folder(folder, tmp_path):
    options = ["--weights", str(folder), "--output", str(tmp_path), "--save", "json"]
    assert predict([str(IMAGE), *options, "MODEL.DEVICE", "cpu"]) == 0
    assert len(json.loads((tmp_path / "detections.json").read_text())) > 5


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "without model.safetensors: give a folder of save_pretrained, or a checkpoint, such"),
        ({"pytorch_model.bin": b"\x80"}, "without model.safetensors"),
        ({"model.safetensors": b"<html>"}, "damaged, or not a safetensors file"),
        ({"model.safetensors": b"\x80\x04."}, "damaged, or not a safetensors file"),
        ({"model.safetensors": safetensors.torch.save({"a": torch.ones(1)})}, "no config in its"),
    ],
)
def test_other_folders_are_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for load in (find_in_folder, tensormask.from_pretrained, Predictor, resolve):
        with pytest.raises(UserError, match=message):
            load(tmp_path)


def test_folders_of_the_machine_are_not_published(tmp_path):
    content = read_checkpoint(MODELS[PACKAGED].path)
    config = yaml.safe_load(content["config"])
    config["MODEL"] |= {"WEIGHTS": "/home/me/secret", "DEVICE": "cpu"}
    names = ["/home/me/secret/a.json@/home/me/secret/a", "shapes_train"]
    config |= {"OUTPUT_DIR": "/home/me/secret", "DATASETS": {"TRAIN": names}}
    torch.save({**content, "config": yaml.safe_dump(config)}, tmp_path / "model.pth")
    folder = tensormask.save_pretrained(tmp_path / "model.pth", tmp_path / "out")
    for path in folder.iterdir():
        assert b"secret" not in path.read_bytes()
    cfg = yaml.safe_load(read_checkpoint(folder / "model.safetensors")["config"])
    assert [*cfg["DATASETS"]["TRAIN"]] == ["a.json@a", "shapes_train"]
    assert cfg["MODEL"]["DEVICE"] == "auto"
    assert "trained on `a.json@a`, `shapes_train`" in (folder / "README.md").read_text()


def test_a_folder_needs_no_extra_but_the_rest_names_it(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert resolve(folder) == folder / "model.safetensors"
    for call in (
        lambda: tensormask.save_pretrained(PACKAGED, tmp_path),
        lambda: tensormask.push_to_hub(PACKAGED, "me/cells"),
        lambda: resolve("hf://me/cells"),
    ):
        with pytest.raises(UserError, match=r"pip install 'tensormask\[hub\]'"):
            call()


# ---- the card ----


def test_the_card_has_ap_and_the_commands(folder):
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("tensormask", "image-segmentation")
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values == {"AP of boxes": 54.25, "AP of masks": 52.93}
    assert "tensormask predict image.jpg --weights cells\n" in card.text
    assert 'Predictor("cells", threshold=0.584)' in card.text
    assert "| `nuclei_dsb2018 val` | masks | 52.9 | 80.0 | 61.5 | – | – | – | 56.6 |" in card.text
    assert "1 class: nucleus" in card.text


def test_given_results_and_a_card_that_is_kept(folder, tmp_path):
    tensormask.save_pretrained(folder, tmp_path, results=RESULTS, license="mit")
    text = (tmp_path / "README.md").read_text()
    assert "| masks | 40.1 | 60.0 | – |" in text
    assert "license: mit" in text
    (tmp_path / "README.md").write_text("mine")
    tensormask.save_pretrained(folder, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


RECORDS = [
    {"iteration": 9, "total_loss": 1.0},
    {"iteration": 9, "bbox/AP": 10.0, "segm/AP": 9.0, "ema/segm/AP": 11.0},
    {"iteration": 19, "bbox/AP": 20.0, "segm/AP": None, "ema/segm/AP": 21.0},
]


@pytest.mark.parametrize(
    "name, iteration, best, expected",
    [
        ("model_final.pth", 19, "", {"bbox/AP": 20.0, "segm/AP": None}),
        ("model_0000009.pth", 9, "", {"bbox/AP": 10.0, "segm/AP": 9.0}),
        ("model_final_ema.pth", 19, "", {"segm/AP": 21.0}),
        ("model_best.pth", 9, "ema/segm/AP", {"segm/AP": 11.0}),
        ("model_best.pth", 9, "segm/AP", {"bbox/AP": 10.0, "segm/AP": 9.0}),
        ("model_final.pth", 29, "", {}),
        ("model_final.pth", None, "", {}),
    ],
)
def test_results_are_those_of_the_run_at_the_iteration(tmp_path, name, iteration, best, expected):
    (tmp_path / "metrics.json").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    cfg = tensormask.get_cfg()
    cfg.SOLVER.CHECKPOINT_BEST = best
    content = {} if iteration is None else {"iteration": iteration}
    assert mixin._recorded_results(tmp_path / name, content, cfg) == expected


# ---- the Hub ----


def test_upload_and_download(hub, folder):
    url = tensormask.push_to_hub(folder, "me/cells", token="hf_secret", license="apache-2.0")
    assert url.startswith(f"{hub.url}/me/cells/commit/")
    files = hub.models["me/cells"]["main"]
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert b"--weights hf://me/cells\n" in files["README.md"]
    assert b"license: apache-2.0" in files["README.md"]
    hub.requests.clear()
    model = tensormask.from_pretrained("me/cells", device="cpu")
    expected = read_weights(folder / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name].to(value.dtype))
    assert {request.rpartition("/")[2] for request in hub.requests} == {
        *("model.safetensors", "config.json")
    }
    predictor = Predictor("hf://me/cells", device="cpu")
    assert (predictor.class_names, round(predictor.score_threshold, 3)) == (["nucleus"], 0.584)


def test_the_mixin_gives_back_the_same_file(hub, folder, tmp_path):
    serve_folder(hub, folder)
    for source in ("me/cells", folder):
        model = mixin.PretrainedTensorMask.from_pretrained(source)
        model.save_pretrained(tmp_path / "again")
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "again" / "README.md").read_text().count("FOLDER") > 0


def test_revisions(hub, folder):
    serve_folder(hub, folder)
    hub.models["me/cells"]["v1"] = dict(hub.models["me/cells"]["main"])
    hub.models["me/cells"]["main"] = {}
    path = find_on_hub("me/cells@v1")
    assert find_on_hub("me/cells", revision="v1") == path
    assert resolve("hf://me/cells@v1") == path


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def pickled(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "name, files, message",
    [
        ("me/unknown", None, "no model me/unknown on the Hub, or it is private"),
        ("me/gated", {}, "only to users with access"),
        ("me/cells@old", {}, "the model me/cells on the Hub has no revision old"),
        ("a/b/c", None, "'a/b/c' is not the name of a model, user/model"),
        ("you/vit", {"pytorch_model.bin": pickle.dumps(Bomb())}, "has no model.safetensors"),
        ("you/vit", {"model.safetensors": pickle.dumps(Bomb())}, "not a safetensors file"),
        ("you/vit", {"model.safetensors": pickled({"a": torch.ones(1)})}, "not a safetensors file"),
        ("you/vit", {"model.safetensors": safetensors.torch.save({"a": torch.ones(1)})}, "vit on"),
    ],
)
def test_models_that_are_refused(hub, tmp_path, monkeypatch, name, files, message):
    monkeypatch.chdir(tmp_path)
    hub.gated.add("me/gated")
    if files is not None:
        hub.models[name.partition("@")[0]] = {"main": files}
    with pytest.raises(UserError, match=message):
        tensormask.from_pretrained(name)
    with pytest.raises(UserError, match=message):
        Predictor(f"hf://{name}")
    assert not (tmp_path / "exploded").exists()
    assert not [request for request in hub.requests if request.endswith(".bin")]


@pytest.mark.parametrize("name", ["cells", "a/b/c", "me/-"])
def test_names_for_an_upload_are_checked(hub, folder, name):
    with pytest.raises(UserError, match="user/model"):
        tensormask.push_to_hub(folder, name, token="hf_secret")


def test_offline(hub, folder, monkeypatch):
    serve_folder(hub, folder)
    path = find_on_hub("me/cells")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert find_on_hub("me/cells") == path
    with pytest.raises(OSError, match="me/dogs could not be read from the Hub: HF_HUB_OFFLINE is"):
        find_on_hub("me/dogs")
    assert hub.requests == []


@pytest.mark.slow  # three processes
def test_the_commands_with_the_environment_of_the_hub(hub, folder, tmp_path):
    """The endpoint is read from the environment when huggingface_hub is imported."""
    serve_folder(hub, folder)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    command = [sys.executable, "-m", "tensormask", "predict", "a.png", "--save", "json"]
    command += ["--weights", "hf://me/cells", "MODEL.DEVICE", "cpu"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}

    def run(**variables):
        options = {"cwd": tmp_path, "capture_output": True, "text": True}
        return subprocess.run(command, env=environment | variables, check=False, **options)

    failed = run(HF_HUB_OFFLINE="1")
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: me/cells could not be read from the")
    for variables in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = run(**variables)
        assert done.returncode == 0
        assert "HTTP" not in done.stderr  # of the client
