"""Early stopping, as a callback and by `SOLVER.PATIENCE`."""

import pytest
from fakes import assert_same_bits, interrupted_run, lines, make_cfg, weights

from tensormask.engine import evaluator, trainer
from tensormask.engine.callbacks import Callback, EarlyStopping
from tensormask.engine.resume import load_checkpoint
from tensormask.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

PERIODS = ("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2)


def test_early_stopping(tmp_path, fakes, monkeypatch):
    """Evaluations every 2 steps; the third in a row that is not better is the fifth."""
    scores = iter([20.0, 30.0, 30.0, float("nan"), 29.0, 40.0])
    monkeypatch.setattr(evaluator, "evaluate", lambda *_, **__: {"segm": {"AP": next(scores)}})
    cfg = make_cfg(tmp_path, *PERIODS, "SOLVER.MAX_ITER", 20)
    results = trainer.train(cfg, callbacks=[EarlyStopping("segm/AP", patience=3)])
    assert results == {"segm": {"AP": 29.0}}  # not evaluated twice
    assert load_checkpoint(tmp_path / "model_final.pth")["iteration"] == 9
    assert next(scores) == 40.0
    scores = iter([50.0])
    with pytest.raises(ValueError, match="no metric is 'segm/best_f1'; available: segm/AP"):
        trainer.train(cfg, overwrite=True, callbacks=[EarlyStopping("segm/best_f1")])


PATIENCE = (*PERIODS, "SOLVER.CHECKPOINT_BEST", "segm/AP", "SOLVER.PATIENCE")


def test_patience(tmp_path, fakes, monkeypatch):
    """The second of two evaluations that are not better is the fourth, also of a killed run."""
    scores = [20.0, 30.0, 29.0, 30.0, 40.0]

    def score(*_, **__):
        return {"segm": {"AP": next(values)}}

    monkeypatch.setattr(evaluator, "evaluate", score)
    options = (*PATIENCE, 2, "SOLVER.MAX_ITER", 20)
    for name, kill in ("whole", None), ("resumed", 7):
        cfg, values = make_cfg(tmp_path / name, *options), iter(scores)
        if kill:
            interrupted_run(cfg, monkeypatch, kill)
        trainer.train(cfg, resume=True)
        assert next(values) == 40.0  # each evaluation is done once
        checkpoint = load_checkpoint(tmp_path / name / "model_final.pth")
        assert checkpoint["iteration"] == 7
        assert "segm/AP was not above 30 in 2 evaluations" in checkpoint["run"]["stopped"]
        assert [r["iteration"] for r in lines(tmp_path / name) if "segm/AP" in r] == [1, 3, 5, 7]
    assert_same_bits(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))
    # It is finished, also with another patience; only evaluated.
    values = iter([30.0])
    trainer.train(make_cfg(tmp_path / "whole", *options, "SOLVER.PATIENCE", 9), resume=True)
    log = (tmp_path / "whole" / "log.txt").read_text()
    assert "The run was stopped after 8 iterations (segm/AP was not above 30" in log


@pytest.mark.parametrize(
    "options, message",
    [
        ((*PATIENCE, -1), "PATIENCE is -1"),
        ((*PATIENCE, 2, "TEST.EVAL_PERIOD", 0), "PATIENCE is 2, but TEST.EVAL_PERIOD is 0: set"),
        ((*PATIENCE, 2, "SOLVER.CHECKPOINT_BEST", ""), "but SOLVER.CHECKPOINT_BEST is '': set"),
    ],
)
def test_patience_needs_evaluations_and_a_metric(tmp_path, fakes, options, message):
    with pytest.raises(UserError, match=message):
        trainer.train(make_cfg(tmp_path, *options))


def test_patience_with_another_metric_and_one_of_a_callback(tmp_path, fakes):
    """A metric that is logged counts; the best value of another metric does not."""

    class Logging(Callback):
        def after_evaluation(self, run, metrics):
            run.log("mean", 1.0)

    trainer.train(make_cfg(tmp_path, *PATIENCE, 9), callbacks=[Logging()])
    options = (*PATIENCE, 2, "SOLVER.CHECKPOINT_BEST", "mean", "SOLVER.MAX_ITER", 20)
    trainer.train(make_cfg(tmp_path, *options), resume=True, callbacks=[Logging()])
    state = load_checkpoint(tmp_path / "model_final.pth")["run"]["callbacks"]["EarlyStopping"]
    assert state == {"metric": "mean", "best": 1.0, "num_worse": 2}
