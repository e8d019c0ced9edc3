"""Metrics that a run needs are refused at its start if no evaluation gives them; an AP of 0."""

import json
import math
from types import SimpleNamespace

import pytest
from fakes import interrupted_run, lines, make_cfg
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormask.data import CocoDataset
from tensormask.engine import evaluator, metrics, run, trainer
from tensormask.engine.callbacks import Callback, EarlyStopping
from tensormask.engine.metrics import check_metrics, explain_zero
from tensormask.evaluation.scoring import evaluate_results
from tensormask.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


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


# ---- in a run ----


@pytest.mark.parametrize(
    "options, callbacks",
    [
        (("SOLVER.CHECKPOINT_BEST", "segm/APP"), []),
        (("SOLVER.CHECKPOINT_BEST", "segm/APP"), [EarlyStopping()]),
        (("TEST.EXPECTED_RESULTS", [["segm", "AP", 30.0, 1.0], ["segm", "APP", 1.0, 1.0]]), []),
        ((), [EarlyStopping("segm/APP")]),
    ],
)
def test_a_run_does_not_start_with_a_metric_that_it_never_has(tmp_path, fakes, options, callbacks):
    with pytest.raises(UserError, match=r"'segm/APP', but .* nearest name is segm/AP"):
        trainer.train(make_cfg(tmp_path, *options), callbacks=callbacks)
    assert not (tmp_path / "metrics.json").exists()


def test_a_callback_can_log_the_metric(tmp_path, fakes):
    cfg = make_cfg(tmp_path, "SOLVER.CHECKPOINT_BEST", "mine", "SOLVER.MAX_ITER", 1)
    trainer.train(cfg, callbacks=[Callback()])
    log = (tmp_path / "log.txt").read_text()
    assert "SOLVER.CHECKPOINT_BEST is 'mine', but" in log
    assert "or does a callback log it?" in log


def test_a_metric_that_is_nan_is_said_each_time_and_the_best_file_stays(
    tmp_path, fakes, monkeypatch
):
    scores = iter([math.nan, 20.0, math.nan, 10.0, math.nan, math.nan])
    real = run.evaluate_all
    monkeypatch.setattr(
        run, "evaluate_all", lambda *args: real(*args) and {"segm": {"AP": next(scores)}}
    )
    trainer.train(make_cfg(tmp_path, "TEST.EVAL_PERIOD", 5, "SOLVER.CHECKPOINT_BEST", "segm/AP"))
    log = (tmp_path / "log.txt").read_text()
    assert log.count("segm/AP is NaN") == 4
    assert log.count("is the best so far") == 1
    assert [r["segm/AP"] for r in lines(tmp_path) if "segm/AP" in r][1] == 20.0


def test_a_resume_before_the_best_evaluation_keeps_its_weights(tmp_path, fakes, monkeypatch):
    """The checkpoint is of iteration 9, the best evaluation after iteration 14."""
    scores = iter([10.0, 20.0, 30.0, *[29.0] * 4])
    monkeypatch.setattr(evaluator, "evaluate", lambda *_, **__: {"segm": {"AP": next(scores)}})
    options = ("SOLVER.CHECKPOINT_BEST", "segm/AP", "TEST.EVAL_PERIOD", 5)
    interrupted_run(make_cfg(tmp_path, *options), monkeypatch, 17)
    before = (tmp_path / "model_best.pth").read_bytes()
    trainer.train(make_cfg(tmp_path, *options, "SOLVER.BASE_LR", 0.02), resume=True)
    assert (tmp_path / "model_best.pth").read_bytes() == before


def test_the_best_file_of_an_earlier_run_is_not_listed(tmp_path, fakes):
    (tmp_path / "model_best.pth").touch()
    fakes.results = {"segm": {"AP": math.nan}}
    cfg = make_cfg(tmp_path, "SOLVER.CHECKPOINT_BEST", "segm/AP", "SOLVER.MAX_ITER", 1)
    trainer.train(cfg)
    assert "best weights" not in (tmp_path / "log.txt").read_text()
    fakes.results = {"segm": {"AP": 1.0}}
    trainer.train(cfg, overwrite=True)
    assert "best weights" in (tmp_path / "log.txt").read_text()


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


def test_an_evaluation_without_matches_says_why(tmp_path, fakes):
    fakes.results = {"bbox": {"AP": 0.0}, "segm": {"AP": 0.001}}
    trainer.train(make_cfg(tmp_path))
    log = (tmp_path / "log.txt").read_text()
    assert log.count("The boxes and masks on fake, which has objects, have an AP of 0.00") == 1
