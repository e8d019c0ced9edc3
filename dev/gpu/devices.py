"""The model on a GPU against itself on the CPU: every head in float64, then steps, waits, bits.

python -m gpu.devices FILE [deterministic]
"""

import collections
import os
import sys
import traceback
import warnings
from typing import Any

import torch
from benchmarks.models import CONFIG_FILE
from torch import Tensor, nn

from gpu import DEVICE, ON_GPU, SIZE, Results
from tensormask.commands.synthetic import make_image, make_target
from tensormask.config import CfgNode, get_cfg
from tensormask.engine.precision import build_autocast, set_float32_precision
from tensormask.engine.solver import (
    build_ema,
    build_gradient_clipper,
    build_lr_scheduler,
    build_optimizer,
)
from tensormask.engine.step import TrainState, train_step
from tensormask.layers import op_backend
from tensormask.modeling import build_model
from tensormask.utils.random import set_determinism

_HEAD, _MASK = "MODEL.TENSOR_MASK.HEAD", "MODEL.TENSOR_MASK.UPSCALE_LAMBDA"
_SMALL = [
    *(
        "MODEL.RESNETS.DEPTH",
        18,
        "MODEL.RESNETS.STRIDE_IN_1X1",
        False,
        "MODEL.FPN.OUT_CHANNELS",
        32,
    ),
    *("MODEL.TENSOR_MASK.CLS_CHANNELS", 32, "MODEL.TENSOR_MASK.BBOX_CHANNELS", 32),
    *("MODEL.TENSOR_MASK.MASK_CHANNELS", 32, "MODEL.TENSOR_MASK.INIT", "he"),
]
_ONE_SIZE = ["MODEL.ANCHOR_GENERATOR.SIZES", [[60], [120], [240], [480], [960], [1920]]]
_AMP = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE")
CASES: dict[str, list] = {
    "bipyramid": [],
    "bipyramid, channels_last": ["MODEL.CHANNELS_LAST", True],
    "bipyramid, checkpointed": ["MODEL.TENSOR_MASK.CHECKPOINT_ACTIVATIONS", True],
    "simple_aligned": [_HEAD, "simple_aligned"],
    "simple_natural": [_HEAD, "simple_natural"],
    "upscale_aligned": [_HEAD, "upscale_aligned", _MASK, 3.0, *_ONE_SIZE],
    "upscale_natural": [_HEAD, "upscale_natural", _MASK, 1.5, *_ONE_SIZE],
    "no boxes": ["MODEL.TENSOR_MASK.BOX_ON", False, "MODEL.TENSOR_MASK.NMS_ON", "masks"],
}
STEPS: dict[str, list] = {
    "float32 R-50": [],
    "bfloat16 R-50, channels_last": [*_AMP, "bfloat16", "MODEL.CHANNELS_LAST", True],
    "float16 R-50, EMA, AdamW": [
        *(*_AMP, "float16", "SOLVER.EMA.ENABLED", True, "SOLVER.OPTIMIZER", "AdamW"),
    ],
    "accumulated, BN, checkpointed": [
        *(*_SMALL, "SOLVER.ACCUMULATE_STEPS", 2, "MODEL.RESNETS.NORM", "BN"),
        *("MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.TENSOR_MASK.CHECKPOINT_ACTIVATIONS", True),
    ],
}


def config(device: str, *overrides: Any) -> CfgNode:
    """Return the paper's config with changes."""
    cfg = get_cfg()
    cfg.merge_from_file(CONFIG_FILE)
    cfg.merge_from_list(["MODEL.DEVICE", device, *overrides])
    return cfg


def make_batch(size: tuple[int, int], *num_objects: int) -> list[dict]:
    """Return a sample for each number of objects; all on the CPU, as from a loader."""
    return [
        {
            "image": make_image(size, seed),
            "target": make_target(size, number, seed=seed),
            "file_name": str(seed),
        }
        for seed, number in enumerate(num_objects)
    ]


def losses_and_gradient(model: nn.Module, batch: list[dict]) -> tuple[dict[str, float], Tensor]:
    """Return the losses of a batch, and all gradients in one row, on the CPU."""
    model.train()
    losses = model([s["image"] for s in batch], [s["target"] for s in batch])
    sum(losses.values()).backward()
    gradients = [p.grad.double().flatten().cpu() for p in model.parameters() if p.requires_grad]
    return {name: value.item() for name, value in losses.items()}, torch.cat(gradients)


def compare(overrides: list, dtype: torch.dtype) -> dict[str, Any]:
    """Run a forward pass, a backward pass and a detection with the same weights on both devices."""
    size, found = (160, 224), []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        model = build_model(config("cpu", *_SMALL, *overrides)).to(device, dtype)
        batch = make_batch(size, 0, 12)
        with op_backend("auto" if device == DEVICE else "reference"):
            trained = losses_and_gradient(model, batch)
            model.eval()
            model.score_threshold = 0.0099  # below what random weights give
            with torch.no_grad():
                detections = model([sample["image"] for sample in batch])
        found.append((*trained, [{k: v.cpu() for k, v in d.items()} for d in detections]))
    (losses, gradient, expected), (losses_there, gradient_there, given) = found
    pairs = list(zip(expected, given, strict=True))
    same = [(a, b) for a, b in pairs if 0 < len(a["scores"]) == len(b["scores"])]
    return {
        "losses": [losses, losses_there],
        "loss error": max(abs(losses[k] / losses_there[k] - 1) for k in losses),
        "gradient error": ((gradient - gradient_there).norm() / gradient.norm()).item(),
        "detections": [[len(a["scores"]), len(b["scores"])] for a, b in pairs],
        "score error": max([(a["scores"] - b["scores"]).abs().max().item() for a, b in same] + [0]),
        "masks that differ": [
            (a["masks"] != b["masks"]).double().mean().item() for a, b in same if "masks" in a
        ],
    }


def run_steps(*overrides: Any, steps: int = 4, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """Train some steps, and return their losses and the peak of the memory."""
    clip = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model")
    if not ON_GPU:
        overrides = (*_SMALL, *overrides)
    cfg = config(DEVICE, *clip, "SOLVER.BASE_LR", 5e-4, "SOLVER.WARMUP_ITERS", 1, *overrides)
    torch.manual_seed(0)
    set_determinism(deterministic=cfg.DETERMINISTIC, benchmark=cfg.CUDNN_BENCHMARK)
    try:
        model = build_model(cfg).train()
        optimizer = build_optimizer(cfg, model)
        autocast, scaler = build_autocast(cfg, torch.device(DEVICE))
        scheduler, ema = build_lr_scheduler(cfg, optimizer), build_ema(cfg, model)
        state = TrainState(model, optimizer, scaler=scaler, scheduler=scheduler, ema=ema)
        clip_gradients, batch = build_gradient_clipper(cfg), make_batch(size, 12, 12)
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        rows = [
            train_step(
                state,
                batch,
                iteration=iteration,
                clip_gradients=clip_gradients,
                autocast=autocast,
                accumulate_steps=cfg.SOLVER.ACCUMULATE_STEPS,
            )
            for iteration in range(steps)
        ]
    finally:
        set_determinism(deterministic=False, benchmark=False)
    times = ("forward_time", "backward_time", "optimizer_time")
    return {
        "steps": [{k: v for k, v in row.items() if k not in times} for row in rows],
        "peak MiB": torch.cuda.max_memory_allocated() / 2**20 if ON_GPU else None,
    }


def deterministic_twice() -> dict[str, Any]:
    """Train twice with DETERMINISTIC, and compare the bits."""
    options = (*_SMALL, "DETERMINISTIC", True)
    first, second = (run_steps(*options, steps=2, size=(256, 320)) for _ in range(2))
    return {"equal": first["steps"] == second["steps"], "steps": first["steps"]}


def count_waits(*, training: bool) -> dict[str, Any]:
    """Return where the host waits for the GPU, by PyTorch's own warnings."""
    model = build_model(config(DEVICE)).train(training)
    batch = make_batch(SIZE, *([20, 20] if training else [20]))
    images = [sample["image"] for sample in batch]

    def call() -> None:
        if training:
            sum(model(images, [s["target"] for s in batch]).values()).backward()
        else:
            with torch.no_grad():
                model(images)

    def note(message: Any, category: type, filename: str, line: int, *_: Any) -> None:
        if "synchroniz" in str(message):
            stack = [f for f in traceback.extract_stack() if "/tensormask/" in f.filename]
            place = (stack[-1].filename, stack[-1].lineno) if stack else (filename, line)
            places[f"{os.path.basename(place[0])}:{place[1]}"] += 1

    call()
    places: collections.Counter = collections.Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("warn")
        call()
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
    return {"number": places.total(), "places": dict(places.most_common())}


if __name__ == "__main__":
    results = Results(sys.argv[1])
    if sys.argv[2:] == ["deterministic"]:
        set_float32_precision("high")
        results.step("deterministic, twice", 40, deterministic_twice)
        sys.exit()
    set_float32_precision("highest")
    for name, overrides in CASES.items():
        results.step(f"float64 {name}", 25, lambda case=overrides: compare(case, torch.float64))
    for precision in ("highest", "high"):  # "high" is TF32
        set_float32_precision(precision)
        results.step(f"float32 {precision}", 25, lambda: compare([], torch.float32))
    for name, overrides in STEPS.items():
        results.step(f"steps {name}", 30, lambda case=overrides: run_steps(*case))
    results.step("waits in training", 25, lambda: count_waits(training=True))
    results.step("waits in inference", 25, lambda: count_waits(training=False))
