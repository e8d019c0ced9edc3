"""The command export, with the writing of files replaced; tests/export writes them."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from tensormask import cli
from tensormask.commands import export
from tensormask.data.augmentation import Augmentation
from tensormask.utils.errors import UserError


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    """A tiny model, whose file is empty and whose graph runs as it is; `change` its outputs."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(tiny.make_image(70, 130).numpy().transpose(1, 2, 0)).save("image.png")
    state = SimpleNamespace(change=lambda outputs: None, graph=None, traced=None, batches=[])
    state.predictor = SimpleNamespace(
        model=tiny.with_detections(tiny.build("natural", ["TEST.DETECTIONS_PER_IMAGE", 20])),
        transform=Augmentation(min_sizes=(64,), max_size=100),
        class_names=["a", "b", "c"],
        category_ids=[1, 2, 3],
        score_threshold=None,
    )
    monkeypatch.setattr(export, "build_predictor", lambda args: state.predictor)
    monkeypatch.setattr(export, "require", lambda *names, **extra: None)

    def trace(graph, **options):
        state.graph, state.traced = graph, options

    def write(program, path, description):
        path.write_bytes(b"graph")
        state.description = description

    def run(pixels: np.ndarray) -> dict[str, np.ndarray]:
        state.batches.append(len(pixels))
        with torch.no_grad():
            outputs = state.graph(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
        outputs = {name: x.numpy() for name, x in outputs.items()}
        state.change(outputs)
        return outputs

    monkeypatch.setattr(export, "trace", trace)
    monkeypatch.setattr(export, "write_onnx", write)
    monkeypatch.setattr(export, "write_torch", write)
    monkeypatch.setattr(export, "load", lambda path, kind: run)
    return state


def test_a_file_that_equals_the_model(fakes, tmp_path, capsys):
    words = ["export", "--images", "image.png", "--output", "new/a.onnx"]
    assert cli.main([*words, "--batch", "2"]) == 0
    printed = capsys.readouterr().out
    assert "images of 64 x 128, up to 20 detections with masks of 15 x 15\n" in printed
    assert "compared with the model on 1 images: 20 detections: boxes " in printed
    assert (tmp_path / "new" / "a.onnx").read_bytes() == b"graph"
    assert fakes.traced == {"batch": 2, "dynamic_batch": False}
    assert fakes.batches == [2]
    expected = {"input_size": [64, 128], "min_size": 64, "max_size": 100, "pixel_order": "RGB"}
    expected |= {"padding_color": [124, 116, 104], "class_names": ["a", "b", "c"]}
    assert fakes.description.items() >= expected.items()


def test_a_file_that_differs_is_not_kept(fakes, tmp_path, capsys):
    fakes.change = lambda outputs: outputs["boxes"].__iadd__(1)
    (tmp_path / "a.pt2").write_bytes(b"older")
    words = ["export", "--images", "image.png", "--output", "a.pt2", "--size", "64", "64"]
    assert cli.main(words) == export.EXIT_DIFFERENT
    assert "boxes 1 px" in (captured := capsys.readouterr()).out
    assert captured.err == "error: the file differs from the model, and is not kept\n"
    assert (tmp_path / "a.pt2").read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt2", "image.png"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--output", "a.engine"], "give a name with .onnx or .pt2, or --format"),
        (["--output", "a.onnx", "--batch", "0"], "--batch must be 1 or more, got 0"),
        (["--output", "a.onnx", "--size", "0", "5"], "two positive numbers of pixels"),
        (["--output", "a.onnx", "--images", "."], "there are no images in ."),
    ],
)
def test_mistakes(fakes, tmp_path, capsys, words, message):
    (tmp_path / "image.png").unlink()
    assert cli.main(["export", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_sizes_of_the_images_are_kept(fakes, capsys):
    fakes.predictor.transform = Augmentation(min_sizes=(0,), max_size=100)
    assert cli.main(["export", "--output", "a.onnx"]) == 2
    assert "give --size H W" in capsys.readouterr().err


def test_without_the_extra(monkeypatch, capsys):
    def missing(name, *, extra):
        raise UserError(f"{name} {extra}")

    monkeypatch.setattr(export, "require", missing)
    assert cli.main(["export", "--output", "a.onnx"]) == 2
    assert capsys.readouterr().err == "error: onnx export\n"
