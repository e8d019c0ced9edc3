"""Callbacks, evaluators, mappers, loaders and models of a user's own in `train`."""

import itertools
import re
import signal
from collections import OrderedDict
from pathlib import Path

import fork
import numpy as np
import pytest
import torch
from fakes import (
    FakeModel,
    assert_same_bits,
    fake_loader,
    lines,
    make_cfg,
    weights,
)

from tensormask.config import get_cfg
from tensormask.data import build_train_loader
from tensormask.data.shapes import write_split
from tensormask.engine import distributed, evaluator, trainer
from tensormask.engine.callbacks import Callback, EarlyStopping
from tensormask.engine.resume import load_checkpoint
from tensormask.engine.signals import TrainingStopped

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

PERIODS = ("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2)


class Recorder(Callback):
    """Write all calls to a list, and count the steps."""

    def __init__(self):
        self.calls, self.num_steps = [], 0

    def before_step(self, run, batch):
        self.calls.append(("before step", run.done, len(batch)))

    def after_step(self, run, metrics):
        self.num_steps += 1
        self.calls.append(("after step", run.done, sorted(metrics)[-1]))

    def before_evaluation(self, run):
        self.calls.append(("before evaluation", run.done))

    def after_evaluation(self, run, metrics):
        self.calls.append(("after evaluation", run.done, dict(metrics)))

    def before_checkpoint(self, run):
        self.calls.append(("before checkpoint", run.done))

    def after_checkpoint(self, run, path):
        assert path.is_file()
        self.calls.append(("after checkpoint", run.done, path.name))

    def state_dict(self):
        return OrderedDict(num_steps=self.num_steps)  # as of a module

    def load_state_dict(self, state):
        self.num_steps = state["num_steps"]


class StopAt(Callback):
    def __init__(self, done):
        self.done = done

    def after_step(self, run, metrics):
        if run.done == self.done:
            run.stop("that is enough")


def test_callbacks_are_called_in_order(tmp_path, fakes):
    recorder = Recorder()
    trainer.train(make_cfg(tmp_path / "with", *PERIODS, "SOLVER.MAX_ITER", 3), callbacks=[recorder])
    evaluation = [("before evaluation",), ("after evaluation", {"segm/AP": 30.0})]
    steps = {i: [("before step", i - 1, 4), ("after step", i, "total_loss")] for i in (1, 2, 3)}
    assert recorder.calls == [
        *(*steps[1], *steps[2]),
        *(("before checkpoint", 2), ("after checkpoint", 2, "model_0000001.pth")),
        *((name, 2, *rest) for name, *rest in evaluation),
        *steps[3],
        *(("before checkpoint", 3), ("after checkpoint", 3, "model_final.pth")),
        *((name, 3, *rest) for name, *rest in evaluation),
    ]
    trainer.train(make_cfg(tmp_path / "without", *PERIODS, "SOLVER.MAX_ITER", 3))
    assert_same_bits(weights(tmp_path / "with"), weights(tmp_path / "without"))


def test_metrics_of_callbacks_are_logged(tmp_path, fakes):
    """With the median of the steps since the last record, or among the results."""

    class Logging(Callback):
        def after_step(self, run, metrics):
            run.log("size", run.done)

        def after_evaluation(self, run, metrics):
            run.log("mean", metrics["segm/AP"] / run.done)

    cfg = make_cfg(tmp_path, "SOLVER.CHECKPOINT_BEST", "mean")
    trainer.train(cfg, callbacks=[Logging()])
    first, second, result = lines(tmp_path)
    assert (first["size"], second["size"]) == (10.5, 25.5)
    assert result == {"iteration": 29, "segm/AP": 30.0, "mean": 1.0}
    assert (tmp_path / "model_best.pth").is_file()


@pytest.mark.parametrize("name", ["lr", "max_mem", "eta_seconds", "iteration", "issues"])
def test_a_metric_with_a_name_that_is_taken(tmp_path, fakes, name):
    class Logging(Callback):
        def after_step(self, run, metrics):
            run.log(name, 1.0)

    with pytest.raises(ValueError, match=f"other names than {name}"):
        trainer.train(make_cfg(tmp_path), callbacks=[Logging()])


def test_a_stopped_run_ends_like_a_finished_one(tmp_path, fakes):
    cfg = make_cfg(tmp_path, *PERIODS)
    trainer.train(cfg, callbacks=[StopAt(3)])
    checkpoint = load_checkpoint(tmp_path / "model_final.pth")
    assert checkpoint["iteration"] == 2
    assert [r["iteration"] for r in lines(tmp_path) if "segm/AP" in r] == [1, 2]
    log = (tmp_path / "log.txt").read_text()
    assert log.count("Stopped after 3 iterations: that is enough") == 1
    assert "iterations   0 to 3\nstopped      that is enough" in log
    before = len(fakes.evaluations)
    trainer.train(cfg, resume=True)  # without the callback
    assert load_checkpoint(tmp_path / "model_final.pth")["iteration"] == 2
    assert len(fakes.evaluations) == before + 1
    trainer.train(make_cfg(tmp_path / "whole", *PERIODS), callbacks=[StopAt(6)])
    assert load_checkpoint(tmp_path / "whole" / "model_final.pth")["run"]["stopped"] is None


@pytest.mark.parametrize("where", ["step", "evaluation", "after evaluation", "before a save"])
def test_the_state_of_callbacks_is_restored(tmp_path, fakes, monkeypatch, where):
    """Each evaluation counts once, wherever the run was stopped."""
    cfg = make_cfg(tmp_path, *PERIODS, "SOLVER.MAX_ITER", 9)
    if where == "before a save":
        cfg.SOLVER.CHECKPOINT_PERIOD = 50
    real, stops = evaluator.evaluate, iter([True])

    class Count(Callback):
        def __init__(self):
            self.evaluated = []

        def after_step(self, run, metrics):
            if run.done == 5 and where == "step":
                signal.raise_signal(signal.SIGTERM)

        def after_evaluation(self, run, metrics):
            self.evaluated.append(run.done)
            is_after = where in ("after evaluation", "before a save")
            if run.done == 4 and is_after and next(stops, False):
                signal.raise_signal(signal.SIGTERM)

        def state_dict(self):
            return {"evaluated": self.evaluated}

        def load_state_dict(self, state):
            self.evaluated = state["evaluated"]

    def evaluate(*args, **options):
        if len(fakes.evaluations) == 1 and where == "evaluation" and next(stops, False):
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **options)

    monkeypatch.setattr(evaluator, "evaluate", evaluate)
    with pytest.raises(TrainingStopped):
        trainer.train(cfg, callbacks=[stopped := Recorder(), Count()])
    saved = [call[2] for call in stopped.calls if call[0] == "after checkpoint"]
    assert len(set(saved)) == len(saved)  # none twice
    recorder, count = Recorder(), Count()
    trainer.train(cfg, resume=True, callbacks=[recorder, count])
    assert recorder.num_steps == 9
    assert count.evaluated == [2, 4, 6, 8, 9]
    assert [r["iteration"] for r in lines(tmp_path) if "segm/AP" in r] == [1, 3, 5, 7, 8]


def test_an_evaluation_after_the_last_checkpoint(tmp_path, fakes, monkeypatch):
    """The state in the checkpoint is older than the evaluation, which is not repeated."""

    class Interrupting(EarlyStopping):
        def before_step(self, run, batch):
            if run.done == 4:
                raise KeyboardInterrupt

    cfg = make_cfg(tmp_path, *PERIODS)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(cfg, callbacks=[Interrupting("segm/AP", 2)])
    assert len(fakes.evaluations) == 2
    interrupting = Interrupting("segm/AP", 3)
    interrupting.before_step = lambda run, batch: None
    trainer.train(cfg, resume=True, callbacks=[interrupting])
    assert len(fakes.evaluations) == 3
    assert interrupting.num_worse == 2


def test_other_callbacks_than_before(tmp_path, fakes):
    cfg = make_cfg(tmp_path, "SOLVER.MAX_ITER", 2)
    trainer.train(cfg, callbacks=[Recorder(), StopAt(9), Recorder()])
    new = [Recorder(), EarlyStopping()]
    trainer.train(cfg, resume=True, callbacks=new)
    assert new[0].num_steps == 2
    log = (tmp_path / "log.txt").read_text()
    assert "Callbacks without a state in the checkpoint: EarlyStopping\n" in log
    assert "The run had callbacks that it has not now: Recorder_2, StopAt\n" in log


def test_a_state_that_could_not_be_read_is_not_saved(tmp_path, fakes):
    class Wrong(Callback):
        def state_dict(self):
            return {"best": [np.float64(3)]}

    with pytest.raises(ValueError, match=r"Wrong\.state_dict\(\)"):
        trainer.train(make_cfg(tmp_path), callbacks=[Wrong()])


def test_the_example_of_the_docs(tmp_path, fakes):
    page = (Path(__file__).parents[2] / "docs" / "extending_trainer.md").read_text()
    (code,) = re.findall(r"## Reference.*?```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / "coco_instances_results.json").write_text("[1, 2]")
    exec(code, {"cfg": make_cfg(tmp_path, "SOLVER.MAX_ITER", 2)})
    step, result = lines(tmp_path)
    assert step["weight_norm"] > 0
    assert result["num_detections/per_image"] == 2 / 7


def test_evaluators(tmp_path, fakes):
    seen, metrics = [], {"F": torch.tensor(0.5), "small": {"F": 1}}

    def boundary(model, dataset, folder):
        assert not model.training
        assert not torch.is_grad_enabled()
        seen.append((len(dataset), folder))
        return metrics

    cfg = make_cfg(tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.EMA.ENABLED", True)
    results = trainer.train(cfg, evaluators=[boundary])
    own = {"segm": {"AP": 30.0}, "boundary": {"F": 0.5, "small/F": 1.0}}
    assert results == {**own, "ema": own}
    assert lines(tmp_path)[-1]["ema/boundary/F"] == 0.5
    assert seen == [(7, tmp_path / "inference"), (7, tmp_path / "ema" / "inference")]
    assert evaluator.evaluate_only(cfg, resume=True, evaluators=[boundary])["boundary"]["F"] == 0.5
    for wrong in None, 0.5, {"F": "high"}:
        metrics = wrong
        with pytest.raises(ValueError, match="boundary must return a dict of numbers, got"):
            evaluator.evaluate_only(cfg, resume=True, evaluators=[boundary])
    boundary.__name__ = "segm"
    with pytest.raises(ValueError, match="are named segm"):
        evaluator.evaluate_only(cfg, resume=True, evaluators=[boundary])


def test_an_own_model_and_an_own_loader(tmp_path, fakes):
    """The loader ends after 3 batches, and needs no names of files; no training set is named."""
    cfg = make_cfg(tmp_path, "SOLVER.MAX_ITER", 7, "DATASETS.TRAIN", "()", "MODEL.WEIGHTS", "x")
    batches = list(itertools.islice(fake_loader(cfg, 0), 3))
    loader = [[{key: s[key] for key in ("image", "target")} for s in b] for b in batches]
    images = []

    class Images(Callback):
        def before_step(self, run, batch):
            images.append(batch[0]["image"])

    model = FakeModel()
    trainer.train(cfg, model=model, train_loader=loader, callbacks=[Images()])
    assert_same_bits(model.state_dict(), weights(tmp_path))
    order = [loader[i % 3][0]["image"] for i in range(7)]
    assert all(image is expected for image, expected in zip(images, order, strict=True))
    with pytest.raises(ValueError, match="train_loader has no batch"):
        trainer.train(cfg, overwrite=True, model=model, train_loader=iter(()))
    sample = loader[0][0]
    for batch in (sample, sample), sample, [], [None], [{"target": {}, "issues": [1]}]:
        with pytest.raises(ValueError, match="must be a list of dicts with image and target"):
            trainer.train(cfg, overwrite=True, model=model, train_loader=[batch])
    model.num_classes = 3
    with pytest.raises(ValueError, match=r"has 3 classes, but .* is 2"):
        trainer.train(cfg, model=model, train_loader=loader)
    with pytest.raises(ValueError, match="apply it in train_loader"):
        trainer.train(cfg, train_loader=loader, mapper=darken)
    assert "MODEL.WEIGHTS is not loaded" in (tmp_path / "log.txt").read_text()


def darken(sample, rng):
    sample["image"] = sample["image"] // 2
    sample["number"] = rng.integers(1000)
    return sample


def test_a_mapper_changes_samples(tmp_path):
    cfg = get_cfg()
    write_split("train", 4, tmp_path)
    cfg.merge_from_list(
        [
            *("DATASETS.TRAIN", (f"{tmp_path}/annotations.json@{tmp_path}/images",)),
            "MODEL.TENSOR_MASK.NUM_CLASSES",
            6,
            "INPUT.MIN_SIZE_TRAIN",
            (64,),
            "SOLVER.IMS_PER_BATCH",
            2,
            "SEED",
            3,
            "DATALOADER.NUM_WORKERS",
            0,
        ]
    )

    def batches(start, num, **options):
        loader = build_train_loader(cfg, start, **options)
        return list(itertools.islice(loader, num))

    plain, mapped = batches(0, 3), batches(0, 3, mapper=darken)
    numbers = []
    for one, other in zip(itertools.chain(*plain), itertools.chain(*mapped), strict=True):
        assert torch.equal(one["image"] // 2, other["image"])
        numbers.append(other["number"])
    assert len(set(numbers)) == 6
    (resumed,) = batches(2, 1, mapper=darken)
    assert [sample["number"] for sample in resumed] == numbers[4:]


@pytest.mark.parametrize("by", ["a callback", "patience"])
def test_a_stop_on_one_rank_stops_all(tmp_path, fakes, by):
    class OneRank(Callback):
        def after_step(self, run, metrics):
            if run.done == 2 and distributed.get_rank() == 1:
                run.stop("enough")

    def run():
        torch.set_num_threads(1)
        distributed.start("cpu")
        if by == "patience":
            patience = "SOLVER.CHECKPOINT_BEST", "segm/AP", "SOLVER.PATIENCE", 1
            trainer.train(make_cfg(tmp_path, *PERIODS, *patience))
        else:
            trainer.train(make_cfg(tmp_path, *PERIODS), callbacks=[OneRank()])
        distributed.stop()
        return 0

    assert fork.run_in_ranks(run) == [0, 0]
    checkpoint = load_checkpoint(tmp_path / "model_final.pth")
    iteration, reason = (3, "not above 30 in 1") if by == "patience" else (1, "enough")
    assert checkpoint["iteration"] == iteration
    assert reason in checkpoint["run"]["stopped"]
