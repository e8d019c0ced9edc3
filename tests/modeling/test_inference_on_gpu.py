"""Inference on a pretended GPU: the results of the CPU, and few waits of the host."""

import pytest
import tiny
import torch
from pretended_cuda import pretend
from torch.testing import assert_close

from tensormask.evaluation.results import coco_results
from tensormask.modeling.build import use_channels_last
from tensormask.modeling.inference import _nms, read_detection

pytestmark = pytest.mark.usefixtures("nothing_left_behind")
FROZEN = ["MODEL.RESNETS.NORM", "FrozenBN"]
ON_MASKS = ["MODEL.TENSOR_MASK.NMS_ON", "masks"]
CASES = {
    "bipyramid": ("bipyramid", FROZEN, {}),
    "few candidates": ("bipyramid", ["MODEL.TENSOR_MASK.TOPK_CANDIDATES_TEST", 30], {}),
    "all are candidates": ("natural", ["MODEL.TENSOR_MASK.SCORE_THRESH_TEST", 0.0], {}),
    "few detections": ("natural", ["MODEL.RESNETS.NORM", "GN"], {"num_detections": 3}),
    "no detections": ("natural", [], {"score_threshold": 0.999}),
    "of no class": ("natural", [], {"classes": []}),
    "of a class": ("natural", [], {"classes": [2], "class_agnostic_nms": True}),
    "upscale": ("upscale_aligned", [], {}),
    "mask IoU": ("bipyramid", ["MODEL.TENSOR_MASK.MASK_IOU_ON", True], {}),
    "no masks": ("natural", ["MODEL.MASK_ON", False], {}),
    "NMS on masks": ("natural", ON_MASKS, {}),
    "no boxes": ("bipyramid", [*ON_MASKS, "MODEL.TENSOR_MASK.BOX_ON", False], {}),
    "channels last": ("aligned", [*FROZEN, "MODEL.CHANNELS_LAST", True], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_results_and_waits(case: str) -> None:
    head, opts, options = CASES[case]
    images = [tiny.make_image(64, 96, 0), tiny.make_image(44, 60, 1)]
    sizes = [(64, 96), (32, 40)]

    def model(device: str):
        return tiny.with_detections(tiny.build(head, [*opts, "MODEL.DEVICE", device]))

    with torch.no_grad():
        expected = model("cpu").detect(images, sizes, **options)
        with pretend() as record:
            on_gpu = model("cuda")
            on_gpu.detect([image.pin_memory() for image in images], sizes, **options)
            record.clear()
            detections = on_gpu.detect(images, sizes, **options)
            waits = record.waits.total()
            assert not record.mixes
            assert not record.unpinned
            assert all(
                x.is_cuda for d in detections for x in (d["boxes"], *d.get("window_masks", ()))
            )
            record.clear()
            actual = [read_detection(detection) for detection in detections]
            assert not record.mixes
            assert record.waits.total() <= 4, record.waits
            record.clear()
            for detection, size in zip(detections, sizes, strict=True):
                coco_results(detection, 1, [7, 8, 9], size)  # each image is read once
            assert record.waits.total() <= 4, record.waits
    # NMS per image, their windows together; NMS on masks needs the windows before.
    assert waits == len(images) + (2 if opts[:2] == ON_MASKS else 1)
    for one, other in zip(actual, expected, strict=True):
        assert list(one) == list(other)
        for name, values in other.items():
            assert_close(one[name], values, rtol=1e-4, atol=1e-4)
    assert any(len(d["scores"]) for d in expected) == (case not in ("no detections", "of no class"))


def test_waits_in_half_precision() -> None:
    opts = ["TEST.AMP.ENABLED", True, "TEST.AMP.DTYPE", "bfloat16", "MODEL.DEVICE", "cuda"]
    images = [tiny.make_image(64, 96)]
    with torch.no_grad(), pretend() as record:
        model = tiny.with_detections(tiny.build("bipyramid", [*FROZEN, *opts]))
        model(images)
        record.clear()
        (detection,) = model(images)
    assert len(detection["scores"])
    assert not record.mixes
    assert record.waits.total() == 2


@pytest.mark.parametrize(
    "value, device, capability, expected",
    [
        ("auto", "cpu", (9, 0), False),
        ("auto", "cuda", (9, 0), True),
        ("auto", "cuda", (7, 0), True),
        ("auto", "cuda", (6, 1), False),
        ("True", "cpu", (9, 0), True),
        (False, "cuda", (9, 0), False),
    ],
)
def test_channels_last_is_on_where_tensor_cores_are(
    value, device: str, capability: tuple[int, int], expected: bool, monkeypatch
) -> None:
    cfg = tiny.get_cfg(opts=["MODEL.CHANNELS_LAST", value])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert use_channels_last(cfg.MODEL.CHANNELS_LAST, torch.device(device)) is expected
    with pytest.raises(ValueError, match="True, False or 'auto', got"):
        cfg.merge_from_list(["MODEL.CHANNELS_LAST", 1])


def test_classes_do_not_suppress_each_other() -> None:
    """Also at negative coordinates: moved by the largest one + 1, the first box is the second."""
    boxes = torch.tensor([[-201.0, -101.0, -1.0, -1.0], [400.0, 500.0, 600.0, 600.0]])
    with pretend():
        arguments = (x.to("cuda") for x in (boxes, torch.tensor([0.8, 0.9]), torch.tensor([1, 0])))
        assert _nms(*arguments, 0.5).tolist() == [1, 0]
