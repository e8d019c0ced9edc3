"""The assignment against the written rule, for every window and object; box offsets; windows."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tensormask.modeling.assignment import Assignment, assign
from tensormask.modeling.box_coder import decode_boxes, encode_boxes
from tensormask.modeling.windows import Windows

WINDOWS = Windows(strides=(4, 8, 16), sizes=((44, 60), (88, 120), (176, 240)))
GRIDS = [(25, 30), (13, 15), (7, 8)]


def kth_distance(x: float, y: float, k: int) -> float:
    """Return the squared distance of a point from the k-th nearest of all integer points."""
    points = itertools.product(*(range(int(c) - 6, int(c) + 7) for c in (x, y)))
    return sorted((x - u) ** 2 + (y - v) ** 2 for u, v in points)[k - 1]


def claims_by_the_rule(
    boxes, windows: Windows, grids, radius: float = 1.0, num_nearest: int = 0
) -> dict[tuple[int, ...], dict[int, float]]:
    """Test every window against every object: squared distances by (level, size, y, x), object."""
    matches, boxes = {}, boxes.tolist()
    for level, (stride, sizes) in enumerate(zip(windows.strides, windows.sizes, strict=True)):
        limits = [radius**2] * len(boxes)
        if num_nearest:
            centers = [((x0 + x1) / 2 / stride, (y0 + y1) / 2 / stride) for x0, y0, x1, y1 in boxes]
            limits = [max(radius**2, kth_distance(*center, num_nearest)) for center in centers]
        for s, side in enumerate(sizes):
            for y, x in itertools.product(*map(range, grids[level])):
                cx, cy = x * stride, y * stride
                for k, (x0, y0, x1, y1) in enumerate(boxes):
                    dx, dy = (x0 + x1) / 2 - cx, (y0 + y1) / 2 - cy
                    distance = (dx / stride) ** 2 + (dy / stride) ** 2
                    if distance > limits[k]:
                        continue
                    inside = cx - side / 2 <= x0 and x1 <= cx + side / 2
                    inside = inside and cy - side / 2 <= y0 and y1 <= cy + side / 2
                    min_size = min(windows.sizes[0]) - windows.strides[0]
                    if inside and side - stride <= max(2 * max(x1 - x0, y1 - y0), min_size):
                        matches.setdefault((level, s, y, x), {})[k] = distance
    return matches


def matches_by_the_rule(boxes, windows: Windows, grids, radius: float = 1.0):
    """Return (object, level, size, y, x) of the windows of one object."""
    claims = claims_by_the_rule(boxes, windows, grids, radius)
    return {(*ks, *window) for window, ks in claims.items() if len(ks) == 1}


def matches(boxes: torch.Tensor, windows: Windows, grids) -> set[tuple[int, ...]]:
    assignment = assign([boxes], windows, grids)
    rows = [tuple(row) for row in rows_of(assignment).tolist()]
    assert len(set(rows)) == len(rows)
    return set(rows)


def rows_of(assignment: Assignment) -> torch.Tensor:
    columns = (assignment.object, assignment.level, assignment.size, assignment.y, assignment.x)
    return torch.stack(columns, 1)


# Quarters of a pixel are exact in float32, so that the rule is exact at its boundaries.
coordinate = st.integers(-40, 480).map(lambda i: i / 4)
quarters = st.integers(1, 480).map(lambda i: i / 4)
side = quarters | st.sampled_from([36.0, 40.0, 44.0, 60.0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(coordinate, coordinate, side, side), min_size=1, max_size=5))
@example([(38.0, 38.0, 44.0, 44.0)])  # as large as a window of 44, centered at it
@example([(18.0, 18.0, 44.0, 44.0)])  # the same size, between windows
@example([(36.0, 38.0, 8.0, 4.0)])  # at the center of a window
@example([(36.0, 38.0, 8.0, 8.0)])  # between four windows
@example([(30.0, 40.0, 20.0, 0.5)])  # 40 = 44 - 4 <= 2 * 20: at the limit of the scale rule
@example([(30.0, 40.0, 19.75, 0.5)])
@example([(0.0, 0.0, 3.0, 3.0)])
@example([(110.0, 90.0, 10.0, 10.0)])  # at the end of the grid
def test_equals_the_rule(objects) -> None:
    boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in objects])
    assert matches(boxes, WINDOWS, GRIDS) == matches_by_the_rule(boxes, WINDOWS, GRIDS)


def test_windows_that_match_two_objects_are_background() -> None:
    box = torch.tensor([36.0, 36.0, 44.0, 44.0])
    assert not matches(torch.stack([box, box]), WINDOWS, GRIDS)
    moved = matches(torch.stack([box, box + 4]), WINDOWS, GRIDS)
    assert moved == matches_by_the_rule(torch.stack([box, box + 4]), WINDOWS, GRIDS)
    assert {k for k, *_ in moved} == {0, 1}


def test_batch_is_sorted_and_counted() -> None:
    generator = torch.Generator().manual_seed(3)
    images = []
    for num_objects in (6, 0, 9):
        corner, sides = torch.rand(2, num_objects, 2, generator=generator)
        images.append(torch.cat([corner * 80, corner * 80 + 5 + sides * 60], 1))
    assignment = assign(images, WINDOWS, GRIDS)
    for n, boxes in enumerate(images):
        rows = rows_of(assignment)[assignment.image == n]
        assert {tuple(row) for row in rows.tolist()} == matches(boxes, WINDOWS, GRIDS)
    keys = torch.stack([assignment.level, assignment.size, assignment.image], 1).tolist()
    assert keys == sorted(keys)
    for level, at in enumerate(assignment.levels()):
        assert (assignment.level[at] == level).all()
    assert sum(at.stop - at.start for at in assignment.levels()) == len(keys)
    num_windows = 0
    for level, size, at in assignment.groups():
        assert (assignment.level[at] == level).all()
        assert (assignment.size[at] == size).all()
        per_image = torch.bincount(assignment.image[at], minlength=3).tolist()
        assert assignment.counts[level][size] == per_image
        num_windows += at.stop - at.start
    assert num_windows == len(keys)
    low, high = assignment.boxes.split(2, 1)
    sides = torch.tensor(WINDOWS.sizes)[assignment.level, assignment.size, None]
    assert torch.equal(high - low, sides.expand(-1, 2).float())
    strides = torch.tensor(WINDOWS.strides)[assignment.level, None]
    center = torch.stack([assignment.x, assignment.y], 1) * strides
    assert torch.equal((low + high) / 2, center.float())


def test_no_objects() -> None:
    assignment = assign([torch.zeros(0, 4), torch.zeros(0, 4)], WINDOWS, GRIDS)
    assert len(assignment.object) == 0
    assert assignment.groups() == []
    assert assignment.levels() == [slice(0, 0)] * 3


def test_box_offsets_by_hand() -> None:
    window = torch.tensor([[0.0, 0.0, 40.0, 40.0]])
    box = torch.tensor([[10.0, 20.0, 30.0, 40.0]])  # center (20, 30), side 20
    deltas = encode_boxes(box, window, (1.5, 1.5, 0.75, 0.75))
    log_half = 0.75 * torch.tensor(0.5).log().item()
    assert_close(deltas, torch.tensor([[0.0, 1.5 * 10 / 40, log_half, log_half]]))
    assert_close(decode_boxes(deltas, window, (1.5, 1.5, 0.75, 0.75)), box)
    huge = decode_boxes(torch.tensor([[0.0, 0.0, 99.0, 99.0]]), window, (1.0,) * 4)
    assert_close(huge[0, 2:] - huge[0, :2], torch.full((2,), 40 * 1000 / 16))


@pytest.mark.parametrize(
    "strides, sizes, message",
    [
        ((4, 8), ((44, 60), (88,)), "of one length"),
        ((4,), ((45,),), "multiples"),
        ((4,), ((4,),), "larger"),
    ],
)
def test_invalid_geometry_is_refused(strides, sizes, message) -> None:
    with pytest.raises(ValueError, match=message):
        Windows(strides, sizes)


@pytest.mark.parametrize("y", [[3, 3], [-1, 3]])
def test_windows_that_occur_twice_or_are_outside(y) -> None:
    zeros = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="each window at most once"):
        Assignment.make(
            WINDOWS, 1, zeros, torch.tensor([0, 1]), zeros, zeros, torch.tensor(y), zeros
        )


def test_boxes_that_are_not_finite_match_nothing(recwarn) -> None:
    inf, nan = float("inf"), float("nan")
    rows = [[0, 0, inf, 8], [-inf, 0, inf, 8], [nan, 0, 8, 8], [-3e38, -3e38, 3e38, 3e38]]
    assert not matches(torch.tensor(rows), WINDOWS, GRIDS)
    assert not recwarn.list
