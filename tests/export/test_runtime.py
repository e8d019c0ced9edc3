"""An ONNX file, and its use without PyTorch. One small model is exported for all slow tests."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from tensormask.data.augmentation import Augmentation
from tensormask.export import files
from tensormask.export.check import compare
from tensormask.export.graph import DetectionGraph
from tensormask.export.runtime import OnnxPredictor, letterbox, paste_masks, resize
from tensormask.layers import paste_masks as paste
from tensormask.utils.errors import UserError

SIZE = (64, 96)
SMALL = [
    *("MODEL.TENSOR_MASK.IN_FEATURES", ["p3"], "MODEL.ANCHOR_GENERATOR.SIZES", [[88]]),
    *("MODEL.RESNETS.DEPTH", 10, "TEST.DETECTIONS_PER_IMAGE", 20),
]
DESCRIPTION = {
    "class_names": ["a", "b", "ü"],
    "category_ids": [7, 8, 9],
    "score_threshold": 0.4,
    "input_size": SIZE,
    "min_size": 64,
    "max_size": 96,
    "padding_color": [1, 2, 3],
}
WITHOUT_TORCH = """
import sys
for name in ("torch", "torchvision", "cv2", "PIL", "pycocotools", "scipy"):
    sys.modules[name] = None  # an import raises
import numpy as np
from tensormask.export.runtime import OnnxPredictor
found = OnnxPredictor(sys.argv[1])(np.load(sys.argv[2]))
np.savez(sys.argv[3], **found)
"""


def make_pixels(seed: int, size: tuple[int, int]) -> np.ndarray:
    return tiny.make_image(*size, seed).numpy().transpose(1, 2, 0).copy()


@pytest.fixture(scope="module")
def model():
    return tiny.with_detections(tiny.build("natural", SMALL)).requires_grad_(False)


@pytest.fixture(scope="module")
def program(model):
    return files.trace(DetectionGraph(model, SIZE).eval(), batch=1, dynamic_batch=True)


@pytest.fixture(scope="module")
def onnx_file(program, tmp_path_factory):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    files.write_onnx(program, path, DESCRIPTION)
    return path


@pytest.mark.slow
def test_the_file_detects_what_the_model_detects(model, onnx_file):
    predictor = OnnxPredictor(onnx_file)
    differences = compare(model, predictor.run, [make_pixels(n, SIZE) for n in range(2)])
    assert not differences.too_large, differences
    assert differences.num_detections >= 10
    assert (predictor.class_names, predictor.score_threshold) == (["a", "b", "ü"], 0.4)


@pytest.mark.slow
def test_without_torch(model, onnx_file, tmp_path):
    """An image that is resized to half and padded; detections are those of the model on it."""
    pixels = make_pixels(1, (128, 150))
    np.save(tmp_path / "image.npy", pixels)
    words = [str(onnx_file), str(tmp_path / "image.npy"), str(tmp_path / "found.npz")]
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *words], check=True)
    found = np.load(tmp_path / "found.npz")
    box = letterbox(pixels, SIZE, 64, 96, [1, 2, 3])
    assert box.size == (64, 75)
    (whole,) = model.detect([torch.from_numpy(box.pixels.transpose(2, 0, 1).copy())])
    scale = torch.tensor([2.0, 2.0, 2.0, 2.0])
    boxes = (whole["boxes"] * scale).minimum(torch.tensor([150.0, 128, 150, 128]))
    inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
    np.testing.assert_allclose(found["boxes"], boxes[inside], atol=1e-2)
    np.testing.assert_allclose(found["scores"], whole["scores"][inside], atol=1e-5)
    names = [DESCRIPTION["class_names"][n] for n in whole["labels"][inside]]
    assert found["class_names"].tolist() == names
    masks = paste(whole["window_masks"], whole["windows"] * scale, (128, 150))[inside].numpy()
    assert (found["masks"] != masks).sum() <= 5


@pytest.mark.slow
def test_lists_and_thresholds(onnx_file):
    predictor = OnnxPredictor(onnx_file)
    images = [make_pixels(n, size) for n, size in enumerate([(64, 96), (50, 30)])]
    found = predictor(images)
    for image, together in zip(images, found, strict=True):
        np.testing.assert_allclose(predictor(image)["scores"], together["scores"], atol=1e-5)
        assert together["masks"].shape == (len(together["boxes"]), *image.shape[:2])
    threshold = float(np.median(found[0]["scores"]))
    above = predictor(images[0], threshold=threshold)["scores"]
    assert len(above) == (found[0]["scores"] > threshold).sum() > 0
    for image in (images[0].astype(float), images[0][..., 0], "image.jpg"):
        with pytest.raises(UserError, match="an image must be"):
            predictor([image])


def test_another_onnx_file(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value], [onnx.ValueInfoProto(name="y")])
    path = tmp_path / "other.onnx"
    onnx.save(onnx.helper.make_model(graph, ir_version=10), path)
    with pytest.raises(UserError, match="is not a file of tensormask export"):
        OnnxPredictor(path)


@pytest.mark.parametrize(
    "size", [(20, 30), (7, 5), (64, 48), (33, 90), (1, 1), (65, 7), (200, 300)]
)
def test_resized_pixels_are_pillows(size):
    pixels = make_pixels(0, (65, 90))
    expected = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR)
    assert (resize(pixels, size) == np.asarray(expected)).all()


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (100, 1000), (799, 1334), (5, 3)])
def test_an_image_that_fits_has_the_size_of_evaluation(size):
    transform = Augmentation(min_sizes=(800,), max_size=1333)
    expected = transform.draw(size, np.random.default_rng(0)).new_size
    pixels = np.full((*size, 3), 9, np.uint8)
    assert letterbox(pixels, (1344, 1344), 800, 1333, [0, 0, 0]).size == expected


def test_letterbox():
    """5 x 8 pixels do not fit into 4 x 6: they become 4 x 6, then 3 x 4 of a smaller limit."""
    pixels = np.full((5, 8, 3), 9, np.uint8)
    box = letterbox(pixels, (4, 6), 0, 0, [1, 2, 3])
    assert (box.size, box.old_size) == ((4, 6), (5, 8))
    box = letterbox(pixels, (4, 6), 3, 4, [1, 2, 3])
    assert box.size == (3, 4)
    assert (box.pixels[:3, :4] == 9).all()
    assert (box.pixels[3:] == [1, 2, 3]).all()
    assert (box.pixels[:, 4:] == [1, 2, 3]).all()


def test_pasted_masks_are_those_of_pytorch():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(20, 5, 7, generator=generator)
    masks[0] = 0
    corner = torch.rand(20, 2, generator=generator) * 60 - 20
    boxes = torch.cat([corner, corner + 1 + torch.rand(20, 2, generator=generator) * 50], dim=1)
    expected = paste(masks, boxes, (40, 50)).numpy()
    assert expected.any()
    assert (paste_masks(masks.numpy(), boxes.numpy(), (40, 50)) == expected).all()


@pytest.mark.slow
def test_a_program_of_torch(model, program, tmp_path):
    path = tmp_path / "model.pt2"
    files.write_torch(program, path, DESCRIPTION)
    stored = {files.DESCRIPTION_FILE: ""}
    loaded = torch.export.load(path, extra_files=stored)
    assert json.loads(stored[files.DESCRIPTION_FILE])["class_names"] == ["a", "b", "ü"]
    image = torch.from_numpy(make_pixels(0, SIZE).transpose(2, 0, 1).copy())[None]
    outputs = loaded.module()(image)
    assert outputs["num_detections"].item() == len(model.detect(list(image))[0]["scores"])
