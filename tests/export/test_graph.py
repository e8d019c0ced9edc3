"""The graph before it is exported: the same detections as the model's, for all heads."""

import numpy as np
import pytest
import tiny
import torch

from tensormask.export import graph as graph_module
from tensormask.export.check import Differences, compare
from tensormask.export.graph import DetectionGraph, _suppress
from tensormask.layers import op_backend
from tensormask.layers.swap_align2nat_reference import gather_region, swap_align2nat_at

SIZE = (70, 130)
NO_BOXES = ["MODEL.TENSOR_MASK.BOX_ON", False, "MODEL.TENSOR_MASK.NMS_ON", "masks"]
FEW = ["MODEL.TENSOR_MASK.TOPK_CANDIDATES_TEST", 300, "TEST.DETECTIONS_PER_IMAGE", 30]
CASES = {
    **{head: (head, []) for head in tiny.HEADS},
    "no boxes": ("bipyramid", NO_BOXES),
    "no boxes, natural": ("natural", NO_BOXES),
    "NMS on masks": ("finer_bipyramid", ["MODEL.TENSOR_MASK.NMS_ON", "masks"]),
    "no masks": ("bipyramid", ["MODEL.MASK_ON", False]),
    "class-agnostic": ("aligned", ["TEST.CLASS_AGNOSTIC_NMS", True]),
    "v2": (
        "finer_bipyramid",
        [
            *("MODEL.TENSOR_MASK.NORM", "LN", "MODEL.TENSOR_MASK.MASK_IOU_ON", True),
            *("INPUT.FORMAT", "RGB", "MODEL.SIZE_DIVISOR", 64),
        ],
    ),
    "BN": ("bipyramid", ["MODEL.TENSOR_MASK.NORM", "BN"]),
    "GN": ("bipyramid", ["MODEL.TENSOR_MASK.NORM", "GN"]),
}


def run_eagerly(graph):
    def run(pixels: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad(), op_backend("reference"):
            outputs = graph(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
        return {name: x.numpy() for name, x in outputs.items()}

    return run


def make_pixels(seed: int = 0, size=SIZE) -> np.ndarray:
    return tiny.make_image(*size, seed).numpy().transpose(1, 2, 0).copy()


@pytest.mark.parametrize("name", CASES)
def test_it_detects_what_the_model_detects(name):
    head, opts = CASES[name]
    model = tiny.with_detections(tiny.build(head, [*FEW, *opts]))
    graph = DetectionGraph(model, SIZE).eval()
    differences = compare(model, run_eagerly(graph), [make_pixels()])
    assert not differences.too_large, differences
    assert differences.num_detections >= 10
    if head == "bipyramid" and model.mask_head is not None:  # coarse masks are cut at the image
        assert graph.regions.grid == (29, 45)


@pytest.fixture(scope="module")
def built():
    """A model, and the function of its graph."""
    model = tiny.with_detections(tiny.build("bipyramid", FEW))
    return model, run_eagerly(DetectionGraph(model, SIZE).eval())


def test_a_batch_is_its_images(built):
    _, run = built
    images = [make_pixels(seed) for seed in (0, 1)]
    both = run(np.stack(images))
    for n, image in enumerate(images):
        for name, expected in run(image[None]).items():
            np.testing.assert_allclose(both[name][n], expected[0], atol=1e-4, err_msg=name)


def test_rows_without_a_detection(built, monkeypatch):
    model, run = built
    score = float(run(make_pixels()[None])["scores"][0, 7])
    monkeypatch.setattr(model, "score_threshold", score)
    outputs = run(make_pixels()[None])
    assert outputs["num_detections"] == [7]
    assert (outputs["scores"][0, :7] > model.score_threshold).all()
    for name, padding in (("boxes", 0), ("scores", 0), ("labels", -1), ("masks", 0)):
        assert (outputs[name][0, 7:] == padding).all(), name
    monkeypatch.setattr(model, "score_threshold", 0.999)
    outputs = run(make_pixels()[None])
    assert outputs["num_detections"] == [0]
    assert not outputs["masks"].any()


def test_nms_of_groups():
    """Boxes of a group suppress each other, also where others have negative coordinates."""
    box = [-500.0, -500.0, 700.0, 700.0]
    boxes = torch.tensor([box, box, box, [0.0, 0.0, 10.0, 10.0], box])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, -1.0])
    groups = torch.tensor([0, 1, 1, 5, 5])
    kept = _suppress(boxes, scores, groups, 0.5)
    torch.testing.assert_close(kept, torch.tensor([0.9, 0.8, -1.0, 0.6, -1.0]))


def test_regions_are_parts_of_masks():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 7, 6, generator=generator)
    windows = torch.tensor([[0, 0, 0], [1, 3, 2]])
    for lambda_val in (1, 2):
        masks = swap_align2nat_at(x, windows, lambda_val, -6.0)
        corners = torch.tensor([[0, 1], [1, 0]])
        regions = gather_region(x, windows, lambda_val, corners, (2, 1))
        for mask, region, (row, column) in zip(masks, regions, corners.tolist(), strict=True):
            torch.testing.assert_close(region, mask[row : row + 2, column : column + 1])


@pytest.mark.parametrize(
    "change",
    [
        lambda out: out["boxes"].__iadd__(0.2),
        lambda out: out["scores"].__isub__(2e-4),
        lambda out: out["num_detections"].__isub__(1),
        lambda out: out["labels"].__iadd__(1),
        lambda out: out["masks"].__imul__(0.5),
        lambda out: out["mask_boxes"].__iadd__(2),
    ],
)
def test_a_difference_is_seen(change, built):
    model, run = built

    def changed(pixels):
        outputs = run(pixels)
        change(outputs)
        return outputs

    differences: Differences = compare(model, changed, [make_pixels()])
    assert differences.too_large, differences


@pytest.mark.parametrize("head, opts", [("bipyramid", []), ("aligned", NO_BOXES)])
def test_of_equal_scores_any_may_be_kept(head, opts, monkeypatch):
    """NMS with other last digits of the scores has another result, which is accepted."""
    model = tiny.with_detections(tiny.build(head, [*FEW, *opts]))
    model.head.cls_score.weight.data *= 0.01
    noise = 5e-5

    def suppress(boxes, scores, groups, threshold):
        generator = torch.Generator().manual_seed(0)
        noisy = scores + noise * torch.rand(scores.shape, generator=generator)
        kept = _suppress(boxes, torch.where(scores >= 0, noisy, -1.0), groups, threshold)
        return torch.where(kept >= 0, scores, -1.0)

    monkeypatch.setattr(graph_module, "_suppress", suppress)
    run = run_eagerly(DetectionGraph(model, SIZE).eval())
    images = [make_pixels(seed) for seed in range(2)]
    differences = compare(model, run, images)
    assert not differences.too_large, differences
    assert differences.num_ties > 0
    noise = 5e-3
    assert compare(model, run, images).too_large


@pytest.mark.parametrize("threshold", [0.35, 0.65])
def test_another_nms_is_refused(threshold, built, monkeypatch):
    model, run = built

    def changed(pixels):
        with monkeypatch.context() as patch:
            patch.setattr(model, "nms_threshold", threshold)
            return run(pixels)

    assert model.nms_threshold == 0.5
    assert compare(model, changed, [make_pixels()]).too_large
