"""Assigners that give an object more windows than the paper's, against their rules in loops."""

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import build, get_cfg, make_image, target, with_detections
from torch.testing import assert_close
from torchvision.ops import box_iou

from tensormask.modeling import assign, build_model
from tensormask.modeling.assigners import (
    ASSIGNERS,
    AlignedAssigner,
    NearestAssigner,
    make_assigner,
    predictions_of,
)
from tensormask.modeling.box_coder import BOX_WEIGHTS
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


@pytest.mark.parametrize("seed", range(4))
def test_aligned_equals_the_rule(seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    corner, sides = torch.rand(2, 6, 2, generator=generator)
    boxes = torch.cat([corner * 80, corner * 80 + 8 + sides * 50], 1)
    outputs = torch.rand(2, 3, 2, 30, 30, generator=generator) ** 0.5

    def predictions(image, level, size, y, x, obj):
        return outputs[:, level, size, y, x].unbind()

    radius, topk = 2.0, 5
    owners, costs = owners_by_the_rule(boxes, WINDOWS, GRIDS, radius), {}
    gains = dict.fromkeys(range(6), 0.0)
    for (level, size, y, x), (_, area, k) in owners.items():
        iou, of_window = (
            float(outputs[1, level, size, y, x]),
            area / WINDOWS.sizes[level][size] ** 2,
        )
        gains[k] = max(gains[k], (iou - of_window) / (1 - of_window))
    for window, (distance, _, k) in owners.items():
        score, iou = outputs[(slice(None), *window)].tolist()
        costs[window] = -math.exp(-distance / radius**2) * (score * iou**6) ** gains[k]
    expected = best_by_the_rule(owners, costs, topk)
    assigner = functools.partial(AlignedAssigner(radius, topk), predictions=predictions)
    assert positives(assigner, boxes) == expected


def test_aligned_by_hand() -> None:
    """Predictions that equal the windows leave the nearest; a good box far away wins over them."""
    boxes = torch.tensor([[36.0, 36.0, 44.0, 44.0]])  # at the center of window (10, 10)
    best = (0, 0, 11, 11)  # level, size, y, x

    def predictions(image, level, size, y, x, obj, iou):
        found = (torch.stack([level, size, y, x], 1) == torch.tensor(best)).all(1)
        return torch.full((len(y),), 0.01), torch.where(found, iou, 64 / 44**2)

    for iou, expected in ((64 / 44**2, (0, 0, 0, 10, 10)), (0.9, (0, *best))):
        of_iou = functools.partial(predictions, iou=iou)
        assigner = functools.partial(AlignedAssigner(1.5, 1), predictions=of_iou)
        assert positives(assigner, boxes) == {expected}
    assert positives(AlignedAssigner(1.5, 1), boxes) == {(0, 0, 0, 10, 10)}


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


@pytest.mark.parametrize("dense_boxes", [True, False])
def test_predictions_of_a_model(dense_boxes) -> None:
    """The scores and boxes that `inspect` shows, for windows of two images and all levels."""
    model = with_detections(build())
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.1)
    images = [make_image(64, 96), make_image(64, 96, seed=1)]
    targets = [
        target(64, 96, [[10, 10, 40, 50]]),
        target(64, 96, [[5, 5, 30, 20], [20, 8, 60, 40]]),
    ]
    dense = model.dense(images)
    if dense_boxes:
        dense = dense._replace(deltas=list(model.head(dense.features)[1]))
    image, obj = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1])
    level, size = torch.tensor([1, 0, 5, 0]), torch.tensor([0, 1, 1, 0])
    y, x = torch.tensor([2, 3, 0, 15]), torch.tensor([3, 20, 0, 2])
    predict = predictions_of(dense, model.head, model.windows, targets, BOX_WEIGHTS)
    scores, ious = predict(image, level, size, y, x, obj)
    assert not scores.requires_grad
    assert not ious.requires_grad
    inspections = list(map(model.inspect, images))
    for row, (n, k, p, s, v, u) in enumerate(zip(image, obj, level, size, y, x, strict=True)):
        box, label = targets[n]["boxes"][k], targets[n]["labels"][k]
        assert_close(scores[row], inspections[n].class_scores[p][s, label, v, u])
        assert_close(ious[row], box_iou(inspections[n].boxes(p)[s, v, u][None], box[None])[0, 0])


def test_training_with_predictions() -> None:
    """The assigner gets them in `forward` and `inspect`; the box tower runs once a level."""
    model, calls = build("bipyramid", [f"{KEYS}.ASSIGNMENT", "aligned"]), []

    @dataclass(frozen=True)
    class Recorder(AlignedAssigner):
        def __call__(self, *args, predictions=None):
            calls.append(predictions)
            return super().__call__(*args, predictions=predictions)

    assert model.criterion.assigner == AlignedAssigner()
    model.criterion.assigner = Recorder()
    num_levels = []
    model.head.bbox_pred.register_forward_hook(lambda *_: num_levels.append(1))
    image, truth = make_image(64, 96), target(64, 96, [[10, 10, 40, 50]])
    losses = model.train()([image], [truth])
    assert len(num_levels) == model.windows.num_levels
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert len(model.eval().inspect(image, truth).assignment.object) > 0
    assert len(calls) == 2
    assert None not in calls


def test_aligned_needs_boxes() -> None:
    with pytest.raises(UserError, match=r"'aligned'\) needs boxes"):
        build("bipyramid", [f"{KEYS}.ASSIGNMENT", "aligned", f"{KEYS}.BOX_ON", False,
            f"{KEYS}.NMS_ON", "masks"])  # fmt: skip
