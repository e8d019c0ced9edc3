"""`Predictor`: which model, every kind of input, the options of a call, and its results."""

import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bright import CHANNELS, BrightModel, bright_cfg, checkpoint, make_image, same
from loopback import Answer, serve
from PIL import Image
from torch import nn

from tensormask import input_image
from tensormask import predictor as predictor_module
from tensormask.predictor import Predictor


@pytest.fixture
def cfg():
    return bright_cfg()


@pytest.fixture
def model(monkeypatch):
    """The model that `build_model` returns for every config."""
    model = BrightModel()
    monkeypatch.setattr(predictor_module, "build_model", lambda cfg: model)
    return model


@pytest.fixture
def predictor(tmp_path, cfg, model):
    return Predictor(cfg, checkpoint(tmp_path, class_names=list(CHANNELS)))


# ---- which model ----


def test_a_checkpoint_alone(tmp_path, cfg, monkeypatch):
    """Its config, names and threshold are taken, its device and compilation are not."""
    cfg.MODEL.DEVICE, cfg.MODEL.COMPILE, cfg.INPUT.MIN_SIZE_TEST = "cuda:7", "default", 0
    described = {"class_names": list(CHANNELS), "category_ids": [7, 8, 9], "score_threshold": 0.25}
    path = checkpoint(tmp_path, config=cfg.dump(), **described)
    built = []
    monkeypatch.setattr(
        predictor_module, "build_model", lambda cfg: built.append(cfg) or BrightModel()
    )
    for source in (path, str(path), path.as_uri()):
        predictor = Predictor(source, overrides=["TEST.DETECTIONS_PER_IMAGE", 7])
        assert (predictor.class_names, predictor.category_ids) == (list(CHANNELS), [7, 8, 9])
        assert predictor.score_threshold == 0.25
    assert Predictor(path, device="cpu").model.bias == 1
    assert [(c.MODEL.DEVICE, c.MODEL.COMPILE, c.INPUT.MIN_SIZE_TEST) for c in built[2:]] == [
        ("auto", "", 0), ("cpu", "", 0)
    ]  # fmt: skip
    assert built[0].TEST.DETECTIONS_PER_IMAGE == 7


def test_a_name_of_the_zoo(tmp_path, monkeypatch, model):
    """The released weights of a name, or given ones."""
    seen = []

    def resolve(weights):
        seen.append(str(weights))
        return checkpoint(tmp_path)

    monkeypatch.setattr("tensormask.checkpoint.trained.resolve", resolve)
    Predictor("tensormask_R_50_FPN_6x", device="cpu")
    Predictor("tensormask_R_101_FPN_6x", "w.pth")
    assert seen == ["tensormask_R_50_FPN_6x", "w.pth"]


def test_other_models_are_refused(tmp_path, cfg, model, monkeypatch):
    """Each message says what to give."""
    (tmp_path / "c.yaml").write_text(cfg.dump())
    (tmp_path / "c.txt").write_text(cfg.dump())
    (tmp_path / "old.pth").write_bytes(checkpoint(tmp_path, config="SOLVER: {OLD: 1}").read_bytes())
    foreign = checkpoint(tmp_path, "model_final_e8df31.pkl")
    complete = checkpoint(tmp_path, config=cfg.dump())
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (("c.yaml",), r"c\.yaml has no trained weights"),
        (("c.txt",), r"c\.txt has no trained weights"),
        (("quickstart",), "quickstart has no trained weights"),
        (("tensormask_R_101_FPN_6x",), "has no trained weights"),
        (("ablations/bipyramid",), "backbone to train from"),
        (("MSRA_R_50",), "backbone"),
        (("quickstrat",), "nearest name is 'quickstart'"),
        (("none.yaml",), "none.yaml"),
        ((foreign,), "contains no config.* such as tensormask_R_50_FPN_6x"),
        (("old.pth",), r"the config in .*old\.pth: SOLVER\.OLD is not a config key"),
        ((complete, "c.yaml"), "is given alone.*c.yaml"),
        ((".",), r"folder.*model_final\.pth"),
    ):
        with pytest.raises(ValueError, match=message):
            Predictor(*arguments)
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        Predictor("none.pth")


def test_the_config_is_not_changed(tmp_path, cfg, model):
    cfg.MODEL.WEIGHTS = str(checkpoint(tmp_path))
    cfg.freeze()
    before = cfg.dump()
    Predictor(cfg, device="cpu", overrides=["TEST.DETECTIONS_PER_IMAGE", 7])
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


def test_weights_must_match(tmp_path, cfg, model):
    model.other = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="1 parameters are missing"):
        Predictor(cfg, checkpoint(tmp_path))
    del model.other
    path = tmp_path / "nan.pth"
    torch.save({"model": {"bias": torch.tensor([math.nan])}}, path)
    with pytest.raises(ValueError, match=r"Not finite in .*nan\.pth: bias"):
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


# ---- images in ----


def test_detections_are_in_pixels_of_the_image(predictor, model):
    rgb = make_image()
    found = predictor(rgb)
    # A shorter side of 64 would make the longer one 128, above its maximum of 90: 45 x 90.
    assert model.seen == [[(3, 45, 90)]]
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
    assert model.seen == [[(3, 48, 96)]]
    assert found["boxes"].tolist() == [[12, 6, 36, 18], [48, 24, 84, 42]]
    assert np.array_equal(found["masks"].numpy(), make_image().transpose(2, 0, 1)[:2] > 0)


def test_every_kind_of_input_gives_the_same(tmp_path, predictor, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    path = tmp_path / "an image é.png"
    rgb = make_image()
    Image.fromarray(rgb).save(path)
    tensor = torch.from_numpy(rgb).permute(2, 0, 1)
    expected = predictor(rgb)
    with serve() as server:
        url = server.add("/image?id=3", Answer(path.read_bytes()))
        for image in (
            path, str(path), path.as_uri(), url, Image.open(path), tensor, tensor / 255, rgb / 255
        ):  # fmt: skip
            assert same(predictor(image), expected), image
    assert same(predictor(rgb[..., ::-1], channel_order="BGR"), expected)
    assert not same(predictor(rgb[..., ::-1]), expected)


def test_a_url_without_an_image(predictor, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(input_image, "MAX_DOWNLOADED_BYTES", 100)
    with serve() as server:
        url = server.add("/a.png", Answer(b"no image"))
        with pytest.raises(ValueError, match=rf"^{url} is not an image"):
            predictor(url)
        with pytest.raises(OSError, match="larger than"):
            predictor(server.add("/large.png", Answer(bytes(101))))
        with pytest.raises(OSError, match="404"):
            predictor(f"{url}.none")
    with pytest.raises(ValueError, match="http, https or file"):
        predictor("detectron2://a.pkl")


def test_an_image_without_objects(predictor):
    found = predictor(np.zeros((30, 20, 3), np.uint8))
    assert (found["class_names"], found.num_detections) == ([], 0)
    assert found["masks"].shape == (0, 30, 20)


def test_a_list_goes_through_the_model_in_groups_of_equal_padded_size(predictor, model):
    images = [make_image(48, width) for width in (96, 97, 50, 96, 48)]
    images[1][:] = 0
    single = [predictor(image) for image in images]
    model.seen.clear()
    found = predictor(images, batch_size=4)
    # 45 x 90 and 45 x 90 are padded to 64 x 96; 64 x 67 to 64 x 96 too, and 64 x 64 follows alone.
    assert [len(batch) for batch in model.seen] == [4, 1]
    assert isinstance(found, list)
    assert all(map(same, found, single))
    assert [len(predictor(tuple(images[:n]))) for n in (0, 1, 2)] == [0, 1, 2]
    model.seen.clear()
    predictor([make_image(48, 96), make_image(96, 48), make_image(48, 96)])
    assert [len(batch) for batch in model.seen] == [2, 1]


def test_an_iterator_is_read_when_it_is_needed(predictor):
    read = []

    def images():
        for number in range(5):
            read.append(number)
            yield make_image() if number != 3 else None

    results = predictor(images(), batch_size=2)
    assert read == []
    assert (next(results).num_detections, read) == (2, [0, 1])
    next(results)
    assert read == [0, 1]
    with pytest.raises(ValueError, match=r"image 3 .*None.*cv2\.imread"):
        list(results)


def test_inputs_that_are_no_images(tmp_path, predictor):
    with pytest.raises(ValueError, match=r"none\.png does not exist"):
        predictor([tmp_path / "none.png"])
    with pytest.raises(ValueError, match=r"is a folder.*glob\('\*\.jpg'\)"):
        predictor(tmp_path)
    with (tmp_path / "model.pth").open("rb") as file:
        with pytest.raises(ValueError, match=r"PIL\.Image\.open\(file\)"):
            predictor(file)


# ---- options ----


def test_options_of_the_predictor_and_of_a_call(tmp_path, cfg, model):
    path = checkpoint(tmp_path, class_names=list(CHANNELS))
    Predictor(cfg, path)(make_image())
    predictor = Predictor(cfg, path, threshold=0.3, classes="blue", class_agnostic_nms=True)
    predictor(make_image())
    predictor(make_image(), threshold=0.0, classes=[1, "red"], max_detections=5)
    assert model.options == [
        {},
        {"score_threshold": 0.3, "classes": [2], "class_agnostic_nms": True},
        {
            "score_threshold": 0.0, "classes": [1, 0], "class_agnostic_nms": True,
            "num_detections": 5,
        },
    ]  # fmt: skip


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threshold": 30}, r"30 % is 0\.3"),
        ({"threshold": 1.0}, "below 1"),
        ({"threshold": float("nan")}, "threshold"),
        ({"max_detections": 0}, "max_detections"),
        ({"batch_size": 0}, "batch_size"),
        ({"classes": ["grene"]}, "nearest name is 'green'"),
        ({"classes": [3]}, r"0\.\.2"),
        ({"classes": []}, "empty"),
        ({"channel_order": "GBR"}, "channel_order"),
    ],
)
def test_invalid_options_are_refused_before_an_image_is_read(predictor, options, message):
    with pytest.raises(ValueError, match=message):
        predictor(make_image(), **options)
    if "channel_order" not in options:
        with pytest.raises(ValueError, match=message):
            predictor(iter([]), **options)


def test_the_snippets_of_the_page(tmp_path, cfg, model, monkeypatch, capsys):
    """In their order, with a model that detects red, called star, and green, called disc."""
    monkeypatch.chdir(tmp_path)
    names = {"class_names": ["star", "disc", "ring"], "config": cfg.dump()}
    (tmp_path / "output" / "quickstart").mkdir(parents=True)
    checkpoint(tmp_path / "output" / "quickstart", "model_final.pth", **names)
    (tmp_path / "images").mkdir()
    for path in ("image.jpg", "a.jpg", "b.jpg", "images/c.jpg", "slide.tif"):
        Image.fromarray(make_image()).save(path, quality=95)
    monkeypatch.setattr(
        input_image, "download", lambda url, path, **options: shutil.copy("image.jpg", path)
    )
    page = (Path(__file__).parents[1] / "docs" / "predict.md").read_text(encoding="utf-8")
    variables: dict = {}
    for snippet in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(snippet, variables)
    assert capsys.readouterr().out.splitlines() == [
        "2 detections: 1 star, 1 disc; scores 0.65..0.90; 48 x 96", "2"
    ]  # fmt: skip
    assert len(variables["several"]) == 2
    assert variables["stars"]["class_names"] == ["star"]
    assert len(variables["polygons"]) == 2
    assert type(variables["plain"]) is dict
    assert model.options[-3:] == [{"class_agnostic_nms": True}, {}, {}]
    assert {"drawing.png", "detections.json"} <= {path.name for path in tmp_path.iterdir()}
