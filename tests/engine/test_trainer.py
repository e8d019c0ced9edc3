"""The training loop, with a small model and loader of known behavior."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from fakes import FakeModel, assert_same_bits, interrupted_run, lines, make_cfg, weights

from tensormask.engine import evaluator, trainer
from tensormask.engine.anomaly import NonFiniteError
from tensormask.engine.resume import load_checkpoint
from tensormask.evaluation import UnexpectedResultsError

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def test_output_of_a_run(tmp_path, fakes):
    results = trainer.train(make_cfg(tmp_path))
    assert results == {"segm": {"AP": 30.0}}
    names = {path.name for path in tmp_path.iterdir() if "tfevents" not in path.name}
    assert names == {
        *("config.yaml", "environment.txt", "log.txt", "metrics.json", "last_checkpoint", ".lock"),
        *("model_0000009.pth", "model_0000019.pth", "model_final.pth"),
    }
    assert any("tfevents" in path.name for path in tmp_path.iterdir())
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert load_checkpoint(tmp_path / "model_0000009.pth")["iteration"] == 9
    assert load_checkpoint(tmp_path / "model_final.pth")["class_names"] == ["star", "ring"]
    first, second, result = lines(tmp_path)
    assert (first["iteration"], second["iteration"]) == (19, 29)
    assert second["lr"] == pytest.approx(0.001)
    assert {"total_loss", "loss_cls", "loss_mask", "time", "data_time", "grad_norm"} <= set(first)
    assert result == {"iteration": 29, "segm/AP": 30.0}
    log = (tmp_path / "log.txt").read_text()
    assert "iterations 0 to 30, 4 images each, on cpu; 7 images in a" in log
    assert "iter: 20/30" in log


def test_same_seed_same_bits_and_another_seed_others(tmp_path, fakes):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        trainer.train(make_cfg(tmp_path / name, "SEED", seed))
    assert_same_bits(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not torch.equal(weights(tmp_path / "a")["out.bias"], weights(tmp_path / "c")["out.bias"])


def test_resume_uses_the_random_seed_of_the_run(tmp_path, fakes, monkeypatch):
    cfg = make_cfg(tmp_path, "SEED", -1)
    interrupted_run(cfg, monkeypatch, 15)
    seed = yaml.safe_load((tmp_path / "config.yaml").read_text())["SEED"]
    assert seed >= 0
    assert f"Seed: {seed}" in (tmp_path / "log.txt").read_text()
    trainer.train(cfg, resume=True)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["SEED"] == seed
    assert cfg.SEED == -1


def test_a_finished_run_is_only_evaluated(tmp_path, fakes):
    trainer.train(make_cfg(tmp_path))
    before = (tmp_path / "model_final.pth").stat().st_mtime_ns
    fakes.results = {"segm": {"AP": 31.0}}
    assert trainer.train(make_cfg(tmp_path), resume=True) == {"segm": {"AP": 31.0}}
    assert (tmp_path / "model_final.pth").stat().st_mtime_ns == before
    assert [r["iteration"] for r in lines(tmp_path) if "total_loss" in r] == [19, 29]


def test_a_new_run_is_not_resumed_from_an_old_one(tmp_path, fakes, monkeypatch):
    trainer.train(make_cfg(tmp_path))
    interrupted_run(make_cfg(tmp_path, "SEED", 6), monkeypatch, 3, overwrite=True)
    assert not (tmp_path / "last_checkpoint").exists()
    trainer.train(make_cfg(tmp_path, "SEED", 6), resume=True)
    assert [r["iteration"] for r in lines(tmp_path)] == [19, 29, 29]


def test_a_run_is_not_overwritten(tmp_path, fakes, monkeypatch):
    first, second, third = (tmp_path / name for name in ("run", "run_2", "run_3"))
    link = tmp_path / "run_latest"
    trainer.train(make_cfg(first), resume=True)  # there is nothing to resume
    assert link.readlink() == Path("run")
    before = {path: path.read_bytes() for path in first.iterdir()}
    # A run that has no checkpoint yet is a run too.
    interrupted_run(make_cfg(first, "SEED", 6), monkeypatch, 3)
    assert link.readlink() == Path("run_2")
    trainer.train(make_cfg(first, "SEED", 7))
    with pytest.raises(ValueError, match="MAX_DETS is 0"):
        trainer.train(make_cfg(first, "TEST.MAX_DETS", 0))
    assert sorted(tmp_path.iterdir()) == [first, second, third, link]
    assert {path: path.read_bytes() for path in first.iterdir()} == before
    assert link.readlink() == Path("run_3")
    assert yaml.safe_load((third / "config.yaml").read_text())["OUTPUT_DIR"] == str(third)
    log = (third / "log.txt").read_text()
    assert f"{first} holds another run, so this run is in {third}" in log
    assert f"weights      {third / 'model_final.pth'}" in log

    trainer.train(make_cfg(second, "SEED", 6), resume=True)  # it is continued where it is
    assert "SEED: 6" in load_checkpoint(second / "model_final.pth")["config"]
    trainer.train(make_cfg(first, "SEED", 8), overwrite=True)
    assert "SEED: 8" in load_checkpoint(first / "model_final.pth")["config"]
    assert len(lines(first)) == 3
    assert link.readlink() == Path("run")
    assert sorted(tmp_path.iterdir()) == [first, second, third, link]


def test_several_test_sets(tmp_path, fakes):
    cfg = make_cfg(tmp_path, "DATASETS.TEST", "('a', 'x/b.json@y')", "SOLVER.MAX_ITER", 1)
    results = trainer.train(cfg)
    assert results == {"a": {"segm": {"AP": 30.0}}, "x/b.json@y": {"segm": {"AP": 30.0}}}
    folder = tmp_path / "inference"
    assert fakes.evaluations == [folder / "a", folder / "x_b.json_y"]
    assert "x/b.json@y/segm/AP" in lines(tmp_path)[-1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, fakes, monkeypatch, value):
    seen = {}

    class Breaking(FakeModel):
        def forward(self, images, targets):
            losses = super().forward(images, targets)
            seen["count"] = seen.get("count", 0) + 1
            if seen["count"] == 13:
                seen["weights"] = {k: v.clone() for k, v in self.named_parameters()}
                seen["model"] = self
                losses["loss_mask"] = losses["loss_mask"] * value
            return losses

    monkeypatch.setattr(trainer, "build_model", lambda cfg, **options: Breaking())
    pattern = rf"iteration 12: loss_cls \d\S*, loss_mask {value:g}\. .*12_0\.png, 12_1\.png"
    with pytest.raises(NonFiniteError, match=pattern):
        trainer.train(make_cfg(tmp_path))
    assert_same_bits(dict(seen["model"].named_parameters()), seen["weights"])
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000009.pth"


def test_expected_results_are_checked_with_and_without_training(tmp_path, fakes):
    expected = ("TEST.EXPECTED_RESULTS", [["segm", "AP", 31.0, 1.5]])
    trainer.train(make_cfg(tmp_path, *expected))
    evaluator.evaluate_only(make_cfg(tmp_path, *expected), resume=True)
    fakes.results = {"segm": {"AP": 29.0}}
    with pytest.raises(UnexpectedResultsError):
        evaluator.evaluate_only(make_cfg(tmp_path, *expected), resume=True)
    with pytest.raises(UnexpectedResultsError):
        trainer.train(make_cfg(tmp_path, *expected))


def test_an_evaluation_needs_weights(tmp_path, fakes):
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS"):
        evaluator.evaluate_only(make_cfg(tmp_path))


def test_issues_are_logged_as_they_are_detected(fakes, tmp_path):
    fakes.issues.add("box_empty", 3)
    fakes.broken_at = (4, 25)
    trainer.train(make_cfg(tmp_path, "DATASETS.TEST", "('a',)"))
    known = {"box_empty": {"count": 1, "first_ids": [3]}}
    found = {"count": 1, "first_ids": [4]}, {"count": 2, "first_ids": [4, 25]}
    assert [line for line in lines(tmp_path) if "issues" in line] == [
        {"iteration": 0, "issues": {"a": known}},
        {"iteration": 19, "issues": {"a": {"image_broken": found[0], **known}}},
        {"iteration": 29, "issues": {"a": {"image_broken": found[1], **known}}},
    ]
    log = (tmp_path / "log.txt").read_text()
    assert "a has 1 issues" in log
    assert log.count("1  image_broken") == 1  # at once
    assert log.count("2  image_broken") == 1  # at the end


def test_strict_stops_at_the_first_issue(fakes, tmp_path):
    fakes.broken_at = (7,)
    with pytest.raises(ValueError, match=r"(?s)a has issues.*image_broken.*Ids: 7"):
        trainer.train(make_cfg(tmp_path, "DATASETS.STRICT", True))
    fakes.issues.add("box_empty", 3)
    with pytest.raises(ValueError, match="box_empty"):
        evaluator.evaluate_only(make_cfg(tmp_path, "DATASETS.STRICT", True))


def test_unreadable_images_only(fakes, tmp_path, monkeypatch):
    def loader(cfg, start_iteration=0, **processes):
        yield [{"image": None, "issues": [("a", "image_missing", i) for i in range(100)]}]

    monkeypatch.setattr(trainer, "build_train_loader", loader)
    with pytest.raises(ValueError, match="100 consecutive images cannot be read"):
        trainer.train(make_cfg(tmp_path))


def test_the_evaluation_is_checked_before_training(fakes, tmp_path):
    """An invalid config does not change the files of an earlier run."""
    trainer.train(make_cfg(tmp_path))
    for opts, message in [
        (("TEST.MAX_DETS", 0), "MAX_DETS is 0"),
        (("INPUT.MIN_SIZE_TEST", -5), "pixels"),
        (("MODEL.TENSOR_MASK.NUM_CLASSES", 3), "NUM_CLASSES 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer.train(make_cfg(tmp_path, *opts))
    assert (tmp_path / "last_checkpoint").is_file()
    assert len(lines(tmp_path)) == 3


def test_an_evaluation_needs_no_training_data(fakes, tmp_path, monkeypatch):
    trainer.train(make_cfg(tmp_path))
    test_set = evaluator.get_dataset("b")
    monkeypatch.setattr(evaluator, "get_dataset", {"b": test_set}.__getitem__)
    config = (tmp_path / "config.yaml").read_bytes()
    cfg = make_cfg(tmp_path, "TEST.MAX_DETS", 7)
    assert evaluator.evaluate_only(cfg, resume=True) == fakes.results
    assert (tmp_path / "config.yaml").read_bytes() == config  # of the training
