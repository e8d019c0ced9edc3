"""Out of memory: one error that names what to lower, and the run so far is on disk."""

import pytest
import torch
from fakes import FakeModel, assert_same_bits, make_cfg, weights

from tensormask.commands import train as command
from tensormask.engine import distributed, evaluator, run, trainer
from tensormask.engine.memory import evaluation_advice, training_advice
from tensormask.engine.resume import load_checkpoint
from tensormask.utils.memory import OutOfMemory

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

GPU = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\nmore lines"
)
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(
    "options, processes, named, unnamed",
    [
        (("IMS_PER_BATCH", 16), 1, ["STEPS 2 ", "BATCH below 16", "CHECKPOINT_ACTIVATIONS"], []),
        (("IMS_PER_BATCH", 15, "ACCUMULATE_STEPS", 3), 1, ["ACCUMULATE_STEPS 5 "], []),
        (("IMS_PER_BATCH", 16, "ACCUMULATE_STEPS", 4), 4, ["below 16"], ["ACCUMULATE_STEPS"]),
        (("IMS_PER_BATCH", 1), 1, ["smaller images"], ["ACCUMULATE_STEPS", "BATCH below"]),
        (("IMS_PER_BATCH", 2), 1, ["the host's memory, DATALOADER.NUM_WORKERS below 4."], []),
        (("AMP.ENABLED", True), 1, ["MIN_SIZE_TRAIN 800, MAX_SIZE_TRAIN 1333"], ["AMP"]),
    ],
)
def test_training_advice_names_what_is_not_used_yet(
    monkeypatch, options, processes, named, unnamed
):
    monkeypatch.setattr(distributed, "get_world_size", lambda: processes)
    options = [word if i % 2 else f"SOLVER.{word}" for i, word in enumerate(options)]
    text = training_advice(make_cfg("unused", *options))
    assert all(name in text for name in named), text
    assert not any(name in text for name in unnamed), text
    checkpointed = ("MODEL.TENSOR_MASK.CHECKPOINT_ACTIVATIONS", True)
    assert "CHECKPOINT" not in training_advice(make_cfg("unused", *options, *checkpointed))


def test_evaluation_advice():
    masks = ("MODEL.TENSOR_MASK.NMS_ON", "masks", "TEST.DETECTIONS_PER_IMAGE", 300)
    text = evaluation_advice(make_cfg("unused", *masks))
    for name in ("MIN_SIZE_TEST 800", "DETECTIONS_PER_IMAGE below 300", "TOPK_CANDIDATES_TEST"):
        assert name in text


# ---- in a run ----


def train_until(folder, monkeypatch, error, iteration, where):
    """Train until an error in this iteration: in the model, or in the update of the weights."""

    class Failing(FakeModel):
        calls = 0

        def forward(self, images, targets):
            if where == "model" and Failing.calls == iteration:
                raise error
            Failing.calls += 1
            return super().forward(images, targets)

    class FailingSGD(torch.optim.SGD):
        calls = 0

        def step(self, closure=None):
            if where == "update" and FailingSGD.calls == iteration:
                self.param_groups[0]["params"][0].data.fill_(9.0)
                raise error
            FailingSGD.calls += 1
            return super().step(closure)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "build_model", lambda cfg, **options: Failing())
        patch.setattr(torch.optim, "SGD", FailingSGD)
        with pytest.raises(OutOfMemory) as caught:
            trainer.train(make_cfg(folder))
    return str(caught.value)


@pytest.mark.parametrize("error", [MemoryError(), GPU, CPU], ids=["host", "gpu", "cpu"])
def test_training_without_memory_saves_the_last_complete_iteration(
    tmp_path, fakes, monkeypatch, error
):
    message = train_until(tmp_path, monkeypatch, error, 12, "model")
    assert "SOLVER.ACCUMULATE_STEPS 2 " in message
    assert f"{tmp_path / 'model_0000011.pth'} has the run so far: continue with --res" in message
    assert load_checkpoint(tmp_path / "model_0000011.pth")["iteration"] == 11
    assert "\n" not in message
    log = (tmp_path / "log.txt").read_text()
    assert message in log
    assert "Traceback" in log
    trainer.train(make_cfg(tmp_path), resume=True)
    trainer.train(make_cfg(tmp_path / "whole"))
    assert_same_bits(weights(tmp_path), weights(tmp_path / "whole"))


def test_weights_of_an_interrupted_update_are_not_saved(tmp_path, fakes, monkeypatch):
    message = train_until(tmp_path, monkeypatch, MemoryError(), 12, "update")
    assert "model_0000009.pth has the run so far (iteration 12 has failed while it" in message
    assert not (tmp_path / "model_0000011.pth").exists()


def test_the_first_iteration_without_memory(tmp_path, fakes, monkeypatch):
    message = train_until(tmp_path, monkeypatch, MemoryError(), 0, "model")
    assert message.endswith("There is no checkpoint yet.")
    assert not list(tmp_path.glob("*.pth"))


def test_a_checkpoint_that_cannot_be_written_is_said(tmp_path, fakes, monkeypatch):
    real = run.resume.save_checkpoint

    def full(folder, name, checkpoint):
        if checkpoint["iteration"] == 11:
            raise MemoryError("no bytes left")
        return real(folder, name, checkpoint)

    monkeypatch.setattr(run.resume, "save_checkpoint", full)
    message = train_until(tmp_path, monkeypatch, MemoryError(), 12, "model")
    assert "model_0000009.pth has the run so far (the 12 iterations" in message
    assert "cannot be saved: no bytes left): continue" in message


@pytest.mark.parametrize("period, last", [(7, "model_0000006.pth"), (0, "model_final.pth")])
def test_an_evaluation_without_memory_leaves_the_run(tmp_path, fakes, monkeypatch, period, last):
    def fails(*args, **options):
        raise GPU

    cfg = make_cfg(tmp_path, "TEST.EVAL_PERIOD", period)
    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "evaluate", fails)
        with pytest.raises(OutOfMemory) as caught:
            trainer.train(cfg)
        message = str(caught.value)
        assert "in the evaluation on b (CUDA out of memory. Tried" in message
        assert "INPUT.MIN_SIZE_TEST 800" in message
        assert "IMS_PER_BATCH" not in message
        assert f"{last} has the run so far: continue with --resume" in message
        assert (tmp_path / "last_checkpoint").read_text() == last
        with pytest.raises(OutOfMemory, match="DETECTIONS_PER_IMAGE"):
            evaluator.evaluate_only(cfg, resume=True)
    assert trainer.train(cfg, resume=True) == fakes.results


@pytest.mark.parametrize(
    "error, printed",
    [
        (OutOfMemory("Out of memory in training"), "error: Out of memory in training\n"),
        (GPU, "error: Out of memory in the setup of the run (CUDA out of memory. Tried"),
    ],
    ids=["later", "start"],
)
def test_the_command_prints_one_line(tmp_path, fakes, monkeypatch, capsys, error, printed):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr(command, "train", fails)
    options = ["--config-file", "quickstart", "OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu"]
    assert command.main(options) == 1
    line = capsys.readouterr().err
    assert line.startswith(printed)
    assert line.count("\n") == 1
