"""Assigners that give an object more windows than the paper's, against their rules in loops."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import get_cfg

from tensormask.modeling import assign, build_model
from tensormask.modeling.assigners import (
    ASSIGNERS,
    NearestAssigner,
    make_assigner,
)
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError
from tests.modeling.test_assignment import (
    GRIDS,
    WINDOWS,
    claims_by_the_rule,
    coordinate,
    matches_by_the_rule,
    rows_of,
    side,
)


def owners_by_the_rule(boxes, windows: Windows, grids, *options: float) -> dict:
    """Return the nearest object of each claimed window, and its squared distance."""
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes.tolist()]
    claims = claims_by_the_rule(boxes, windows, grids, *options)
    return {
        window: min((distance, areas[k], k) for k, distance in of_objects.items())
        for window, of_objects in claims.items()
    }


def positives(assigner, boxes) -> set[tuple[int, ...]]:
    """Return (object, level, size, y, x) of the positive windows of an image, all different."""
    rows = [tuple(row) for row in rows_of(assigner([boxes], WINDOWS, GRIDS)).tolist()]
    assert len({row[1:] for row in rows}) == len(rows)
    return set(rows)


KEYS = "MODEL.TENSOR_MASK"
objects = st.lists(st.tuples(coordinate, coordinate, side, side), min_size=1, max_size=6)
BIG, SMALL = (20.0, 20.0, 30.0, 30.0), (25.0, 25.0, 20.0, 20.0)  # of one center


def to_boxes(objects) -> torch.Tensor:
    return torch.tensor([[x, y, x + w, y + h] for x, y, w, h in objects])


@settings(max_examples=40, deadline=None)
@given(objects, st.sampled_from([0.5, 1.0, 1.5, 2.25]))
@example([BIG, SMALL, SMALL], 1.0)  # the smaller wins, the first of two
def test_nearest_equals_the_rule(objects, radius) -> None:
    boxes = to_boxes(objects)
    owners = owners_by_the_rule(boxes, WINDOWS, GRIDS, radius)
    expected = {(k, *window) for window, (_, _, k) in owners.items()}
    assert positives(make_assigner("nearest", radius), boxes) == expected
    expected = matches_by_the_rule(boxes, WINDOWS, GRIDS, radius)
    assert positives(make_assigner("paper", radius), boxes) == expected


def test_nearest_by_hand() -> None:
    """Two objects of one row, 2 strides apart: they share the window between, half a stride off."""
    boxes = torch.tensor([[36.0, 36.0, 44.0, 44.0], [46.0, 36.0, 54.0, 44.0]])  # x: 10 and 12.5
    rows = positives(make_assigner("nearest", 1.5), boxes)
    middle = {(x, k) for k, level, size, y, x in rows if (level, size, y) == (0, 0, 10)}
    assert middle == {(9, 0), (10, 0), (11, 0), (12, 1), (13, 1), (14, 1)}
    paper = positives(make_assigner("paper", 1.5), boxes)
    assert rows - paper == {(0, 0, 0, 10, 11)}


def best_by_the_rule(owners: dict, costs: dict, num: int) -> set[tuple[int, ...]]:
    """Return (object, level, size, y, x) of the windows of the lowest costs of each object."""
    chosen = set()
    for k in {k for _, _, k in owners.values()}:
        of_object = [window for window, (_, _, owner) in owners.items() if owner == k]
        of_object.sort(key=lambda window: (costs[window], window))
        chosen |= {(k, *window) for window in of_object[:num]}
    return chosen


@settings(max_examples=30, deadline=None)
@given(objects, st.sampled_from([0.5, 2.25]), st.sampled_from([1, 4, 9]))
@example([BIG, SMALL, SMALL], 1.0, 9)
def test_atss_equals_the_rule(objects, radius, topk) -> None:
    boxes = to_boxes(objects)
    owners = owners_by_the_rule(boxes, WINDOWS, GRIDS, radius, topk)
    costs = {window: distance for window, (distance, _, _) in owners.items()}
    expected = best_by_the_rule(owners, costs, topk)
    assert positives(make_assigner("atss", radius, topk), boxes) == expected


def test_atss_gives_small_objects_as_many_as_others() -> None:
    """One size of window fits the first object; two levels and three sizes fit the second."""
    boxes = torch.tensor([[28.0, 28.0, 32.0, 32.0], [50.0, 30.0, 90.0, 70.0]])
    counts = [sorted(k for k, *_ in positives(make_assigner(*options), boxes)) for options in (
        ("nearest", 1.0), ("atss", 1.0, 9))]  # fmt: skip
    assert [[of.count(0), of.count(1)] for of in counts] == [[4, 4 + 4 + 3], [9, 9]]


@pytest.mark.parametrize(
    "options, message",
    [
        (("near",), "'near' is not an assignment .*the nearest name is 'nearest'"),
        (("nearest", 0.0), "ASSIGN_RADIUS.* must be above 0 .*got 0.0"),
        (("paper", float("nan")), "ASSIGN_RADIUS"),
        (("paper", float("inf")), "ASSIGN_RADIUS"),
        (("atss", 1.0, 0), "ASSIGN_TOPK.* must be 1 or more, such as 9; got 0"),
    ],
)
def test_invalid_options(options, message) -> None:
    with pytest.raises(UserError, match=message):
        make_assigner(*options)


def test_config_builds_the_assigner() -> None:
    cfg = get_cfg()
    assert build_model(cfg).criterion.assigner is assign
    cfg.MODEL.TENSOR_MASK.ASSIGNMENT, cfg.MODEL.TENSOR_MASK.ASSIGN_RADIUS = "nearest", 1.5
    assert build_model(cfg).criterion.assigner == NearestAssigner(1.5)


@pytest.mark.parametrize("name", ASSIGNERS)
def test_no_objects(name) -> None:
    assignment = make_assigner(name)([torch.zeros(0, 4), torch.zeros(0, 4)], WINDOWS, GRIDS)
    assert assignment.groups() == []
