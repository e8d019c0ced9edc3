"""Oracle detections: true masks through their windows and back."""

import torch
from tiny import build, target
from torch.testing import assert_close

from tensormask.evaluation import oracle_detections


def test_objects_come_back_as_their_windows_show_them() -> None:
    """Boxes on the grid of mask cells are shown exactly, but for rounded corners."""
    boxes = [[20.0, 20.0, 64.0, 64.0], [78.0, 22.0, 114.0, 58.0]]
    truth = target(128, 128, boxes)
    found = oracle_detections(build(), truth, (128, 128), (128, 128))
    assert found["scores"].tolist() == [1.0, 1.0]
    assert found["labels"].tolist() == [0, 1]
    assert_close(found["boxes"], truth["boxes"])
    different = (found["masks"] != truth["masks"]).sum((1, 2))
    assert (different <= 4).all()


def test_a_thin_object_is_lost_to_the_mask_cells() -> None:
    """A line of one pixel fills a quarter of its 4 px cells: no window can show it."""
    found = oracle_detections(build(), target(64, 64, [[20, 30, 44, 31]]), (64, 64), (64, 64))
    assert found["masks"].shape == (1, 64, 64)
    assert not found["masks"].any()


def test_objects_without_a_window_are_not_found() -> None:
    """Two equal boxes claim the same windows, and an object larger than every window has none."""
    model = build(
        opts=["MODEL.TENSOR_MASK.IN_FEATURES", ["p2"], "MODEL.ANCHOR_GENERATOR.SIZES", [[44]]]
    )
    boxes = [[20, 20, 40, 40], [20, 20, 40, 40], [50, 50, 110, 110], [80, 10, 100, 30]]
    found = oracle_detections(model, target(128, 128, boxes), (128, 128), (128, 128))
    assert found["boxes"].tolist() == [[80, 10, 100, 30]]
    assert found["masks"].shape == (1, 128, 128)


def test_windows_over_the_padding_count() -> None:
    """The only window that owns this object stands at x = 100, outside of an image of 100 px."""
    opts = ["MODEL.TENSOR_MASK.IN_FEATURES", ["p2"], "MODEL.ANCHOR_GENERATOR.SIZES", [[44]]]
    truth = target(100, 100, [[99.5, 32.0, 100.0, 52.0]])
    assert len(oracle_detections(build(opts=opts), truth, (100, 100), (100, 100))["scores"]) == 1


def test_results_are_in_the_output_frame() -> None:
    truth = target(128, 128, [[20.0, 20.0, 64.0, 64.0]])
    found = oracle_detections(build(), truth, (128, 128), (256, 64))
    assert found["boxes"].tolist() == [[10.0, 40.0, 32.0, 128.0]]
    expected = torch.zeros(256, 64, dtype=torch.bool)
    expected[40:128, 10:32] = True
    assert (found["masks"][0] != expected).float().mean() < 0.002
