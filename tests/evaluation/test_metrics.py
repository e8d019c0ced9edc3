"""Names of metrics that no evaluation gives are refused; an AP of 0 is explained."""

import json
import math
from types import SimpleNamespace

import pytest
from fakes import make_cfg
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormask.data import CocoDataset
from tensormask.evaluation import metrics
from tensormask.evaluation.metrics import check_metrics, explain_zero
from tensormask.evaluation.scoring import evaluate_results
from tensormask.utils.errors import UserError


def a_set(name, classes, *, scored=True):
    return SimpleNamespace(
        name=name,
        class_names=classes,
        category_ids=list(range(len(classes))),
        has_annotations=scored,
    )


SETS = {
    "a": a_set("a", ["star", "ring"]),
    "x/b.json@y": a_set("x/b.json@y", ["ring"]),
    "dev": a_set("dev", ["star", "ring"], scored=False),
}


def check(wanted, *options, evaluators=(), **more):
    cfg = make_cfg("unused", *options)
    test_sets = [SETS[name] for name in cfg.DATASETS.TEST]
    check_metrics(cfg, test_sets, [("KEY", wanted)], evaluators=evaluators, **more)


def sharpness(model, dataset, folder):
    return {}


A, TWO = ("DATASETS.TEST", "('a',)"), ("DATASETS.TEST", "('a', 'x/b.json@y')")
EMA, ORACLE = ("SOLVER.EMA.ENABLED", True), ("TEST.ORACLE_ON", True)
NO_MASKS = ("MODEL.MASK_ON", False)


@pytest.mark.parametrize(
    "options, given, refused",
    [
        (A, ["segm/AP", "bbox/APl", "segm/AP-ring", "bbox/best_f1"], ["segm/AP-Ring", "AP", ""]),
        (NO_MASKS + A, ["bbox/AP"], ["segm/AP"]),
        (TWO, ["a/segm/AP-star", "x/b.json@y/bbox/AP"], ["segm/AP", "x/b.json@y/segm/AP-star"]),
        (EMA + TWO, ["ema/a/segm/AP", "a/segm/AP"], ["ema/segm/AP", "a/ema/segm/AP"]),
        (A, ["sharpness/mean"], ["ema/sharpness/mean", "sharp/mean", "sharpness"]),
        (EMA + A, ["ema/sharpness/mean"], ["ema/blur/x"]),
        (ORACLE + A, ["oracle/APs"], ["oracle/segm/AP"]),
        (ORACLE + NO_MASKS + A, ["bbox/AP"], ["oracle/AP"]),
        (("TEST.BOUNDARY_AP", True, *A), ["boundary/AP"], []),
        ((*NO_MASKS, "TEST.BOUNDARY_AP", True, *A), [], ["boundary/AP"]),
        (("TEST.MAX_DETS", 300, *A), ["segm/AP@300", "bbox/AR@300"], ["segm/AP@100"]),
        (("DATASETS.TEST", "('dev',)"), [], ["segm/AP"]),
        (("DATASETS.TEST", "('dev', 'a')"), ["a/segm/AP"], ["dev/segm/AP"]),
        (("DATASETS.TEST", "()"), [], ["segm/AP"]),
    ],
)
def test_names_of_metrics(options, given, refused):
    for name in given:
        check(name, *options, evaluators=[sharpness])
    for name in refused:
        with pytest.raises(UserError, match="KEY is"):
            check(name, *options, evaluators=[sharpness])


@pytest.mark.parametrize(
    "name, options, reason",
    [
        ("segm/APP", A, "nearest name is segm/AP. Known: bbox/AP, bbox/AP50"),
        ("segm/AP-stars", A, "nearest name is segm/AP-star."),
        ("segm/AP", (*NO_MASKS, *A), r"nearest name is bbox/AP \(MODEL.MASK_ON is False\)"),
        ("ema/segm/AP", A, r"nearest name is segm/AP \(SOLVER.EMA.ENABLED is False\)"),
        ("boundary/AP", A, r"nearest name is .* \(TEST.BOUNDARY_AP is False\)"),
        ("segm/AP", TWO, "nearest name is a/segm/AP"),
        ("segm/AP", ("DATASETS.TEST", "()"), "DATASETS.TEST is empty"),
        ("segm/AP", ("DATASETS.TEST", "('dev',)"), "no set in DATASETS.TEST has annotations"),
    ],
)
def test_a_refusal_names_the_nearest_metric_and_the_reason(name, options, reason):
    with pytest.raises(UserError, match=reason):
        check(name, *options)


@pytest.mark.parametrize("names", [["star", "ring"], ["ring"], ["ring", "ring"]])
@pytest.mark.parametrize("max_dets", [100, 7])
def test_the_names_are_those_that_an_evaluation_gives(tmp_path, names, max_dets):
    categories = [{"id": 3 + 2 * i, "name": name} for i, name in enumerate(names)]
    box = {"bbox": [1, 1, 5, 5], "area": 25, "segmentation": [[1, 1, 6, 1, 6, 6, 1, 6]]}
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 9, "height": 9}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "iscrowd": 0, **box}],
        "categories": categories,
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    dataset = CocoDataset("set", tmp_path / "a.json", tmp_path)
    results = evaluate_results(
        dataset.to_coco(),
        [{"image_id": 1, "category_id": 3, "score": 0.5, "bbox": box["bbox"]}],
        dataset.class_names,
        category_ids=dataset.category_ids,
        iou_types=["bbox"],
        max_dets=max_dets,
    )
    cfg = make_cfg("unused", *A, "TEST.MAX_DETS", max_dets)
    known = metrics._metrics_of_set(cfg, dataset, False)
    assert {f"{task}/{name}" for task in ("bbox", "segm") for name in results["bbox"]} == {*known}


# ---- an AP of 0 ----


@settings(max_examples=60, deadline=None)
@given(box=st.none() | st.floats(0, 100), mask=st.none() | st.floats(0, 100))
def test_an_ap_of_zero_is_explained_in_one_line(box, mask):
    """None: no objects, or no masks."""
    results = {"bbox": {"AP": math.nan if box is None else box}}
    if mask is not None:
        results["segm"] = {"AP": mask}
    messages = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.logger, "warning", lambda text, *args: messages.append(text % args))
        explain_zero("val", results)
    zeros = [f"{value:.2f}" == "0.00" for value in (box, mask) if value is not None]
    assert len(messages) == any(zeros)
    for message in messages:
        assert "val" in message
        assert "Likely causes: " in message
        assert "\n" not in message
