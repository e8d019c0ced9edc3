"""A run does not start with a metric that it never has; the best weights; an AP of 0."""

import math

import pytest
from fakes import interrupted_run, lines, make_cfg

from tensormask.engine import evaluator, run, trainer
from tensormask.engine.callbacks import Callback, EarlyStopping
from tensormask.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


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


def test_an_evaluation_without_matches_says_why(tmp_path, fakes):
    fakes.results = {"bbox": {"AP": 0.0}, "segm": {"AP": 0.001}}
    trainer.train(make_cfg(tmp_path))
    log = (tmp_path / "log.txt").read_text()
    assert log.count("The boxes and masks on fake, which has objects, have an AP of 0.00") == 1
