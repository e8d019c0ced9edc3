"""`Predictor`: from an image to detections at its size; the demo's files."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_tools
from torch import nn

from tensormask import predictor as predictor_module
from tensormask.commands import predict
from tensormask.config import get_cfg
from tensormask.predictor import Predictor

CHANNELS = ("red", "green", "blue")


class BrightModel(nn.Module):
    """Detect the bright pixels of each channel as one object, scaled to the output size."""

    windows = SimpleNamespace(mask_sizes=())  # as `load_weights` needs

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, images, output_sizes):
        assert not self.training
        (image,), ((height, width),) = images, output_sizes
        self.seen.append(tuple(image.shape))
        boxes, masks, labels = [], [], []
        scale = torch.tensor([width / image.shape[2], height / image.shape[1]] * 2)
        for label, channel in enumerate(image):
            bright = channel > 128
            if bright.any():
                rows, columns = bright.any(1).nonzero(), bright.any(0).nonzero()
                corners = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                boxes.append(torch.tensor([float(c) for c in corners]) * scale)
                sized = nn.functional.interpolate(bright[None, None].float(), (height, width))
                masks.append(sized[0, 0] > 0)
                labels.append(label)
        found = {
            "boxes": torch.stack(boxes) if boxes else torch.zeros(0, 4),
            "scores": torch.linspace(0.9, 0.4, 3)[: len(labels)],
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": torch.stack(masks) if masks else torch.zeros(0, height, width).bool(),
        }
        return [found]


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.MODEL.TENSOR_MASK.NUM_CLASSES = 3
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.INPUT.MAX_SIZE_TEST = 90
    return cfg


@pytest.fixture
def model(monkeypatch):
    """The model that `build_model` returns for every config."""
    model = BrightModel()
    monkeypatch.setattr(predictor_module, "build_model", lambda cfg: model)
    return model


def checkpoint(tmp_path, **extra):
    path = tmp_path / "model.pth"
    torch.save({"model": {"bias": torch.ones(1)}, **extra}, path)
    return path


def make_image(height=48, width=96):
    """Return a black image with a red rectangle and a green one below it."""
    rgb = np.zeros((height, width, 3), np.uint8)
    rgb[6:18, 12:36, 0] = 255
    rgb[24:42, 48:84, 1] = 255
    return rgb


def test_detections_are_in_pixels_of_the_image(tmp_path, cfg, model):
    predictor = Predictor(cfg, checkpoint(tmp_path, class_names=list(CHANNELS)))
    rgb = make_image()
    found = predictor(rgb)
    # A shorter side of 64 would make the longer one 128, above its maximum of 90: 45 x 90.
    assert model.seen == [(3, 45, 90)]
    expected = torch.tensor([[12.0, 6, 36, 18], [48, 24, 84, 42]])
    assert torch.allclose(found["boxes"], expected, atol=2)
    assert found["masks"].shape == (2, 48, 96)
    for channel, mask in enumerate(found["masks"].numpy()):
        truth = rgb[..., channel] > 0
        assert (mask & truth).sum() / (mask | truth).sum() > 0.75
    assert found["labels"].tolist() == [0, 1]
    assert found["class_names"] == ["red", "green"]
    assert (model.bias == 1).all()


def test_without_resizing_pixels_are_not_changed(tmp_path, cfg, model):
    cfg.INPUT.MIN_SIZE_TEST = 0
    found = Predictor(cfg, checkpoint(tmp_path))(make_image())
    assert model.seen == [(3, 48, 96)]
    assert found["boxes"].tolist() == [[12, 6, 36, 18], [48, 24, 84, 42]]
    assert np.array_equal(found["masks"].numpy(), make_image().transpose(2, 0, 1)[:2] > 0)


def test_paths_arrays_and_pil_images_give_the_same(tmp_path, cfg, model):
    predictor = Predictor(cfg, checkpoint(tmp_path))
    path = tmp_path / "an image é.png"
    Image.fromarray(make_image()).save(path)
    array = predictor(make_image())
    images = (path, str(path), Image.open(path), Image.open(path).convert("RGBA"))
    for other in map(predictor, images):
        assert torch.equal(array["boxes"], other["boxes"])
        assert torch.equal(array["masks"], other["masks"])


def test_an_image_without_objects(tmp_path, cfg, model):
    found = Predictor(cfg, checkpoint(tmp_path))(np.zeros((30, 20, 3), np.uint8))
    assert found["class_names"] == []
    assert found["masks"].shape == (0, 30, 20)


@pytest.mark.parametrize(
    "array",
    [*(np.zeros(s, np.uint8) for s in ((8, 8), (8, 8, 4), (0, 8, 3))), np.zeros((8, 8, 3))],
)
def test_arrays_of_another_dtype_or_shape_are_refused(tmp_path, cfg, model, array):
    with pytest.raises(ValueError, match=r"uint8 RGB \(H, W, 3\)"):
        Predictor(cfg, checkpoint(tmp_path))(array)


def test_the_config_is_not_changed(tmp_path, cfg, model):
    cfg.MODEL.WEIGHTS = str(checkpoint(tmp_path))
    cfg.freeze()
    before = cfg.dump()
    Predictor(cfg, device="cpu")
    assert cfg.dump() == before


def test_a_yaml_file_and_a_device(tmp_path, monkeypatch):
    seen = []

    def build(cfg):
        seen.append((cfg.MODEL.DEVICE, cfg.MODEL.TENSOR_MASK.NUM_CLASSES))
        return BrightModel()

    monkeypatch.setattr(predictor_module, "build_model", build)
    path = tmp_path / "config.yaml"
    weights = checkpoint(tmp_path)
    path.write_text(
        f"MODEL: {{DEVICE: cuda, WEIGHTS: '{weights}', TENSOR_MASK: {{NUM_CLASSES: 3}}}}"
    )
    Predictor(path, device=torch.device("cpu"))
    assert seen == [("cpu", 3)]


def test_weights_are_required_and_must_match(tmp_path, cfg, model):
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS"):
        Predictor(cfg)
    path = checkpoint(tmp_path)
    model.other = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="1 parameters are missing"):
        Predictor(cfg, path)


def test_class_names_of_the_checkpoint_the_data_or_numbers(tmp_path, cfg, model, monkeypatch):
    sets = {
        "two": SimpleNamespace(class_names=["a", "b"], category_ids=[5, 6]),
        "three": SimpleNamespace(class_names=["a", "b", "c"], category_ids=[5, 6, 9]),
    }

    def get_dataset(name):
        if name not in sets:
            raise FileNotFoundError(name)
        return sets[name]

    monkeypatch.setattr(predictor_module, "get_dataset", get_dataset)
    plain = checkpoint(tmp_path)
    predictor = Predictor(cfg, plain)
    assert predictor.class_names == ["class 0", "class 1", "class 2"]
    assert predictor.category_ids == [1, 2, 3]
    cfg.DATASETS.TEST, cfg.DATASETS.TRAIN = ("gone", "two"), ("three",)
    predictor = Predictor(cfg, plain)
    assert predictor.class_names == ["a", "b", "c"]
    assert predictor.category_ids == [5, 6, 9]
    named = checkpoint(tmp_path, class_names=list(CHANNELS), category_ids=[7, 8, 9])
    predictor = Predictor(cfg, named)
    assert predictor.class_names == list(CHANNELS)
    assert predictor.category_ids == [7, 8, 9]
    other = checkpoint(tmp_path, class_names=["one class too few", "b"])
    assert Predictor(cfg, other).class_names == ["a", "b", "c"]


@pytest.fixture
def run_demo(tmp_path, cfg, model, monkeypatch):
    """Run the command with a config file and weights; return its exit code."""
    monkeypatch.setattr(predict.logging, "basicConfig", lambda **options: None)
    config = tmp_path / "config.yaml"
    config.write_text(cfg.dump())
    weights = checkpoint(tmp_path, class_names=list(CHANNELS), category_ids=[7, 8, 9])
    options = ["--config-file", str(config), "--weights", str(weights)]
    return lambda *arguments: predict.main([*options, *map(str, arguments)])


def save(path, rgb=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(make_image() if rgb is None else rgb).save(path)
    return path


def test_demo_draws_and_writes_cocos_format(tmp_path, run_demo, capsys):
    first, second = save(tmp_path / "in" / "a.png"), save(tmp_path / "in" / "b.bmp")
    out = tmp_path / "out"
    # Red scores 0.9 and green 0.65.
    assert run_demo("--input", tmp_path / "in", "--output", out) == 0
    results = json.loads((out / "detections.json").read_text())
    assert [(r["image_id"], r["category_id"]) for r in results] == [(0, 7), (0, 8), (1, 7), (1, 8)]
    assert [r["category_name"] for r in results] == ["red", "green"] * 2
    assert [r["file_name"] for r in results] == [str(first)] * 2 + [str(second)] * 2
    assert rle_tools.decode(results[0]["segmentation"]).shape == (48, 96)
    assert results[0]["bbox"] == pytest.approx([12, 6, 24, 12], abs=2)
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png", "detections.json"]
    with Image.open(out / "a.png") as drawing:
        assert drawing.size == (5 * 96, 5 * 48)
    assert "4 detections in 2 images" in capsys.readouterr().out


def test_demo_threshold_and_overrides(tmp_path, run_demo, model):
    path, out = save(tmp_path / "a.png"), tmp_path / "out"
    arguments = ("--input", path, "--output", out, "--confidence-threshold", "0.8")
    assert run_demo(*arguments, "INPUT.MIN_SIZE_TEST", "24") == 0
    assert [r["category_id"] for r in json.loads((out / "detections.json").read_text())] == [7]
    assert run_demo("--output", out, "--input", path, "--opts", "INPUT.MIN_SIZE_TEST", "0") == 0
    assert model.seen == [(3, 24, 48), (3, 48, 96)]


def test_demo_continues_after_broken_files_and_counts_them(tmp_path, run_demo, capsys, caplog):
    good, out = save(tmp_path / "good.png"), tmp_path / "out"
    broken = tmp_path / "broken.png"
    broken.write_bytes(good.read_bytes()[:-60])
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    missing = tmp_path / "missing*.png"
    with caplog.at_level(logging.ERROR):
        assert run_demo("--input", broken, good, text, missing, "--output", out) == 0
    for path in (broken, text, missing):
        assert str(path) in caplog.text
    assert "3 files could not be read" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["detections.json", "good.png"]
    assert run_demo("--input", text, "--output", tmp_path / "none") == 1
    assert not (tmp_path / "none").exists()


def test_demo_draws_images_with_equal_names_to_different_files(tmp_path, run_demo):
    for name in ("x/a.png", "y/a.png", "y/a.bmp"):
        save(tmp_path / "in" / name)
    out = tmp_path / "out"
    assert run_demo("--input", tmp_path / "in" / "**" / "*", "--output", out) == 0
    assert {path.name for path in out.glob("*.png")} == {"a.png", "a_2.png", "a_3.png"}


def test_demo_does_not_overwrite_its_input(tmp_path, run_demo, capsys):
    path = save(tmp_path / "a.png")
    before = path.read_bytes()
    assert run_demo("--input", path, "--output", tmp_path) == 2
    assert path.read_bytes() == before
    assert "--output" in capsys.readouterr().err


def test_demo_mistakes_are_one_line(tmp_path, run_demo, capsys):
    path = save(tmp_path / "a.png")
    assert run_demo("--input", path, "--output", tmp_path / "out", "MODEL.DEVISE", "cpu") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_find_images(tmp_path):
    names = ("b.png", "a.JPG", "notes.txt", "sub/c.png", "[1].png")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(*inputs):
        images = predict.find_images([str(tmp_path / text) for text in inputs])
        return [str(path.relative_to(tmp_path)) for path in images]

    assert found(".") == ["[1].png", "a.JPG", "b.png"]
    assert found("*.png", "b.png") == ["[1].png", "b.png"]
    assert found("**/*.png") == ["[1].png", "b.png", "sub/c.png"]
    assert found("[1].png") == ["[1].png"]
    assert found("none*") == ["none*"]
