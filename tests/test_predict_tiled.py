"""`Predictor.predict_tiled`, `Detections` with cropped masks, and `tensormask predict --tile`."""

import json
import logging

import cv2
import numpy as np
import pytest
import torch
from bright import CHANNELS, BrightModel, bright_cfg, checkpoint, make_image
from PIL import Image
from pycocotools import mask as rle_tools

from tensormask import cli
from tensormask import predictor as predictor_module
from tensormask.commands import predict
from tensormask.predictor import Predictor
from tensormask.utils.errors import UserError

# A red rectangle and a green one over the seams of tiles of 64 pixels that overlap by 16.
IMAGE = np.zeros((90, 130, 3), np.uint8)
IMAGE[10:30, 8:120, 0] = 255
IMAGE[40:88, 50:70, 1] = 255


@pytest.fixture
def model(monkeypatch):
    model = BrightModel()
    monkeypatch.setattr(predictor_module, "build_model", lambda cfg: model)
    return model


@pytest.fixture
def predictor(tmp_path, model):
    cfg = bright_cfg()
    cfg.INPUT.MIN_SIZE_TEST = 0
    return Predictor(cfg, checkpoint(tmp_path, class_names=list(CHANNELS)))


def tiled(predictor, image=IMAGE, **options):
    return predictor.predict_tiled(image, tile=64, overlap=16, **options)


def test_whole_objects_over_seams(predictor, model):
    seen = []
    detections = tiled(predictor, batch_size=4, on_tiles=lambda *done: seen.append(done))
    assert [shape for batch in model.seen for shape in batch] == [(3, 64, 64)] * 6
    assert seen == [(4, 6), (6, 6)]
    plain = predictor(IMAGE)
    for name in ("boxes", "scores", "labels"):
        assert torch.equal(detections[name], plain[name])
    assert detections["class_names"] == ["red", "green"]
    assert detections["windows"].tolist() == [[8, 10, 120, 30], [50, 40, 70, 88]]
    assert [tuple(mask.shape) for mask in detections["window_masks"]] == [(20, 112), (48, 20)]
    assert detections.to_coco(3) == plain.to_coco(3)
    np.testing.assert_array_equal(detections.label_image(), plain.label_image())
    for a, b in zip(detections.polygons(), plain.polygons(), strict=True):
        np.testing.assert_array_equal(a, b)
    only = detections.filter(classes=["green"])
    assert only.to_coco() == plain.filter(classes=["green"]).to_coco()
    assert repr(only) == repr(plain.filter(classes=["green"]))
    with pytest.raises(UserError, match="polygons"):
        detections.to_supervision()


def test_freed_memory_is_returned_now_and_then(predictor, monkeypatch):
    returned, done = [], []
    monkeypatch.setattr(predictor_module, "return_freed_memory", lambda: returned.append(done[-1:]))
    image = np.zeros((300, 300, 3), np.uint8)
    tiled(predictor, image, on_tiles=lambda number, _: done.append(number))
    assert returned == [[], [8], [16], [24], [32]]
    assert len(done) == 36


@pytest.mark.parametrize("image", [make_image(), IMAGE[:64, :64]])
def test_an_image_not_larger_than_a_tile_is_detected_as_ever(predictor, image):
    detections, plain = tiled(predictor, image), predictor(image)
    assert detections.to_coco() == plain.to_coco()
    assert torch.equal(detections["boxes"], plain["boxes"])


def test_options_and_errors(predictor, model, caplog):
    tiled(predictor, threshold=0.7, classes=["red"], max_detections=1)
    assert model.options[0] == {"score_threshold": 0.7, "classes": [0], "num_detections": 1}
    assert "6 of 6 tiles have the maximum of 1 detections" in caplog.text
    for options in ({"overlap": 1024}, {"tile": 0}, {"batch_size": 0}):
        with pytest.raises(UserError):
            predictor.predict_tiled(IMAGE, **options)


def test_a_model_without_masks(predictor, model, monkeypatch):
    detect = model.detect

    def boxes_only(*args, **options):
        return [
            {name: found[name] for name in ("boxes", "scores", "labels")}
            for found in detect(*args, **options)
        ]

    monkeypatch.setattr(model, "detect", boxes_only)
    detections = tiled(predictor)
    assert torch.equal(detections["boxes"], predictor(IMAGE)["boxes"])
    assert "segmentation" not in detections.to_coco()[0]
    assert (detections.draw() != IMAGE).any()


def test_drawings_have_a_limited_size(predictor, monkeypatch):
    detections = tiled(predictor)
    assert detections.draw().shape == IMAGE.shape
    monkeypatch.setattr("tensormask.detections.LARGE_DRAWN_SIDE", 50)
    small = detections.draw(color_by="class")
    assert small.shape == (30, 44, 3)
    background = cv2.resize(IMAGE[:, :129], (43, 30), interpolation=cv2.INTER_AREA)
    changed = (small[:, :43] != background).any(2)
    assert changed[5:8, 5:38].all()
    assert not changed[:3].any()
    np.testing.assert_array_equal(detections.draw(IMAGE), detections.draw())


@pytest.fixture
def run(tmp_path, model, monkeypatch):
    """Run the command with a checkpoint, into `out`; return its exit code."""
    monkeypatch.setattr(predict.logging, "basicConfig", lambda **options: None)
    weights = checkpoint(tmp_path, config=bright_cfg().dump(), class_names=list(CHANNELS))
    options = ["--weights", str(weights), "--output", str(tmp_path / "out")]
    return lambda *words: cli.main(["predict", *options, *map(str, words)])


def test_the_command(tmp_path, run, model, caplog):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(IMAGE).save(folder / "a.tif")
    Image.fromarray(make_image()).save(folder / "small.png")
    (folder / "broken.tif").write_text("no image")
    words = ["--tile", 100, "--overlap", 20, "--save", "image,json,labels"]
    assert run(folder, *words) == 1
    assert "broken.tif" in caplog.text
    assert "90 x 130 pixels in tiles of 90 x 100, for the model resized to 64 x 71" in caplog.text
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [(r["image_id"], r["category_name"]) for r in results] == [
        (0, "red"), (0, "green"), (2, "red"), (2, "green")
    ]  # fmt: skip
    red = rle_tools.decode(results[0]["segmentation"]).astype(bool)
    truth = IMAGE[..., 0] > 0
    assert (red & truth).sum() > 0.9 * (red | truth).sum()
    with Image.open(tmp_path / "out" / "a.png") as drawing:
        assert drawing.size == (130, 90)
    with Image.open(tmp_path / "out" / "labels" / "a.png") as labels:
        assert np.asarray(labels)[20, 60] == 1
    for words in (["--overlap", 3], ["--tile", 100]):  # 100 is below the default overlap
        with pytest.raises(SystemExit, match="2"):
            run(folder / "small.png", *words)


def test_ctrl_c_between_tiles_leaves_the_image_out(tmp_path, run, model, monkeypatch):
    Image.fromarray(make_image()).save(tmp_path / "1.png")
    Image.fromarray(IMAGE).save(tmp_path / "2.png")
    detect = model.detect

    def interrupted(images, *args, **options):
        if len(model.seen) == 1:  # the first tile of the second image
            predict.signal.raise_signal(predict.signal.SIGINT)
        return detect(images, *args, **options)

    monkeypatch.setattr(model, "detect", interrupted)
    words = [tmp_path / "1.png", tmp_path / "2.png", "--tile", 100, "--overlap", 20]
    words += ["INPUT.MIN_SIZE_TEST", 0]  # tiles go one by one
    assert run(*words) == 130
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {r["image_id"] for r in results} == {0}
    assert not (tmp_path / "out" / "2.png").exists()
