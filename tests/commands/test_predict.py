"""The command `predict`: which inputs, what is written, and the exit codes."""

import io
import json
import logging
import os
import shlex
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
from bright import CHANNELS, BrightModel, bright_cfg, checkpoint, make_image
from loopback import Answer, serve
from PIL import Image
from pycocotools import mask as rle_tools

from tensormask import cli
from tensormask import predictor as predictor_module
from tensormask.commands import predict
from tensormask.commands.inputs import find_inputs
from tensormask.config import get_cfg
from tensormask.utils.video import VideoReader


@pytest.fixture
def model(monkeypatch):
    model = BrightModel()
    monkeypatch.setattr(predictor_module, "build_model", lambda cfg: model)
    return model


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def run(tmp_path, model, monkeypatch, out):
    """Run the command with a checkpoint, into `out`; return its exit code."""
    monkeypatch.setattr(predict.logging, "basicConfig", lambda **options: None)
    described = {"class_names": list(CHANNELS), "category_ids": [7, 8, 9], "score_threshold": 0.5}
    weights = checkpoint(tmp_path, config=bright_cfg().dump(), **described)
    options = ["--weights", str(weights), "--output", str(out)]
    return lambda *arguments: cli.main(["predict", *options, *map(str, arguments)])


def save(path, rgb=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(make_image() if rgb is None else rgb).save(path)
    return path


def save_video(path, num_frames=5):
    code = {".avi": "MJPG", ".mp4": "mp4v"}[path.suffix]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), 12.5, (96, 48))
    for _ in range(num_frames):
        writer.write(make_image()[..., ::-1])
    writer.release()
    return path


def results_in(out):
    return json.loads((out / "detections.json").read_text())


def names_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_drawings_and_cocos_format(tmp_path, run, out, capsys):
    first, second = save(tmp_path / "in" / "a.png"), save(tmp_path / "in" / "b.bmp")
    # Red scores 0.9 and green 0.65.
    assert run(tmp_path / "in") == 0
    results = results_in(out)
    assert [(r["image_id"], r["category_id"]) for r in results] == [(0, 7), (0, 8), (1, 7), (1, 8)]
    assert [r["category_name"] for r in results] == ["red", "green"] * 2
    assert [r["file_name"] for r in results] == [str(first)] * 2 + [str(second)] * 2
    assert rle_tools.decode(results[0]["segmentation"]).shape == (48, 96)
    assert results[0]["bbox"] == pytest.approx([12, 6, 24, 12], abs=2)
    assert names_in(out) == ["a.png", "b.png", "detections.json"]
    with Image.open(out / "a.png") as drawing:
        assert drawing.width > 96
    printed = capsys.readouterr().out
    assert "threshold 0.5 (the best F1" in printed
    assert "detections: 4 in 2 images" in printed


def test_threshold_classes_and_overrides(tmp_path, run, model, out):
    path = save(tmp_path / "a.png")
    assert run("INPUT.MIN_SIZE_TEST", 24, path, "--threshold", 0.8, "--classes", "blue, 0") == 0
    assert model.seen == [[(3, 24, 48)]]
    assert model.options == [{"score_threshold": 0.8, "classes": [2, 0]}]
    assert run(path, "--classes", "blu") == 2


def test_a_config_with_weights_and_detectron2s_options(tmp_path, model, monkeypatch, out, capsys):
    monkeypatch.setattr(predict.logging, "basicConfig", lambda **options: None)
    config = tmp_path / "config.yaml"
    config.write_text(bright_cfg().dump())
    video, weights = save_video(tmp_path / "v.avi", 1), checkpoint(tmp_path)
    words = ["--config-file", config, "--input", save(tmp_path / "a.png"), "--video-input", video]
    words += ["--confidence-threshold", "0.6", "--output", out, "--opts", "MODEL.WEIGHTS", weights]
    assert predict.main([str(word) for word in words]) == 0
    assert [options["score_threshold"] for options in model.options] == [0.6, 0.6]
    assert predict.main([str(word) for word in [*words[:4], "MODEL.WEIGHTS", weights]]) == 0
    assert "threshold 0.5" in capsys.readouterr().out


def test_label_images(tmp_path, run, out):
    assert run(save(tmp_path / "a.png"), "--save", "labels") == 0
    assert names_in(out) == ["labels/a.png"]
    with Image.open(out / "labels" / "a.png") as image:
        assert image.mode.startswith("I;16")
        labels = np.asarray(image)
    assert labels.shape == (48, 96)
    assert [labels[12, 24], labels[33, 66], labels[0, 0]] == [1, 2, 0]


def test_a_video(tmp_path, run, out):
    image, video = save(tmp_path / "a.png"), save_video(tmp_path / "a.avi")
    assert run(image, video, "--save", "image,video,json,labels") == 0
    frames = [f"labels/a_2/{number:06d}.png" for number in range(5)]
    assert names_in(out) == ["a.png", "a_2.mp4", "detections.json", "labels/a.png", *frames]
    with VideoReader(out / "a_2.mp4") as reader:
        written = list(reader)
        assert reader.fps == 12.5
    assert [frame.shape for frame in written] == [(48, 96, 3)] * 5
    # The object in red is drawn: the red channel is no longer the only one.
    assert written[4][8:16, 14:34, 1:].max() > 60
    results = [r for r in results_in(out) if r["category_name"] == "red"]
    assert [(r["image_id"], r.get("frame")) for r in results] == [
        (0, None), *((n + 1, n) for n in range(5))
    ]  # fmt: skip


def test_damaged_inputs_are_named_and_the_rest_goes_on(tmp_path, run, out, capsys, caplog):
    good, cut = save(tmp_path / "good.png"), tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:-60])
    video = save_video(tmp_path / "whole.avi", 20)
    cut_video, text_video = tmp_path / "cut.avi", tmp_path / "text.mp4"
    cut_video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    text_video.write_text("no video")
    text = tmp_path / "text"
    text.write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "dangling.png").symlink_to("nowhere.png")
    bad = [cut, text, tmp_path / "none.png", tmp_path / "none*.png", cut_video, text_video]
    bad += [tmp_path / "none.avi", tmp_path / "empty", "ftp://host/a.png", "http:///a.png"]
    with caplog.at_level(logging.ERROR):
        assert run(*bad, good, tmp_path / "links") == 1
    for path in bad:
        assert str(path) in caplog.text
    assert "dangling.png does not exist" in caplog.text
    assert "inputs that could not be read: 11" in capsys.readouterr().out
    assert names_in(out) == ["cut_2.mp4", "detections.json", "good.png"]


def test_other_files_of_a_folder_are_counted(tmp_path, run, out, caplog):
    for name in ("a.heic", "b.HEIC", "c.dng", "notes", "._a.png"):
        save(tmp_path / "in" / "a.png").with_name(name).write_text("no image")
    with caplog.at_level(logging.INFO):
        assert run(tmp_path / "in") == 0
    (line,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert line.startswith("5 other files were left out: 2 .heic, ")
    assert "2 .heic, 1 .dng are images in formats that are not read: convert them" in caplog.text


def test_nothing_read_keeps_older_results(tmp_path, run, out):
    assert run(save(tmp_path / "a.png")) == 0
    before = results_in(out)
    assert run(tmp_path / "typo.png") == 1
    assert run(tmp_path / "typo*.png") == 1
    assert results_in(out) == before
    assert names_in(out) == ["a.png", "detections.json"]


def test_a_url(tmp_path, run, out, monkeypatch, caplog):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    png = io.BytesIO()
    Image.fromarray(make_image()).save(png, "png")
    with serve() as server:
        url = server.add("/folder/image.png?size=3", Answer(png.getvalue()))
        assert run(url, f"{url}none") == 1
    assert names_in(out) == ["detections.json", "image.png"]
    assert {r["file_name"] for r in results_in(out)} == {url}
    assert "404" in caplog.text


@pytest.fixture
def interruptible():
    """A process that a shell starts in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_leaves_complete_files(tmp_path, run, out, model, repeat, capsys):
    """A second one in the same image ends the command at once, without files that look complete."""
    detect = model.detect

    def interrupted(*arguments, **options):
        if len(model.seen) == 2:
            for _ in range(1 + repeat):
                signal.raise_signal(signal.SIGINT)
        return detect(*arguments, **options)

    model.detect = interrupted
    video = save_video(tmp_path / "v.mp4", 20)
    handler = signal.getsignal(signal.SIGINT)
    assert run(video) == 130
    if repeat:
        assert names_in(out) == []
    else:
        assert {r["frame"] for r in results_in(out)} == set(range(12))  # three batches
        with VideoReader(out / "v.mp4") as reader:
            assert len(list(reader)) == 12
    assert signal.getsignal(signal.SIGINT) is handler


def test_images_with_equal_names_are_drawn_to_different_files(tmp_path, run, out):
    for name in ("x/a.png", "y/a.png", "y/a.bmp"):
        save(tmp_path / "in" / name)
    assert run(tmp_path / "in" / "**" / "*") == 0
    assert names_in(out) == ["a.png", "a_2.png", "a_3.png", "detections.json"]


@pytest.mark.parametrize("name, kind", [("a.png", "image"), ("labels/a.png", "labels")])
def test_inputs_are_not_overwritten(tmp_path, run, capsys, name, kind):
    path = save(tmp_path / name)
    before = path.read_bytes()
    assert run(path, "--output", tmp_path, "--save", "json") == 0
    assert run(path, "--output", tmp_path, "--save", kind) == 2
    assert path.read_bytes() == before
    assert "--output" in capsys.readouterr().err


def test_mistakes_are_short(tmp_path, run, capsys):
    path = save(tmp_path / "a.png")
    assert run(path, "MODEL.DEVISE", "cpu") == 2
    assert capsys.readouterr().err.startswith("error: ")
    for words in ([], [str(path), "--weights", "w.pth", "--save", "jpg"]):
        with pytest.raises(SystemExit, match="2"):
            predict.main(words)
        assert "example: " in capsys.readouterr().err


def test_find_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.JPG", "v.MP4", "notes.txt", "sub/c.png", "[1].png", "3"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()

    def found(*words):
        return [str(source.location) for source in find_inputs(words).inputs]

    assert found(".") == ["[1].png", "a.JPG", "b.png", "v.MP4"]
    assert found("b.png", "*.png", "b.png") == ["b.png", "[1].png"]
    assert found("**/*.png") == ["[1].png", "b.png", "sub/c.png"]
    assert found("[1].png") == ["[1].png"]
    assert found("none.png", "notes.txt") == ["none.png", "notes.txt"]
    assert found("*.txt") == []
    sources = find_inputs(
        ["3", "0", "v.MP4", "rtsp://h/x", "http://h/a/v.mp4?q", "http://h"]
    ).inputs
    assert [source.is_video for source in sources] == [False, True, True, True, True, False]
    assert [source.stem for source in sources] == ["3", "camera_0", "v", "x", "v", "h"]
    val = find_inputs(["nuclei_val"]).inputs
    assert len(val) == 40
    assert all(source.location.is_file() and not source.is_video for source in val)
    assert found("nuclei_other") == ["nuclei_other"]


@pytest.mark.parametrize("num_frames", [0, 3])
def test_a_camera_is_stopped_by_an_interrupt(run, out, model, monkeypatch, num_frames):
    """Without frames it is an error."""

    class Camera:
        left = num_frames

        def __init__(self, number):
            assert number == 1

        isOpened = staticmethod(lambda: True)
        get = staticmethod(lambda key: 0.0)
        release = staticmethod(lambda: None)

        def read(self):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)
            return self.left >= 0, make_image()[..., ::-1]

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    assert run(1) == (0 if num_frames else 1)
    assert all(len(batch) == 1 for batch in model.seen)  # no frame waits for others
    monkeypatch.undo()
    assert names_in(out) == (["camera_1.mp4", "detections.json"] if num_frames else [])


def test_the_commands_of_the_page():
    page = (Path(__file__).parents[2] / "docs" / "predict.md").read_text(encoding="utf-8")
    lines = [
        shlex.split(line) for line in page.splitlines() if line.startswith("tensormask predict")
    ]
    assert len(lines) > 3
    for words in lines:
        args = predict.parse_arguments(words[2:])
        get_cfg().merge_from_list(args.opts)
        assert args.inputs
