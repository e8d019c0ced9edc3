"""Which objects match a window, why others do not, and proposed windows."""

import numpy as np
import pytest
import tiny
import torch

from tensormask.data import shapes
from tensormask.data.augmentation import Augmentation
from tensormask.data.catalog import get_dataset
from tensormask.evaluation.coverage import (
    REASONS,
    InputObjects,
    input_objects,
    measure_coverage,
    propose_sizes,
    scaled_windows,
)
from tensormask.modeling.assigners import NearestAssigner
from tensormask.modeling.assignment import assign
from tensormask.modeling.windows import Windows

PAPER = Windows(
    strides=(4, 8, 16, 32, 64, 128),
    sizes=((44, 60), (88, 120), (176, 240), (352, 480), (704, 960), (1408, 1920)),
)
TWO_LEVELS = Windows(strides=(4, 8), sizes=((44, 60), (88, 120)))


def square(x, y, side):
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2]


def objects_of(*boxes_per_image, sizes=(256, 256)):
    boxes = [torch.tensor(b, dtype=torch.float32).view(-1, 4) for b in boxes_per_image]
    sizes = [sizes] * len(boxes) if isinstance(sizes, tuple) else sizes
    return InputObjects(boxes, sizes, [["small"] * len(b) for b in boxes])


def reasons(coverage):
    """The number of objects that are too large, of no fitting size, at the border, ambiguous."""
    return [coverage.reasons[reason] for reason in REASONS]


def test_an_object_by_hand():
    # A square of 40 px centered on a window of p2. 44 px contain it only there, since the next
    # windows are more than 2 px off; 60 px also one stride off. 88 - 8 = 80 is exactly twice 40.
    coverage = measure_coverage(objects_of([square(128, 128, 40)]), TWO_LEVELS)
    assert coverage.windows.tolist() == [[1, 5], [5, 0]]
    assert coverage.objects.tolist() == [[1, 1], [1, 0]]
    assert coverage.by_size == {"small": (1, 1), "medium": (0, 0), "large": (0, 0)}
    assert coverage.share == 1


def test_reasons():
    boxes = [
        square(128, 128, 121),  # larger than 120
        square(48, 200, 20),
        square(48, 200, 20),  # the same: each window matches both
        square(204, 130, 59),  # 60 px contain it if centered within half a pixel; 130 is 2 off
    ]
    narrow = Windows(strides=(4, 8), sizes=((44, 60), (132, 180)))
    at = measure_coverage(objects_of(boxes), narrow)
    assert reasons(at) == [0, 1, 0, 2]
    assert (at.num_matched, at.num_objects) == (1, 4)
    at = measure_coverage(objects_of(boxes), TWO_LEVELS)
    assert reasons(at) == [1, 0, 0, 2]


def test_another_assigner():
    # At the center of a window, which 8 others surround: 60 - 4 is more than twice 20.
    twins = objects_of([square(48, 200, 20), square(48, 200, 20)])
    paper, nearest = (
        measure_coverage(twins, TWO_LEVELS, assigner) for assigner in (assign, NearestAssigner(1.5))
    )
    assert (reasons(paper), reasons(nearest)) == ([0, 0, 0, 2], [0, 0, 0, 1])
    assert (paper.windows_per_object, nearest.windows_per_object) == (0, 9)
    assert propose_sizes(twins, TWO_LEVELS, NearestAssigner(1.5))[1].num_matched == 1


def test_the_border():
    # The last window of a 32 px image is centered at 28, more than a stride from the corner.
    windows = Windows(strides=(4,), sizes=((8,),))
    corner = [[31.0, 31.0, 32.0, 32.0]]
    assert reasons(measure_coverage(objects_of(corner, sizes=(32, 32)), windows)) == [0, 0, 1, 0]
    # A higher image is padded to 64.
    assert measure_coverage(objects_of(corner, sizes=(40, 32)), windows).num_matched == 1


def test_chunks_are_the_same_as_single_images():
    rng = np.random.default_rng(0)
    boxes, sizes = [], []
    for _ in range(12):
        size = [(128, 128), (128, 200), (250, 128)][rng.integers(3)]
        centers = rng.uniform(10, 118, (rng.integers(0, 400), 2))
        boxes.append([square(x, y, side) for (x, y) in centers for side in (rng.uniform(3, 70),)])
        sizes.append(size)
    objects = objects_of(*boxes, sizes=sizes)
    found = measure_coverage(objects, TWO_LEVELS)
    num_windows = num_matched = 0
    for b, size in zip(objects.boxes, sizes, strict=True):
        assignment = assign([b], TWO_LEVELS, TWO_LEVELS.grids(size))
        num_windows += len(assignment.object)
        num_matched += len(assignment.object.unique())
    assert (found.windows.sum(), found.num_matched) == (num_windows, num_matched)
    assert found.num_objects == sum(map(len, boxes)) == num_matched + sum(reasons(found))


def test_a_set_without_objects():
    empty = objects_of([], [])
    coverage = measure_coverage(empty, PAPER)
    assert coverage.share == 1
    assert coverage.num_objects == 0
    assert propose_sizes(empty, PAPER)[0] is PAPER


def test_the_papers_windows():
    assert scaled_windows(11, 2, 4, longest=1300) == PAPER
    assert PAPER.level_names == ["p2", "p3", "p4", "p5", "p6", "p7"]
    assert scaled_windows(11, 2, 4, longest=1e6) == PAPER  # no level beyond p7
    assert scaled_windows(11, 2, 4, longest=100) == TWO_LEVELS
    assert scaled_windows(9, 1, 8, longest=100).sizes == ((72,), (144,))


@pytest.mark.parametrize("units", range(7, 16, 2))
@pytest.mark.parametrize("num_sizes", [1, 2, 3])
def test_proposals_can_be_built(units, num_sizes):
    windows = scaled_windows(units, num_sizes, 4, longest=300)
    opts = ["MODEL.ANCHOR_GENERATOR.SIZES", [list(sizes) for sizes in windows.sizes]]
    opts += ["MODEL.TENSOR_MASK.IN_FEATURES", windows.level_names]
    assert tiny.build(opts=opts).windows == windows


def test_a_proposal_matches_objects_that_were_too_large():
    rng = np.random.default_rng(1)
    boxes = [square(*rng.uniform(60, 200, 2), rng.uniform(10, 200)) for _ in range(15)]
    objects = objects_of(*([box] for box in boxes))
    given = measure_coverage(objects, TWO_LEVELS)
    assert reasons(given)[0] > 0
    proposed, coverage = propose_sizes(objects, TWO_LEVELS)
    assert coverage.num_matched > given.num_matched
    assert reasons(coverage)[0] == 0
    assert measure_coverage(objects, proposed).as_record() == coverage.as_record()


def test_a_proposal_drops_levels_without_objects_and_leaves_good_windows():
    proposed, coverage = propose_sizes(objects_of([square(128, 128, 40)]), PAPER)
    assert proposed.num_levels == 1
    assert proposed.sizes[0][0] <= 44
    assert coverage.share == 1
    objects = objects_of([square(100, 100, 25), square(40, 60, 90)])
    assert propose_sizes(objects, TWO_LEVELS)[0] is TWO_LEVELS


def test_objects_of_a_set_at_the_input_size(tmp_path):
    shapes.write_split("val", 4, tmp_path)
    dataset = get_dataset(f"{tmp_path / 'annotations.json'}@{tmp_path / 'images'}")
    objects = input_objects(dataset, Augmentation((64,), 64))
    assert objects.input_sizes == [(64, 64)] * 4
    for image_id, found, sizes in zip(
        dataset.image_ids, objects.boxes, objects.coco_sizes, strict=True
    ):
        annotations = dataset.annotations(image_id)
        boxes = [a["bbox"] for a in annotations]
        assert found.tolist() == [[x / 2, y / 2, (x + w) / 2, (y + h) / 2] for x, y, w, h in boxes]
        # Of the original image, as COCO's evaluation has it.
        assert sizes == ["small" if a["area"] < 1024 else "medium" for a in annotations]
    assert objects.longer_sides().max() < 64
