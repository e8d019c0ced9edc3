"""The query, and inference in a part of the finest level against all of it."""

import pytest
import tiny
import torch
from pretended_cuda import pretend
from torch.testing import assert_close

from tensormask.modeling import cells, sampling, sparse, tensormask
from tensormask.modeling.assignment import assign
from tensormask.modeling.inference import read_detection
from tensormask.modeling.query import Query, query_loss, query_targets
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError

_HEAD = "MODEL.TENSOR_MASK."
_ON = [_HEAD + "QUERY_ON", True, _HEAD + "SCORE_THRESH_TEST", 0.1]
CASES = {
    "paper's": ("bipyramid", []),
    "layer norm": ("bipyramid", [_HEAD + "NORM", "LN", "MODEL.FPN.NORM", "LN"]),
    "batch norm": ("finer_bipyramid", [_HEAD + "NORM", "BN", "MODEL.FPN.FUSE_TYPE", "avg"]),
    "mask IoU, GN in the pyramid": (
        "bipyramid",
        [_HEAD + "MASK_IOU_ON", True, "MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", 32],
    ),
    "another head": ("natural", [_HEAD + "QUERY_LEVELS", ["p3", "p4"]]),
    "NMS on masks": ("bipyramid", [_HEAD + "NMS_ON", "masks"]),
    "no masks": ("natural", ["MODEL.MASK_ON", False]),
}


@pytest.fixture
def always_cells(monkeypatch) -> None:
    """Compute parts whatever the work, also of small feature maps."""
    for name, value in ("_MAX_WORK", 1e9), ("MIN_LOCATIONS", 0), ("MIN_SAVED_ON_GPU", -1e18):
        monkeypatch.setattr(cells, name, value)
    monkeypatch.setattr(sparse, "_MAX_FEATURES", 1e9)


def build(case: str, device: str = "cpu"):
    """Return a model whose query asks for about a fifth of p2."""
    head, opts = CASES[case]
    model = tiny.with_detections(tiny.build(head, [*_ON, *opts, "MODEL.DEVICE", device]))
    with torch.no_grad():
        for conv in model.head.query.convs:
            torch.nn.init.normal_(conv.weight, std=0.3)
        logits = model.dense([tiny.make_image(96, 160)]).query
        model.head.query.threshold.copy_(logits.sigmoid().quantile(0.8))
    return model


@pytest.mark.parametrize("case", CASES)
def test_detections_equal_those_of_the_whole_level(case: str, always_cells, monkeypatch) -> None:
    model = build(case).double()
    images = [tiny.make_image(96, 160), tiny.make_image(80, 100, seed=1)]
    with torch.inference_mode():
        actual = model.detect(images)
        whole = model.dense(images)
        share = whole.logits[0].isfinite().double().mean()
        assert 0.05 < share < 0.4
        parts, finest = model._detection_outputs(images)
        assert_close(parts.logits, whole.logits, rtol=1e-9, atol=1e-9)
        read = finest.computed[:, None].expand_as(whole.features[0])
        if "NMS" not in case and case != "another head" and "GN" not in case:
            assert 0.05 < read.double().mean() < 0.9
        assert_close(parts.features[0][read], whole.features[0][read], rtol=1e-9, atol=1e-9)
        monkeypatch.setattr(tensormask, "finds_sparsely", lambda *parts: False)
        expected = model.detect(images)
    assert len(actual[0]["scores"]) > 10
    assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_a_threshold_of_0_asks_for_everything(monkeypatch) -> None:
    """That of a model without one; the results are those of a model without a query."""
    image, plain = tiny.make_image(64, 96), tiny.with_detections(tiny.build())
    model = tiny.build(opts=[_HEAD + "QUERY_ON", True])
    tiny.with_detections(model)
    model.load_state_dict(plain.state_dict(), strict=False)
    with torch.inference_mode():
        assert_close(model.detect([image]), plain.detect([image]), rtol=0, atol=0)
        model.head.query.given_threshold = 0.999
        assert model.dense([image]).logits[0].max() == -torch.inf
        assert len(model.detect([image])) == 1


def test_weights_of_the_other_parts_do_not_depend_on_the_query() -> None:
    plain, model = tiny.build(), tiny.build(opts=[_HEAD + "QUERY_ON", True])
    added = model.state_dict().keys() - plain.state_dict().keys()
    assert added == {f"head.query.{n}" for n in ("convs.0.weight", "convs.0.bias", "threshold")}
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())


def test_locations_that_are_asked_for() -> None:
    """Location (0, 1) of p3 covers rows 0 and 1, columns 2 and 3 of p2, which has 3 columns."""
    query = Query(4, threshold=0.5)
    asked = query.asked(torch.tensor([[[[-1.0, 1.0], [0.0, -2.0]]]]), (3, 3))
    assert asked.int().tolist() == [[[0, 0, 1], [0, 0, 1], [0, 0, 0]]]


def test_logits_of_p4_count_for_the_locations_that_it_covers() -> None:
    query = Query(2, 2)
    torch.nn.init.ones_(query.convs[1].weight)
    p4 = torch.zeros(1, 2, 2, 2)
    p4[0, 0, 0, 1] = 1.0
    first, both = (
        query([torch.zeros(1, 2, 3, 4)] * 1 + [p4 * 0]),
        query([torch.zeros(1, 2, 3, 4), p4]),
    )
    assert (both - first)[0, 0].round().tolist() == [[1.0] * 4] * 3


def test_targets_are_locations_with_a_positive_window_below() -> None:
    """The windows of p2 around (10, 10) of `assign`'s example lie below 3 locations of p3."""
    windows = Windows.of_strides([4, 8])
    box = torch.tensor([[36.0, 36.0, 44.0, 44.0]])
    assignment = assign([torch.zeros(0, 4), box], windows, [(20, 20), (10, 10)])
    targets = query_targets(assignment)
    assert targets.T.tolist() == [[1, 4, 5], [1, 5, 4], [1, 5, 5]]
    loss = query_loss(torch.full((2, 1, 10, 10), -20.0), targets)
    assert loss.item() == pytest.approx(3 * 0.3 * 20, rel=1e-3)


def test_the_loss_trains_the_query_and_the_tower_of_p3() -> None:
    """FL* of the locations, over the number of positive windows, as the other losses."""
    model = tiny.build(opts=_ON).train()
    image, target = tiny.make_image(64, 96), tiny.target(64, 96, [[20.0, 20.0, 40.0, 44.0]])
    losses = model([image], [target])
    dense = model.dense([image])
    grids = [x.shape[2:] for x in dense.logits]
    assignment = model.criterion.assign([target["boxes"]], grids)
    expected = query_loss(dense.query, query_targets(assignment)) / len(assignment.object)
    assert_close(losses["loss_query"], expected)
    losses["loss_query"].backward()
    weights = model.head.query.convs[0].weight, model.head.cls_subnet[0].weight
    assert all(w.grad.abs().sum() > 0 for w in weights)
    assert model.head.cls_score.weight.grad is None


@pytest.mark.parametrize("opts", [[], [_HEAD + "CLS_LOSS", "varifocal"]])
def test_the_sampled_loss_is_an_unbiased_estimate(opts: list, always_cells, monkeypatch) -> None:
    """The mean over draws of each single block is the loss of the whole level, with gradients."""
    monkeypatch.setattr(sampling, "_BLOCK", 16)
    model = tiny.build(opts=[*_ON, _HEAD + "QUERY_SAMPLE", 0.01, *opts]).double().train()
    torch.nn.init.normal_(model.head.query.convs[0].weight, std=0.3)
    image, target = tiny.make_image(64, 128), tiny.target(64, 128, [[20.0, 20.0, 40.0, 44.0]])
    draws = torch.eye(2, dtype=torch.int64).flip(1)
    results = []
    for sample, orders in (0.0, draws[:1]), (0.01, draws):
        model.query_sample, total = sample, 0.0
        for order in orders:
            monkeypatch.setattr(torch, "randperm", lambda count, order=order: order)
            total = total + model([image], [target])["loss_cls"] / len(orders)
        weights = [*model.head.cls_subnet.parameters(), *model.fpn.parameters()]
        results.append([total, *torch.autograd.grad(total, weights)])
    assert model.dense([image], [target]).sample.drawn.numel() > 0
    assert_close(*results, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "opts, message",
    [
        (["QUERY_LEVELS", ["p4"]], "QUERY_LEVELS"),
        (["NORM", "GN"], "needs all of it"),
        (["QUERY_THRESH", 1.5], "QUERY_THRESH"),
        (["QUERY_SAMPLE", 1.5], "QUERY_SAMPLE"),
        (["NORM", "BN", "QUERY_SAMPLE", 0.1], "batch norm of the towers"),
        (["QUERY_ON", False, "QUERY_SAMPLE", 0.1], "needs a query"),
    ],
)
def test_invalid_options(opts: list, message: str) -> None:
    given = [_HEAD + x if i % 2 == 0 else x for i, x in enumerate(opts)]
    with pytest.raises(UserError, match=message):
        tiny.build(opts=[*_ON, *given])


@pytest.mark.usefixtures("nothing_left_behind")
def test_on_a_gpu_the_host_waits_once_more(always_cells) -> None:
    images = [tiny.make_image(64, 96), tiny.make_image(64, 96, seed=1)]
    waits = []
    with torch.no_grad():
        on_cpu = build("paper's")
        expected = on_cpu.detect(images)
    with torch.no_grad(), pretend() as record:
        for with_query in (False, True):
            model = (
                build("paper's", "cuda")
                if with_query
                else tiny.with_detections(tiny.build(opts=["MODEL.DEVICE", "cuda", *_ON[2:]]))
            )
            if with_query:
                model.load_state_dict(on_cpu.state_dict())
            inputs = [image.pin_memory() for image in images]
            model.detect(inputs)
            record.clear()
            detections = model.detect(inputs)
            assert not record.mixes
            assert not record.unpinned
            waits.append(record.waits.total())
        actual = [read_detection(detection) for detection in detections]
    for name in ("boxes", "scores", "labels"):
        assert_close([d[name] for d in actual], [d[name] for d in expected], rtol=1e-4, atol=1e-4)
    assert waits[1] <= waits[0] + 1, record.waits
