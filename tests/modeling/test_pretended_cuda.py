"""Training on a pretended GPU: no mix of devices, and one wait of the host in a step.

`test_inference_on_gpu.py` has inference.
"""

import pytest
import tiny
import torch
from pretended_cuda import pretend

from tensormask.config import CfgNode
from tensormask.engine.precision import build_autocast
from tensormask.engine.solver import (
    build_ema,
    build_gradient_clipper,
    build_lr_scheduler,
    build_optimizer,
)
from tensormask.engine.step import TrainState, train_step

pytestmark = pytest.mark.usefixtures("nothing_left_behind")
_OBJECTS = [[10.0, 4.0, 60.0, 60.0], [70.0, 10.0, 100.0, 40.0], [20.0, 30.0, 36.0, 44.0]]
_THIS_FILE = "tests/modeling/test_pretended_cuda.py"
_NO_BOXES = ["MODEL.TENSOR_MASK.BOX_ON", False, "MODEL.TENSOR_MASK.NMS_ON", "masks"]
_CLIPPED = ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.CLIP_GRADIENTS.ENABLED", True]
_BFLOAT16 = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"]
_HEAD = "MODEL.TENSOR_MASK."
_DICE = [_HEAD + "DICE_LOSS_WEIGHT", 1.0]
_OF_V2 = [*_DICE, _HEAD + "CLS_LOSS", "varifocal", _HEAD + "MASK_IOU_ON", True]
CASES = {
    "bipyramid": ("bipyramid", []),
    "aligned": ("aligned", []),
    "upscale_aligned": ("upscale_aligned", []),
    "losses of v2": ("bipyramid", _OF_V2),
    "query": ("bipyramid", [_HEAD + "QUERY_ON", True]),
    "no boxes": ("bipyramid", _NO_BOXES),
    "no masks": ("natural", ["MODEL.MASK_ON", False]),
    "batch norm, averages, clipped": (
        "natural",
        ["MODEL.RESNETS.NORM", "BN", "SOLVER.EMA.ENABLED", True, *_CLIPPED],
    ),
    "bfloat16, checkpointed, channels last": (
        "bipyramid",
        [*_BFLOAT16, "MODEL.TENSOR_MASK.CHECKPOINT_ACTIVATIONS", True, "MODEL.CHANNELS_LAST", True],
    ),
    "float16": ("natural", ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16"]),
    "each gradient clipped": ("natural", [*_CLIPPED, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"]),
}
_SLOW = ("upscale_aligned", "no masks", "float16", "each gradient clipped")


def test_what_is_planted_is_found() -> None:
    with pretend() as record:
        on_gpu, on_cpu = torch.zeros(3, device="cuda"), torch.ones(3)
        assert (on_gpu.device.type, on_cpu.device.type) == ("cuda", "cpu")
        record.clear()
        total = on_gpu + on_cpu
        copies = {"pinned": 0, "unpinned": 0}
        assert record.totals() == {"mixes": 1, "launches": 1, "waits": 0} | copies
        for wait in (
            lambda: total[total > 0],
            lambda: total[torch.tensor([0])],
            lambda: float(total.sum()),
            lambda: total.cpu(),
            lambda: on_cpu.to("cuda"),
            lambda: bool(total.any()),
            lambda: total.nonzero(),
            lambda: total.unique(),
            lambda: torch.tensor([1.0], device="cuda"),
            lambda: total.tolist(),
            lambda: torch.repeat_interleave(total, total.long()),
            lambda: on_cpu.copy_(total),
        ):
            record.clear()
            wait()
            assert record.waits.total() == 1, record.waits
        record.clear()
        on_cpu.to("cuda", non_blocking=True)
        on_cpu.pin_memory().to("cuda", non_blocking=True)
        total[torch.zeros(1, dtype=torch.int64, device="cuda")] * torch.tensor(2.0)
        assert (record.waits.total(), record.mixes.total()) == (0, 0)
        assert (record.unpinned.total(), record.pinned.total()) == (1, 1)
        total.to("cpu", non_blocking=True)
        assert record.mixes.total() == 1
    assert on_gpu.device.type == "cpu"


def test_a_wait_and_a_mix_in_a_model_are_found(monkeypatch) -> None:
    with pretend() as record, torch.no_grad():
        model = make_model(CASES["aligned"]).eval()
        pyramid, image = model.fpn.forward, tiny.make_image(64, 64)
        waits = []
        for function in (
            pyramid,  # copies constants
            pyramid,
            lambda features: [x * float(x.isfinite().all()) for x in pyramid(features)],
            lambda features: [x * torch.ones(1) for x in pyramid(features)],
        ):
            monkeypatch.setattr(model.fpn, "forward", function)
            record.clear()
            model([image])
            waits.append(record.waits.total())
    without = waits[1]
    assert waits[2:] == [without + 6, without]  # one for each level
    assert len(record.mixes) == 1
    assert next(iter(record.mixes)).startswith(f"aten::mul at {_THIS_FILE}")


def make_model(case: tuple[str, list]):
    torch.manual_seed(0)
    return tiny.tensormask.build_model(cfg_of(case))


def cfg_of(case: tuple[str, list]) -> CfgNode:
    head, opts = case
    return tiny.get_cfg(head, [*opts, "MODEL.DEVICE", "cuda"])


def batch_of(sizes: list[tuple[int, int]]) -> list[dict]:
    """Return samples in pinned memory, as the loader does; the first has no objects."""
    samples = []
    for number, size in enumerate(sizes):
        target = tiny.target(*size, _OBJECTS if number else [])
        target = {name: value.pin_memory() for name, value in target.items()}
        image = tiny.make_image(*size, seed=number).pin_memory()
        samples.append({"image": image, "target": target, "file_name": f"{number}.png"})
    return samples


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c in _SLOW else ()) for c in CASES]
)
def test_a_training_step_waits_once(case) -> None:
    cfg = cfg_of(CASES[case])
    with pretend() as record:
        model = make_model(CASES[case])
        optimizer = build_optimizer(cfg, model)
        autocast, scaler = build_autocast(cfg, model.device)
        state = TrainState(
            model, optimizer, build_lr_scheduler(cfg, optimizer), scaler, build_ema(cfg, model)
        )
        batch = batch_of([(64, 64), (64, 100)])
        for iteration in range(2):  # the first one copies constants
            record.clear()
            clip = build_gradient_clipper(cfg)
            train_step(state, batch, iteration=iteration, clip_gradients=clip, autocast=autocast)
    assert not record.mixes
    assert not record.unpinned
    assert record.waits.total() == 1 + (case == "float16"), record.waits  # the loss scale


@pytest.mark.parametrize("case", ["bipyramid", "losses of v2", "no boxes"])
def test_losses_equal_those_of_the_cpu(case) -> None:
    with pretend():
        samples = batch_of([(64, 64), (64, 100)])
        batch = [s["image"] for s in samples], [s["target"] for s in samples]
        losses = {name: x.item() for name, x in make_model(CASES[case])(*batch).items()}
    on_cpu = tiny.build(*CASES[case])(*batch)
    assert losses == pytest.approx({name: x.item() for name, x in on_cpu.items()}, rel=1e-4)


def test_a_model_on_the_cpu_takes_inputs_on_a_gpu() -> None:
    """A copy to the CPU that is not waited for would be read before it is complete."""
    model = tiny.build("natural")
    with pretend() as record:
        samples = batch_of([(64, 64), (64, 100)])
        images = [s["image"].to("cuda") for s in samples]
        targets = [{k: v.to("cuda") for k, v in s["target"].items()} for s in samples]
        record.clear()
        losses = model(images, targets)
        assert not any(x.is_cuda for x in losses.values())
    assert not record.mixes
