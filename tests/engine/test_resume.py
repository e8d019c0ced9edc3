"""A stopped run resumes as if it had not been stopped; which checkpoints are kept."""

import errno
import os
import signal

import pytest
import torch
from fakes import Interrupted, assert_same_bits, interrupted_run, lines, make_cfg, weights

from tensormask.checkpoint.files import get_description
from tensormask.engine import evaluator, run, trainer
from tensormask.engine import resume as ckpt
from tensormask.engine.precision import set_float32_precision
from tensormask.engine.signals import TrainingStopped
from tensormask.utils.files import DiskFullError
from tensormask.utils.random import set_determinism

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

# Options with state in the checkpoint.
EVERYTHING = (
    *("SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.9),
    *("TEST.EVAL_PERIOD", 5, "SOLVER.OPTIMIZER", "AdamW"),
)


@pytest.fixture
def losses(monkeypatch):
    """The losses by iteration; those of a resumed run replace those of the stopped one."""
    real, seen = trainer.train_step, {}

    def step(state, batch, **options):
        metrics = real(state, batch, **options)
        # As exact text: float16's first scales are too large, and NaN is not equal to itself.
        seen[options["iteration"]] = [repr(metrics[k]) for k in ("total_loss", "grad_norm", "lr")]
        return metrics

    monkeypatch.setattr(trainer, "train_step", step)
    return seen


FLOAT16 = ("SOLVER.AMP.ENABLED", True)
BFLOAT16 = (*FLOAT16, "SOLVER.AMP.DTYPE", "bfloat16")


@pytest.mark.parametrize(
    "stop, more", [(1, ()), (9, BFLOAT16), (10, ()), (17, FLOAT16), (29, BFLOAT16)]
)
def test_a_resumed_run_is_bit_identical(tmp_path, fakes, losses, monkeypatch, stop, more):
    options = (*EVERYTHING, *more)
    trainer.train(make_cfg(tmp_path / "whole", *options))
    expected = dict(losses)
    losses.clear()
    cfg = make_cfg(tmp_path / "parts", *options)
    interrupted_run(cfg, monkeypatch, stop)
    trainer.train(cfg, resume=True)
    assert losses == expected
    whole, parts = (
        ckpt.load_checkpoint(tmp_path / name / "model_final.pth") for name in ("whole", "parts")
    )
    assert_same_bits(whole["model"], parts["model"])
    assert_same_bits(whole["ema"]["model"], parts["ema"]["model"])
    assert whole["ema"]["n_averaged"] == parts["ema"]["n_averaged"] == 30
    for number, state in whole["optimizer"]["state"].items():
        assert_same_bits(state, parts["optimizer"]["state"][number])
    for key in ("scheduler", "scaler", "issues"):
        assert whole[key] == parts[key], key
    if more == FLOAT16:
        assert whole["scaler"]["scale"] > 0
    assert_same_bits(weights(tmp_path / "whole"), whole["model"])
    assert not torch.equal(whole["model"]["out.bias"], whole["ema"]["model"]["out.bias"])
    averages = torch.load(tmp_path / "parts" / "model_final_ema.pth", weights_only=True)
    assert_same_bits(averages["model"], whole["ema"]["model"])
    assert averages["class_names"] == ["star", "ring"]


def test_averages_are_evaluated_too(tmp_path, fakes):
    results = trainer.train(make_cfg(tmp_path, *EVERYTHING))
    assert results == {"segm": {"AP": 30.0}, "ema": {"segm": {"AP": 30.0}}}
    assert lines(tmp_path)[-1] == {"iteration": 29, "segm/AP": 30.0, "ema/segm/AP": 30.0}
    folders = [tmp_path / "inference", tmp_path / "ema" / "inference"]
    assert fakes.evaluations == folders * 6


def test_an_evaluation_without_training_includes_the_averages(tmp_path, fakes, monkeypatch):
    cfg = make_cfg(tmp_path, *EVERYTHING)
    trainer.train(cfg)
    evaluated = []

    def evaluate(model, loader, dataset, folder, **options):
        evaluated.append((folder, model.out.bias.item()))
        return {"segm": {"AP": 20.0 + len(evaluated)}}

    monkeypatch.setattr(evaluator, "evaluate", evaluate)
    results = evaluator.evaluate_only(cfg, resume=True)
    assert results == {"segm": {"AP": 21.0}, "ema": {"segm": {"AP": 22.0}}}
    checkpoint = ckpt.load_checkpoint(tmp_path / "model_final.pth")
    assert evaluated == [
        (tmp_path / "inference", checkpoint["model"]["out.bias"].item()),
        (tmp_path / "ema" / "inference", checkpoint["ema"]["model"]["out.bias"].item()),
    ]


def test_averages_start_from_the_weights_of_a_checkpoint_without_averages(
    tmp_path, fakes, monkeypatch, caplog
):
    interrupted_run(make_cfg(tmp_path), monkeypatch, 12)
    trainer.train(make_cfg(tmp_path, "SOLVER.EMA.ENABLED", True), resume=True)
    checkpoint = ckpt.load_checkpoint(tmp_path / "model_final.pth")
    assert checkpoint["ema"]["n_averaged"] == 1 + 20
    log = (tmp_path / "log.txt").read_text()
    assert "they start from its weights" in log
    assert "applied from iteration 10 on: SOLVER.EMA.ENABLED False -> True" in log


# ---- signals ----


@pytest.mark.parametrize(
    "module, name, stops_at, number",
    [
        (trainer, "train_step", 13, signal.SIGTERM),
        (trainer, "train_step", 29, signal.SIGINT),
        (run, "evaluate_all", 24, signal.SIGTERM),
    ],
    ids=["in a step", "in the last step", "in an evaluation"],
)
def test_a_signal_saves_and_stops(
    tmp_path, fakes, losses, monkeypatch, module, name, stops_at, number
):
    trainer.train(make_cfg(tmp_path / "whole", *EVERYTHING))
    expected = dict(losses)
    losses.clear()

    real = getattr(module, name)

    def with_signal(*args, **options):
        if max(losses, default=-1) == stops_at - (module is trainer):
            os.kill(os.getpid(), number)
        return real(*args, **options)

    monkeypatch.setattr(module, name, with_signal)
    cfg = make_cfg(tmp_path / "parts", *EVERYTHING)
    with pytest.raises(TrainingStopped) as caught:
        trainer.train(cfg)
    monkeypatch.setattr(module, name, real)
    assert caught.value.exit_code == 128 + number
    saved = "model_final.pth" if stops_at == 29 else f"model_{stops_at:07d}.pth"
    assert (tmp_path / "parts" / "last_checkpoint").read_text() == saved
    log = (tmp_path / "parts" / "log.txt").read_text()
    assert f"stopped by {number.name} after {stops_at + 1} iterations; continue with" in log

    trainer.train(cfg, resume=True)
    assert losses == expected
    assert_same_bits(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    evaluated = [r["iteration"] for r in lines(tmp_path / "parts") if "segm/AP" in r]
    assert evaluated == [4, 9, 14, 19, 24, 29]


def test_a_killed_evaluation_is_repeated(tmp_path, fakes, monkeypatch):
    cfg = make_cfg(tmp_path, "TEST.EVAL_PERIOD", 10)
    real = run.evaluate_all

    def killed(*args):
        if len(fakes.evaluations) == 1:
            raise Interrupted
        return real(*args)

    monkeypatch.setattr(run, "evaluate_all", killed)
    with pytest.raises(Interrupted):
        trainer.train(cfg)
    monkeypatch.setattr(run, "evaluate_all", real)
    trainer.train(cfg, resume=True)
    assert [r["iteration"] for r in lines(tmp_path) if "segm/AP" in r] == [9, 19, 29]


# ---- which checkpoints are kept ----


def test_the_last_checkpoints_are_kept(tmp_path, fakes, monkeypatch):
    (tmp_path / "model_0000099.pth").touch()  # of an earlier, longer run
    options = ("SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.CHECKPOINT_MAX_TO_KEEP", 2)
    interrupted_run(make_cfg(tmp_path, *options), monkeypatch, 21)
    names = {path.name for path in tmp_path.glob("*.pth")}
    assert names == {"model_0000015.pth", "model_0000019.pth", "model_0000099.pth"}
    trainer.train(make_cfg(tmp_path, *options), resume=True)
    names = {path.name for path in tmp_path.glob("*.pth")}
    assert names == {f"model_{n}.pth" for n in ("0000023", "0000027", "final", "0000099")}


def test_the_named_last_checkpoint_is_kept(tmp_path):
    for iteration in (4, 9, 14):
        (tmp_path / f"model_{iteration:07d}.pth").touch()
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
    ckpt.remove_old_checkpoints(tmp_path, 1, 14)
    assert {p.name for p in tmp_path.glob("*.pth")} == {"model_0000004.pth", "model_0000014.pth"}


def test_the_best_weights_are_kept(tmp_path, fakes, monkeypatch):
    scores = [float("nan"), 20.0, 30.0, 25.0, 30.0, 29.0]
    real = run.evaluate_all
    monkeypatch.setattr(
        run,
        "evaluate_all",
        lambda *args: real(*args) and {"segm": {"AP": scores[len(fakes.evaluations) - 1]}},
    )
    cfg = make_cfg(tmp_path, "TEST.EVAL_PERIOD", 5, "SOLVER.CHECKPOINT_BEST", "segm/AP")
    interrupted_run(cfg, monkeypatch, 22)  # after the best one, which the resumed run must know
    trainer.train(cfg, resume=True)
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert best["iteration"] == 14
    assert set(best) == {"model", "iteration", "config", "class_names", "category_ids", "versions"}
    assert "segm/AP 30.0000 is the best so far" in (tmp_path / "log.txt").read_text()


def test_the_best_averages_are_kept(tmp_path, fakes):
    trainer.train(make_cfg(tmp_path, *EVERYTHING, "SOLVER.CHECKPOINT_BEST", "ema/segm/AP"))
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert best["iteration"] == 4
    assert not torch.equal(best["model"]["out.bias"], weights(tmp_path)["out.bias"])


@pytest.mark.parametrize("metric", ["segm/AP", "ema/segm/AP"])
def test_score_thresholds_are_in_the_evaluated_checkpoints(tmp_path, fakes, monkeypatch, metric):
    """Weights and averages have their own; a run that was killed in between writes them later."""
    opts = (*EVERYTHING, "SOLVER.CHECKPOINT_BEST", metric)
    thresholds = {"inference": 0.25, "ema": 0.75}
    monkeypatch.setattr(
        evaluator,
        "evaluate",
        lambda model, loader, dataset, folder, **options: {
            "bbox": {"best_f1": 40.0, "best_f1_threshold": 0.5},
            "segm": {
                "AP": 30.0,
                "best_f1": 40.0,
                "best_f1_threshold": thresholds[folder.relative_to(tmp_path).parts[0]],
            },
        },
    )

    def stored(name):
        content = torch.load(tmp_path / name, weights_only=True)
        return content.get("score_threshold"), content

    def killed(*args):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "store_score_thresholds", killed)
        with pytest.raises(Interrupted):
            trainer.train(make_cfg(tmp_path, *opts))
    threshold, before = stored("model_final.pth")
    assert threshold is None
    trainer.train(make_cfg(tmp_path, *opts), resume=True)
    threshold, after = stored("model_final.pth")
    assert threshold == get_description(after)["score_threshold"] == 0.25
    assert after.keys() == before.keys() | {"score_threshold"}
    assert_same_bits(after["model"], before["model"])
    assert_same_bits(after["ema"]["model"], before["ema"]["model"])
    assert stored("model_final_ema.pth")[0] == 0.75
    assert stored("model_best.pth")[0] == (0.75 if "ema" in metric else 0.25)
    assert stored("model_0000019.pth")[0] is None
    thresholds["inference"] = 0.5
    evaluator.evaluate_only(make_cfg(tmp_path, *opts), resume=True)
    (tmp_path / "last_checkpoint").write_text("model_0000019.pth")
    thresholds["inference"] = 0.1  # of other weights than those in model_final.pth
    evaluator.evaluate_only(make_cfg(tmp_path, *opts), resume=True)
    assert [stored(name)[0] for name in ("model_final.pth", "model_final_ema.pth")] == [0.5, 0.75]


# ---- errors ----


def test_a_full_disk_does_not_change_the_last_checkpoint(tmp_path, fakes, losses, monkeypatch):
    trainer.train(make_cfg(tmp_path / "whole"))
    expected = dict(losses)
    real = torch.save

    def full(content, file):
        if content["iteration"] == 19:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(content, file)

    monkeypatch.setattr(ckpt.torch, "save", full)
    cfg = make_cfg(tmp_path / "parts")
    with pytest.raises(DiskFullError, match="model_0000019"):
        trainer.train(cfg)
    folder = tmp_path / "parts"
    assert (folder / "last_checkpoint").read_text() == "model_0000009.pth"
    assert not list(folder.glob(".*.tmp"))
    monkeypatch.setattr(ckpt.torch, "save", real)
    trainer.train(cfg, resume=True)
    assert losses == expected


def test_issues_are_restored_by_a_resume(tmp_path, fakes, monkeypatch):
    fakes.broken_at = (4, 25)
    cfg = make_cfg(tmp_path, "DATASETS.TEST", "('a',)")
    interrupted_run(cfg, monkeypatch, 12)
    fakes.issues.counts.clear()  # as in a new process
    fakes.issues.first_ids.clear()
    fakes.issues._seen.clear()
    trainer.train(cfg, resume=True)
    found = [record["issues"] for record in lines(tmp_path) if "issues" in record][-1]
    assert found["a"]["image_broken"] == {"count": 2, "first_ids": [4, 25]}


def test_weights_to_start_from_that_are_not_finite(tmp_path, fakes):
    bad = trainer.build_model(None)
    bad.out.bias.data.fill_(float("inf"))
    torch.save({"model": bad.state_dict()}, tmp_path / "bad.pth")
    cfg = make_cfg(tmp_path / "run", "MODEL.WEIGHTS", str(tmp_path / "bad.pth"))
    for use in (trainer.train, evaluator.evaluate_only):
        with pytest.raises(ValueError, match=r"Not finite in .*bad\.pth: out\.bias; use other"):
            use(cfg)


def test_algorithms_and_precision_follow_their_keys(tmp_path, fakes):
    try:
        trainer.train(make_cfg(tmp_path, "DETERMINISTIC", True, "FLOAT32_PRECISION", "high"))
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_float32_matmul_precision() == "high"
        trainer.train(make_cfg(tmp_path, "CUDNN_BENCHMARK", True))
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cudnn.benchmark
    finally:
        set_determinism(deterministic=False, benchmark=False)
        set_float32_precision("")


def test_a_run_ends_with_a_table(tmp_path, fakes, caplog):
    trainer.train(make_cfg(tmp_path, *EVERYTHING))
    log = (tmp_path / "log.txt").read_text()
    for row in ("iterations   0 to 30", "segm/AP      30.00", "ema/segm/AP  30.00"):
        assert row in log
