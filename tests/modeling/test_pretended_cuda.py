"""Training and inference on a pretended GPU: no mix of devices, and few waits of the host."""

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
_OBJECTS = [[10.0, 20.0, 60.0, 90.0], [70.0, 10.0, 110.0, 40.0], [20.0, 30.0, 36.0, 44.0]]
_GROUP_NORM_TO_BATCH_NORM = ["MODEL.RESNETS.NORM", "BN", "SOLVER.EMA.ENABLED", True]


def test_what_is_planted_is_found() -> None:
    with pretend() as record:
        on_gpu, on_cpu = torch.zeros(3, device="cuda"), torch.ones(3)
        assert (on_gpu.device.type, on_cpu.device.type) == ("cuda", "cpu")
        record.clear()
        total = on_gpu + on_cpu
        assert record.totals() == {"mixes": 1, "launches": 1, "waits": 0} | _NO_COPIES
        record.clear()
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
            wait()
            assert record.waits.total() == 1, record.waits
            record.clear()
        on_cpu.to("cuda", non_blocking=True)
        on_cpu.pin_memory().to("cuda", non_blocking=True)
        total[torch.zeros(1, dtype=torch.int64, device="cuda")] * torch.tensor(2.0)
        assert (record.waits.total(), record.mixes.total()) == (0, 0)
        assert (record.unpinned.total(), record.pinned.total()) == (1, 1)
    assert on_gpu.device.type == "cpu"


_NO_COPIES = {"pinned": 0, "unpinned": 0}


def batch_of(sizes: list[tuple[int, int]], *, empty: int = -1) -> list[dict]:
    """Return pinned samples; the one with the index `empty` has no objects."""
    samples = []
    for number, size in enumerate(sizes):
        target = tiny.target(*size, [] if number == empty else _OBJECTS)
        image = tiny.make_image(*size, seed=number).pin_memory()
        target = {name: value.pin_memory() for name, value in target.items()}
        samples.append({"image": image, "target": target, "file_name": f"{number}.png"})
    return samples


def make_step(cfg: CfgNode):
    model = tiny.tensormask.build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    autocast, scaler = build_autocast(cfg, model.device)
    scheduler = build_lr_scheduler(cfg, optimizer)
    state = TrainState(model, optimizer, scheduler, scaler, build_ema(cfg, model))
    clip = build_gradient_clipper(cfg)
    return lambda batch: train_step(
        state, batch, iteration=0, clip_gradients=clip, autocast=autocast
    )


def cfg_of(head: str, opts: list) -> CfgNode:
    torch.manual_seed(0)
    return tiny.get_cfg(head, [*opts, "MODEL.DEVICE", "cuda"])


CASES = {
    "bipyramid": ("bipyramid", []),
    "aligned": ("aligned", []),
    "natural": ("natural", []),
    "upscale_aligned": ("upscale_aligned", []),
    "no boxes": (
        "bipyramid",
        ["MODEL.TENSOR_MASK.BOX_ON", False, "MODEL.TENSOR_MASK.NMS_ON", "masks"],
    ),
    "no masks": ("bipyramid", ["MODEL.MASK_ON", False]),
    "NMS on masks": ("natural", ["MODEL.TENSOR_MASK.NMS_ON", "masks"]),
    "batch norm with averages": ("natural", _GROUP_NORM_TO_BATCH_NORM),
    "bfloat16": ("bipyramid", ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"]),
    "float16": (
        "natural",
        ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16"],
    ),
    "checkpointed, channels last": (
        "bipyramid",
        ["MODEL.TENSOR_MASK.CHECKPOINT_ACTIVATIONS", True, "MODEL.CHANNELS_LAST", True],
    ),
    "AdamW, clipped": (
        "natural",
        ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.CLIP_GRADIENTS.ENABLED", True],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_training_mixes_no_devices(case) -> None:
    with pretend() as record:
        step, batch = make_step(cfg_of(*CASES[case])), batch_of([(96, 128), (128, 100)], empty=0)
        step(batch)
        record.clear()
        step(batch)
    assert not record.mixes


@pytest.mark.parametrize("case", CASES)
def test_inference_mixes_no_devices(case) -> None:
    with pretend() as record, torch.no_grad():
        model = tiny.with_detections(tiny.tensormask.build_model(cfg_of(*CASES[case])))
        images = [s["image"] for s in batch_of([(96, 128), (128, 100)])]
        record.clear()
        detections = model(images)
        assert any(len(d["scores"]) for d in detections)
        assert all(x.is_cuda for d in detections for x in d.values())
    assert not record.mixes
