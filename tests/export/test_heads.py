"""Every kind of head as an ONNX file, at two sizes, and the packaged model on real images."""

import pytest
import tiny

from tensormask.commands import export
from tensormask.export import files
from tensormask.export.check import MIN_MASK_IOU, compare
from tensormask.export.graph import DetectionGraph
from tensormask.export.runtime import OnnxPredictor
from tensormask.model_zoo import MODELS, PACKAGED

SMALL = [
    *("MODEL.RESNETS.DEPTH", 10, "TEST.DETECTIONS_PER_IMAGE", 30),
    *("MODEL.TENSOR_MASK.IN_FEATURES", ["p2", "p3"]),
    *("MODEL.TENSOR_MASK.TOPK_CANDIDATES_TEST", 300),
]
NO_BOXES = ["MODEL.TENSOR_MASK.BOX_ON", False, "MODEL.TENSOR_MASK.NMS_ON", "masks"]
V2 = ["MODEL.TENSOR_MASK.NORM", "LN", "MODEL.TENSOR_MASK.MASK_IOU_ON", True]
CASES = {
    "bipyramid": ("bipyramid", []),
    "natural": ("natural", []),
    "no boxes": ("bipyramid", NO_BOXES),
    "upscale_aligned": ("upscale_aligned", []),
    "upscale_natural": ("upscale_natural", []),
    "v2": ("finer_bipyramid", V2),
    "GN": ("finer_bipyramid", ["MODEL.TENSOR_MASK.NORM", "GN"]),
    "BN": ("finer_bipyramid", ["MODEL.TENSOR_MASK.NORM", "BN"]),
}
DESCRIBED = (
    *("class_names", "category_ids", "score_threshold"),
    *("min_size", "max_size", "padding_color"),
)
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("size", [(96, 128), (100, 70)])
@pytest.mark.parametrize("name", CASES)
def test_an_onnx_file_detects_what_the_model_detects(name, size, tmp_path):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    head, opts = CASES[name]
    sides = [[60], [120]] if head.startswith("upscale") else [[44, 60], [88, 120]]
    opts = [*SMALL, "MODEL.ANCHOR_GENERATOR.SIZES", sides, *opts]
    model = tiny.with_detections(tiny.build(head, opts)).requires_grad_(False)
    graph = DetectionGraph(model, size).eval()
    path = tmp_path / "model.onnx"
    program = files.trace(graph, batch=1, dynamic_batch=size[0] == 100)
    files.write_onnx(program, path, {"input_size": size, **dict.fromkeys(DESCRIBED)})
    run = OnnxPredictor(path).run
    images = [tiny.make_image(*size, n).numpy().transpose(1, 2, 0).copy() for n in range(2)]
    differences = compare(model, run, images)
    print(name, size, differences)
    assert not differences.too_large, differences
    assert differences.num_detections >= 10


@pytest.mark.skipif(not MODELS[PACKAGED].path.is_file(), reason="the packaged model is missing")
@pytest.mark.parametrize("size, output", [("480 640", "a.onnx"), ("256 256", "b.pt2")])
def test_the_command_with_the_packaged_model(size, output, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    monkeypatch.setattr(export, "compare", lambda *given: found.append(compare(*given)) or found[0])
    assert export.main(["--size", *size.split(), "--output", output]) == 0
    (differences,) = found
    assert differences.num_detections > 100
    assert differences.mask_iou >= MIN_MASK_IOU
    assert [path.name for path in tmp_path.iterdir()] == [output]
    assert f"{output} (" in capsys.readouterr().out
