"""A resumed run with another config: what is named as applied is applied, the rest is said."""

import pytest
import torch
from fakes import FakeModel, interrupted_run, lines, make_cfg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensormask.engine import resume as ckpt
from tensormask.engine import trainer
from tensormask.engine.callbacks import Callback
from tensormask.utils.errors import UserError
from tensormask.utils.random import seed_everything

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

# Equal values merge the groups of weights, biases and norms; different ones split them.
DECAYS = st.sampled_from([0.0, 1e-4, 0.05])
SOLVERS = st.fixed_dictionaries(
    {
        "BASE_LR": st.sampled_from([1e-5, 0.001, 0.1]),
        "BIAS_LR_FACTOR": st.sampled_from([1.0, 2.0]),
        "WEIGHT_DECAY": DECAYS,
        "WEIGHT_DECAY_NORM": DECAYS,
        "WEIGHT_DECAY_BIAS": st.none() | DECAYS,
        "MOMENTUM": st.sampled_from([0.5, 0.9]),
        "NESTEROV": st.booleans(),
        "LR_SCHEDULER_NAME": st.sampled_from(["WarmupMultiStepLR", "WarmupCosineLR"]),
        "MAX_ITER": st.sampled_from([6, 30]),
        "STEPS": st.sampled_from([(), (2,), (3, 20)]),
        "GAMMA": st.sampled_from([0.1, 0.5]),
        "WARMUP_ITERS": st.sampled_from([0, 4]),
        "WARMUP_SHARE": st.sampled_from([0.0, 0.5]),
        "WARMUP_FACTOR": st.sampled_from([0.001, 0.5]),
        "WARMUP_METHOD": st.sampled_from(["linear", "constant"]),
        "EMA.DECAY": st.sampled_from([0.5, 0.9]),
    }
)


def configured(optimizer, solver):
    cfg = make_cfg("unused", "SOLVER.OPTIMIZER", optimizer, "SOLVER.EMA.ENABLED", True)
    for key, value in solver.items():
        cfg.merge_from_list([f"SOLVER.{key}", value])
    return cfg


def build(optimizer, solver):
    return trainer.build_state(configured(optimizer, solver), FakeModel())


def advance(state, iterations):
    """Update the weights with gradients that depend on the parameter only; return the rates."""
    rates = []
    for _ in range(iterations):
        for number, parameter in enumerate(state.model.parameters()):
            parameter.grad = torch.full_like(parameter, number + 1.0)
        rates.append([group["lr"] for group in state.optimizer.param_groups])
        state.optimizer.step()
        state.scheduler.step()
        state.ema.update_parameters(state.model)
    return rates


def settings_of(state):
    groups = state.optimizer.state_dict()["param_groups"]
    return groups, state.scheduler.state_dict(), ckpt.parameter_names(state)


def state_by_name(state):
    return {
        name: state.optimizer.state[parameter]
        for name, parameter in state.model.named_parameters()
        if parameter in state.optimizer.state
    }


def pack(state):
    return ckpt.pack_checkpoint(state, iteration=2, config="", class_names=[], category_ids=[])


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(before=SOLVERS, after=SOLVERS, has_names=st.booleans())
def test_a_resumed_state_has_the_new_settings_and_the_old_progress(
    optimizer, before, after, has_names
):
    """Also from a checkpoint of an earlier version, without the names of parameters."""
    stopped, always = build(optimizer, before), build(optimizer, after)
    advance(stopped, 3)
    advance(always, 3)
    resumed, packed = build(optimizer, after), pack(stopped)
    if not has_names:
        del packed["parameter_names"]
        packed["config"] = configured(optimizer, before).dump()
    assert ckpt.restore_checkpoint(packed, resumed) == 3
    assert settings_of(resumed) == settings_of(always)
    expected, restored = state_by_name(stopped), state_by_name(resumed)
    assert expected.keys() == restored.keys()
    for name, entries in expected.items():
        assert all(torch.equal(value, restored[name][key]) for key, value in entries.items())
    assert advance(resumed, 4) == advance(always, 4)
    average, decay = resumed.ema.module.out.bias.clone(), after["EMA.DECAY"]
    resumed.ema.update_parameters(resumed.model)
    expected = average * decay + resumed.model.out.bias * (1 - decay)
    torch.testing.assert_close(resumed.ema.module.out.bias, expected)


def test_momentum_can_be_switched_on_and_off():
    for before, after in ((0.0, 0.9), (0.9, 0.0)):
        stopped, resumed = (build("SGD", {"MOMENTUM": value}) for value in (before, after))
        advance(stopped, 3)
        ckpt.restore_checkpoint(pack(stopped), resumed)
        advance(resumed, 2)
        assert resumed.optimizer.param_groups[0]["momentum"] == after


@pytest.mark.parametrize("has_names", [True, False])
def test_other_frozen_parameters_are_refused(has_names):
    stopped = build("SGD", {})
    advance(stopped, 1)
    packed = pack(stopped)
    if not has_names:
        del packed["parameter_names"]
        packed["config"] = configured("SGD", {}).dump()
    model = FakeModel()
    model.out.requires_grad_(False)
    resumed = trainer.build_state(configured("SGD", {}), model)
    with pytest.raises(UserError, match="frozen"):
        ckpt.restore_checkpoint(packed, resumed)


@pytest.mark.parametrize("new_seed", [False, True])
def test_a_new_seed_replaces_the_random_states(new_seed):
    seed_everything(5)
    packed = pack(build("SGD", {}))
    expected = []
    for seed in (5, 6):
        seed_everything(seed)
        build("SGD", {})
        expected.append(torch.rand(3))
    seed_everything(6)
    resumed = build("SGD", {})
    ckpt.restore_checkpoint(packed, resumed, new_seed=new_seed)
    assert torch.equal(torch.rand(3), expected[new_seed])


# ---- whole runs ----


class Recorder(Callback):
    """The size of each batch, and the first random number of it, by iteration."""

    def __init__(self):
        self.sizes, self.values = {}, {}

    def before_step(self, run, batch):
        self.sizes[run.done] = len(batch)
        self.values[run.done] = batch[0]["image"].tolist()


def test_a_run_goes_on_with_the_options_of_its_resume(tmp_path, fakes, monkeypatch):
    interrupted_run(make_cfg(tmp_path), monkeypatch, 12)
    recorder = Recorder()
    options = (
        *("SOLVER.BASE_LR", 0.02, "SOLVER.STEPS", "(24,)", "SOLVER.WEIGHT_DECAY", 0.0),
        *("SOLVER.IMS_PER_BATCH", 6, "SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.CHECKPOINT_PERIOD", 7),
        *("TEST.EVAL_PERIOD", 8, "SOLVER.CLIP_GRADIENTS.ENABLED", True, "SEED", 6),
        *("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16", "MODEL.DEVICE", "cpu"),
    )
    trainer.train(make_cfg(tmp_path, *options), resume=True, callbacks=[recorder])
    whole = Recorder()
    trainer.train(make_cfg(tmp_path / "whole", *options), callbacks=[whole])
    assert recorder.sizes == dict.fromkeys(range(10, 30), 6)
    assert recorder.values == {i: v for i, v in whole.values.items() if i >= 10}
    rates = [[r["lr"] for r in lines(f) if "lr" in r] for f in (tmp_path, tmp_path / "whole")]
    assert rates[0] == rates[1] == [0.02, 0.002]
    saved = {path.name for path in tmp_path.glob("model_*.pth")}
    assert saved == {
        f"model_{n}.pth" for n in ("0000009", "0000013", "0000020", "0000027", "final")
    }
    assert [r["iteration"] for r in lines(tmp_path) if "segm/AP" in r] == [15, 23, 29]
    log = (tmp_path / "log.txt").read_text()
    applied = log.split("another config than before, applied from iteration 10 on: ")[1]
    applied, unused = applied.split("Other config values without effect on this run: ")
    assert unused.splitlines()[0] == "MODEL.DEVICE auto -> cpu"
    for key, value in zip(options[0::2], options[1::2], strict=True):
        assert key == "MODEL.DEVICE" or f"{key} " in applied.splitlines()[0], (key, value)
    assert "SOLVER.WEIGHT_DECAY 0.0001 -> 0.0" in applied
    assert "the 10 iterations so far had 4 images each" in log


def test_a_finished_run_continues_with_a_larger_max_iter(tmp_path, fakes):
    trainer.train(make_cfg(tmp_path))
    trainer.train(make_cfg(tmp_path, "SOLVER.MAX_ITER", 40), resume=True)
    assert ckpt.load_checkpoint(tmp_path / "model_final.pth")["iteration"] == 39
    assert (
        "applied from iteration 30 on: SOLVER.MAX_ITER 30 -> 40"
        in (tmp_path / "log.txt").read_text()
    )


@pytest.mark.parametrize("stop, done", [(None, 30), (25, 20)])
def test_a_max_iter_that_is_passed_ends_the_run(tmp_path, fakes, monkeypatch, stop, done):
    if stop is None:
        trainer.train(make_cfg(tmp_path))
    else:
        interrupted_run(make_cfg(tmp_path), monkeypatch, stop)
    options = ("SOLVER.MAX_ITER", 15, "SOLVER.BASE_LR", 0.5)
    assert trainer.train(make_cfg(tmp_path, *options), resume=True) == fakes.results
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert ckpt.load_checkpoint(tmp_path / "model_final.pth")["iteration"] == done - 1
    log = (tmp_path / "log.txt").read_text()
    assert f"{done} iterations are done and SOLVER.MAX_ITER is 15, so the run is only" in log
    unused = "SOLVER.BASE_LR 0.01 -> 0.5; SOLVER.MAX_ITER 30 -> 15"
    assert f"without effect on this run: {unused}" in log


def test_a_run_that_a_callback_stopped_says_so(tmp_path, fakes):
    class Stop(Callback):
        def after_step(self, run, metrics):
            if run.done == 3:
                run.stop("enough")

    trainer.train(make_cfg(tmp_path), callbacks=[Stop()])
    trainer.train(make_cfg(tmp_path, "SOLVER.MAX_ITER", 40), resume=True)
    log = (tmp_path / "log.txt").read_text()
    assert "The run was stopped after 3 iterations (enough), so it is only evaluated" in log


def test_a_refused_change_changes_no_file(tmp_path, fakes, monkeypatch):
    interrupted_run(make_cfg(tmp_path), monkeypatch, 12)
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.name != "log.txt"}
    with pytest.raises(UserError, match=r"SOLVER\.OPTIMIZER SGD -> AdamW.*model_0000009\.pth"):
        trainer.train(make_cfg(tmp_path, "SOLVER.OPTIMIZER", "AdamW"), resume=True)
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.name != "log.txt"} == before
