"""Oracle detections: ground-truth masks through their windows and back."""

import json

import numpy as np
import pytest
import torch
from tiny import build, target
from torch.testing import assert_close

from tensormask.data import shapes
from tensormask.data.augmentation import Augmentation
from tensormask.data.catalog import get_dataset
from tensormask.evaluation import evaluate_oracle, oracle, oracle_detections
from tensormask.layers import crop_masks, paste_masks
from tensormask.modeling.assignment import assign


def pasted(detections, size):
    return paste_masks(detections["window_masks"], detections["windows"], size)


def test_objects_come_back_as_their_windows_represent_them() -> None:
    """Boxes on the grid of mask cells are exact, except for rounded corners."""
    boxes = [[20.0, 20.0, 64.0, 64.0], [78.0, 22.0, 114.0, 58.0]]
    truth = target(128, 128, boxes)
    found = oracle_detections(build(), truth, (128, 128), (128, 128))
    assert found["scores"].tolist() == [1.0, 1.0]
    assert found["labels"].tolist() == [0, 1]
    assert_close(found["boxes"], truth["boxes"])
    different = (pasted(found, (128, 128)) != truth["masks"]).sum((1, 2))
    assert (different <= 4).all()


@pytest.mark.parametrize("unit, area", [(0, 0), (2, 48), (1, 24)])
def test_a_thin_object_is_lost_to_the_mask_cells(unit: int, area: int) -> None:
    """A line of one pixel fills a quarter of its 4 px cells: no window can represent it."""
    model = build(opts=["MODEL.TENSOR_MASK.MASK_UNIT", unit])
    found = oracle_detections(model, target(64, 64, [[20, 30, 44, 31]]), (64, 64), (64, 64))
    assert len(found["scores"]) == 1
    assert pasted(found, (64, 64)).sum() == area


ONE_LEVEL = ["MODEL.TENSOR_MASK.IN_FEATURES", ["p2"], "MODEL.ANCHOR_GENERATOR.SIZES", [[44]]]


@pytest.mark.parametrize("assignment, num_equal", [("paper", 0), ("nearest", 1)])
def test_objects_without_a_window_are_not_detected(assignment: str, num_equal: int) -> None:
    """Two equal boxes match the same windows, and one object is larger than every window."""
    model = build(opts=[*ONE_LEVEL, "MODEL.TENSOR_MASK.ASSIGNMENT", assignment])
    boxes = [[20, 20, 40, 40], [20, 20, 40, 40], [50, 50, 110, 110], [80, 10, 100, 30]]
    found = oracle_detections(model, target(128, 128, boxes), (128, 128), (128, 128))
    assert found["boxes"].tolist() == [[20, 20, 40, 40]] * num_equal + [[80, 10, 100, 30]]
    assert len(found["window_masks"]) == num_equal + 1
    assert not len(oracle_detections(model, target(64, 64, []), (64, 64), (64, 64))["scores"])


def test_windows_centered_in_the_padding_count() -> None:
    """The only window of this object is centered at x = 100, outside of an image of 100 px."""
    model, truth = build(opts=ONE_LEVEL), target(100, 100, [[99.5, 32.0, 100.0, 52.0]])
    assert len(oracle_detections(model, truth, (100, 100), (100, 100))["scores"]) == 1


def test_results_are_in_the_output_image() -> None:
    truth = target(128, 128, [[20.0, 20.0, 64.0, 64.0]])
    found = oracle_detections(build(), truth, (128, 128), (256, 64))
    assert found["boxes"].tolist() == [[10.0, 40.0, 32.0, 128.0]]
    expected = torch.zeros(256, 64, dtype=torch.bool)
    expected[40:128, 10:32] = True
    assert (pasted(found, (256, 64))[0] != expected).float().mean() < 0.002


def test_a_model_without_masks_is_refused() -> None:
    model = build(opts=["MODEL.MASK_ON", False])
    with pytest.raises(ValueError, match="MASK_ON"):
        oracle_detections(model, target(64, 64, []), (64, 64), (64, 64))


def blobs(size, num_objects, seed):
    """Overlapping objects with ragged masks, some of them empty, at the border, or outside of
    their boxes.
    """
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, np.array(size[::-1]) - 10, (num_objects, 2))
    ends = np.minimum(corners + rng.integers(8, 90, (num_objects, 2)), size[::-1])
    boxes = np.concatenate([corners, ends], 1).tolist()
    truth = target(*size, boxes)
    noise = torch.from_numpy(rng.random((num_objects, *size)) < 0.7)
    truth["masks"] &= noise
    truth["masks"][::3] |= torch.from_numpy(rng.random((len(boxes[::3]), *size)) < 0.02)
    truth["masks"][1] = False
    return truth


def brute_force(model, target, input_size):
    """The best window and its mask of each object, by whole images."""
    matched = assign([target["boxes"]], model.windows, model.windows.grids(input_size))
    best = {}
    for level, size, at in matched.groups():
        side = model.windows.mask_sizes[size] * model.mask_head.lambdas[level]
        objects, windows = matched.object[at], matched.boxes[at]
        crops = crop_masks(target["masks"], objects, windows, side).float()
        images = paste_masks(crops, windows, input_size)
        for k, crop, window, image in zip(objects.tolist(), crops, windows, images, strict=True):
            truth = target["masks"][k]
            iou = float((image & truth).sum() / (image | truth).sum().clamp(min=1))
            if k not in best or iou > best[k][0]:
                best[k] = (iou, crop, window)
    return [best[k] for k in sorted(best)]


# 50 px: masks of 11 pixels on windows whose coarser sizes are no multiples of 11.
ODD_SIZES = ["MODEL.ANCHOR_GENERATOR.SIZES", [[44], [90], [173], [352], [704], [1408]]]


@pytest.mark.parametrize(
    "head, opts",
    [("bipyramid", []), ("finer_bipyramid", []), ("natural", []), ("natural", ODD_SIZES)],
)
def test_the_best_windows_are_those_of_whole_images(head, opts) -> None:
    """Masks are compared in the region of each window, and cropped by counting pixels."""
    size = (150, 210)
    model, truth = build(head, opts), blobs(size, 30, seed=len(opts))
    found, expected = oracle_detections(model, truth, size, size), brute_force(model, truth, size)
    assert len(expected) > 15
    assert_close(found["windows"], torch.stack([window for _, _, window in expected]))
    for mask, (_, crop, _) in zip(found["window_masks"], expected, strict=True):
        assert torch.equal(mask, crop)


def test_several_processes_have_the_results_of_one(tmp_path, monkeypatch) -> None:
    """Ranks run one after the other: rank 0 comes last, with the others' results."""
    shapes.write_split("val", 5, tmp_path)
    dataset = get_dataset(f"{tmp_path / 'annotations.json'}@{tmp_path / 'images'}")
    model, transform, scored = build(), Augmentation((96,), 96), []
    evaluate_results = oracle.evaluate_results

    def record(coco_gt, results, *args, **options):
        scored.append(json.dumps(results))
        return evaluate_results(coco_gt, results, *args, **options)

    monkeypatch.setattr(oracle, "evaluate_results", record)
    expected = evaluate_oracle(model, dataset, transform)
    assert expected["segm"]["AP"] > 30
    for world_size in (1, 2, 3):
        shares = []

        def gather(results, shares=shares):
            shares.insert(0, results)
            return shares

        options = {"world_size": world_size, "gather": gather}
        for rank in reversed(range(1, world_size)):
            assert evaluate_oracle(model, dataset, transform, rank=rank, **options) == {}
        metrics = evaluate_oracle(model, dataset, transform, **options)
        assert str(metrics) == str(expected)  # NaN is unequal to itself
        assert sum(map(len, shares)) == len(dataset)
    assert len(scored) == 4
    assert len(set(scored)) == 1
