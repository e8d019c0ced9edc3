"""`~` in every path that a user can give, where no shell replaces it."""

import importlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from bright import BrightModel, bright_cfg, checkpoint, make_image
from PIL import Image

from tensormask import predictor as predictor_module
from tensormask.checkpoint.downloads import cache_folder, resolve
from tensormask.checkpoint.files import read_weights
from tensormask.cli import COMMANDS
from tensormask.commands import FILES
from tensormask.commands.common import CommandParser, write_json
from tensormask.commands.inputs import find_inputs
from tensormask.config import get_cfg
from tensormask.data import CocoDataset, catalog, get_dataset, register_coco_instances
from tensormask.data.images import read_image
from tensormask.data.shapes import ensure_shapes
from tensormask.engine.events import read_metrics
from tensormask.engine.output_dir import link_latest, open_output_dir
from tensormask.engine.resume import find_last_checkpoint
from tensormask.predictor import Predictor
from tensormask.utils.errors import UserError
from tensormask.utils.files import expand_home, write_atomically
from tensormask.utils.video import VideoReader, VideoWriter
from tensormask.visualization.instances import save_image


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a data set, a model and a config; the working directory stays empty."""
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    (home / "images").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))  # of Windows
    monkeypatch.chdir(work)
    monkeypatch.setattr(catalog, "_registered", {})
    monkeypatch.setattr(predictor_module, "build_model", lambda cfg: BrightModel())
    Image.fromarray(make_image()).save(home / "images" / "a.png")
    image = {"id": 1, "file_name": "a.png", "height": 48, "width": 96}
    data = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "cup"}]}
    (home / "a.json").write_text(json.dumps(data))
    (home / "base.yaml").write_text("SEED: 7")
    (home / "c.yaml").write_text("_BASE_: ~/base.yaml\nOUTPUT_DIR: ~/run")
    checkpoint(home, "model.pth", config=bright_cfg().dump())
    yield home
    assert list(work.iterdir()) == []


DATA = "~/a.json@~/images"


def has_image(dataset):
    return dataset.has_file.all() and dataset.load(1)[0].shape == (48, 96, 3)


def registered(name, json_file, image_root):
    register_coco_instances(name, {}, json_file, image_root)
    return get_dataset(name)


def merged(path):
    cfg = get_cfg()
    cfg.merge_from_file(path)
    return cfg


READ = {
    "a data set": lambda: has_image(get_dataset(DATA)),
    "a registered one": lambda: has_image(registered("a", "~/a.json", "~/images")),
    "a registered one, as Path": lambda: has_image(
        registered("b", Path("~/a.json"), Path("~/images"))
    ),
    "CocoDataset": lambda: has_image(CocoDataset("a", "~/a.json", "~/images")),
    "read_image": lambda: read_image("~/images/a.png").any(),
    "read_weights": lambda: read_weights("~/model.pth"),
    "resolve": lambda: resolve("~/model.pth").is_file(),
    "resolve, as Path": lambda: resolve(Path("~/model.pth")).is_file(),
    "a config and its base": lambda: merged("~/c.yaml").SEED == 7,
    "a config, as Path": lambda: merged(Path("~/c.yaml")).SEED == 7,
    "Predictor": lambda: Predictor("~/model.pth")("~/images/a.png").num_detections == 2,
    "Predictor with a config": lambda: Predictor(bright_cfg(), "~/model.pth"),
    "Predictor with MODEL.WEIGHTS": lambda: Predictor(
        bright_cfg(), overrides=["MODEL.WEIGHTS", "~/model.pth"]
    ),
    "a path of an image": lambda: Predictor(Path("~/model.pth"))(Path("~/images/a.png")),
    "a folder": lambda: len(find_inputs(["~/images"]).inputs) == 1,
    "a glob": lambda: len(find_inputs(["~/ima*/*.png"]).inputs) == 1,
    "a set": lambda: len(find_inputs([DATA]).inputs) == 1,
}


@pytest.mark.parametrize("door", READ)
def test_paths_to_read(home, door):
    assert READ[door]()


def write_video():
    with VideoWriter("~/new/a.mp4", 5) as writer:
        for _ in range(5):
            writer.write(make_image())
    with VideoReader("~/new/a.mp4") as frames:
        assert len(list(frames)) == 5
    with VideoReader(Path("~/new/a.mp4")) as frames:
        assert len(list(frames)) == 5


def open_run():
    with open_output_dir("~/new/run") as folder:
        assert folder == Path.home() / "new" / "run"
        link_latest("~/new/run", folder)
        (folder / "metrics.json").write_text('{"iteration": 1}\n')
        (folder / "m.pth").touch()
        (folder / "last_checkpoint").write_text("m.pth")
    assert read_metrics("~/new/run/metrics.json") == [{"iteration": 1}]
    assert find_last_checkpoint("~/new/run") == folder / "m.pth"


WRITTEN = {
    "Detections.save": lambda: Predictor("~/model.pth")("~/images/a.png").save("~/new/a.json"),
    "a drawing": lambda: Predictor("~/model.pth")("~/images/a.png").save(Path("~/new/a.png")),
    "save_image": lambda: save_image("~/new/a.png", np.zeros((9, 9, 3), np.uint8)),
    "write_atomically": lambda: write_atomically("~/new", lambda file: file.write(b"a")),
    "write_json": lambda: write_json("~/new", 1),
    "a video": write_video,
    "a run": open_run,
    "shapes": lambda: ensure_shapes("val", "~/new"),
}


@pytest.mark.parametrize("door", WRITTEN)
def test_paths_to_write(home, door, nothing_left_behind, monkeypatch):
    monkeypatch.setattr("tensormask.data.shapes.NUM_IMAGES", {"val": 1})
    WRITTEN[door]()
    assert (home / "new").exists()


@pytest.mark.parametrize("variable", ["TENSORMASK_DATASETS", "DETECTRON2_DATASETS"])
def test_the_folder_of_data_sets(home, variable, monkeypatch):
    for other in ("TENSORMASK_DATASETS", "DETECTRON2_DATASETS"):
        monkeypatch.delenv(other, raising=False)
    with pytest.raises(FileNotFoundError, match=str(home / "data")):
        get_dataset("coco_2017_val", "~/data")
    monkeypatch.setenv(variable, "~/data")
    with pytest.raises(FileNotFoundError, match=str(home / "data")):
        get_dataset("coco_2017_val")


def test_the_cache(home, monkeypatch):
    monkeypatch.setenv("TENSORMASK_CACHE", "~/cache")
    assert cache_folder() == home / "cache"


@pytest.mark.parametrize("metavar", ["FILE", "DIR", "INPUT", "OUTPUT", "RUN"])
def test_options_of_commands(home, metavar):
    parser = CommandParser("a", description="", example="")
    parser.add_argument("words", nargs="*", metavar=metavar)
    parser.add_argument("--one", type=Path, metavar=metavar)
    parser.add_argument("--none", metavar=metavar)
    args = parser.parse_args(["~/a", "https://b.c/~/d", "--one=~/e"])
    assert args.words == [str(home / "a"), "https://b.c/~/d"]
    assert (args.one, args.none) == (home / "e", None)


def test_every_option_with_a_path_has_its_metavar():
    """Otherwise `~` would stay in it."""
    words = ("file", "folder", "path", "checkpoint", "write the", "write all", "an image")
    for module, _ in COMMANDS.values():
        command = importlib.import_module(f"tensormask.commands.{module}")
        for action in command.build_parser()._actions:
            if any(str(action.help).startswith(word) for word in words):
                assert action.nargs == 0 or action.metavar in FILES, (module, action.dest)


def test_names_that_begin_with_a_tilde(home, monkeypatch):
    """A file of this name, a user, nobody, and no home at all."""
    Path("~a.png").write_bytes((home / "images" / "a.png").read_bytes())
    assert read_image("~a.png").any()
    os.unlink("~a.png")
    for name in ("~a.png", "a/~/b", "~"):
        expand_home(name)
    with pytest.raises(UserError, match="no user 'no-such-user'"):
        open_output_dir("~no-such-user/run").__enter__()
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and user
    for path in ("~", "~/run"):
        with pytest.raises(UserError, match="set HOME"):
            open_output_dir(path).__enter__()


def test_names_beyond_the_encoding_of_the_locale(monkeypatch):
    """As in the locale C without Python's UTF-8 mode."""
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    monkeypatch.setattr(os, "fsdecode", lambda data: data.decode("ascii", "surrogateescape"))
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    path = expand_home("images/é 圆.png")
    assert os.fsencode(path) == "images/é 圆.png".encode()
    assert expand_home(path) == path
    assert os.fsencode(expand_home(path + "é")) == "images/é 圆.pngé".encode()
