"""Kinds of heads as ONNX files, and the packaged model on real images.

`test_graph` has all heads, before the export, which takes half a minute each.
"""

import pytest
import tiny

from tensormask.commands import export
from tensormask.export import files
from tensormask.export.check import compare
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
CASES = {  # with boxes and bipyramid: v2, and the packaged model
    "natural": ("natural", [], (96, 128)),
    "no boxes": ("bipyramid", NO_BOXES, (96, 128)),
    "upscale_aligned": ("upscale_aligned", [], (100, 70)),
    "v2": ("finer_bipyramid", V2, (100, 70)),
}
DESCRIBED = (
    *("class_names", "category_ids", "score_threshold"),
    *("min_size", "max_size", "padding_color"),
)
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", CASES)
def test_an_onnx_file_detects_what_the_model_detects(name, tmp_path):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    head, opts, size = CASES[name]
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
    assert not differences.too_large, differences
    assert differences.num_detections >= 10


@pytest.mark.skipif(not MODELS[PACKAGED].path.is_file(), reason="the packaged model is missing")
def test_the_command_with_the_packaged_model(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    monkeypatch.setattr(export, "compare", lambda *given: found.append(compare(*given)) or found[0])
    assert export.main(["--size", "384", "384", "--output", "a.onnx"]) == 0
    assert found[0].num_detections > 100
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]
    assert "a.onnx (" in capsys.readouterr().out
