"""Measure the latency and memory of one model: `tensormask benchmark --config-file FILE`.

Images, targets and, in inference, scores are made up. A model detects TEST.DETECTIONS_PER_IMAGE
objects, because what it costs depends on their number.
"""

import argparse
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from tensormask.commands.common import (
    CommandParser,
    add_config_file,
    add_overrides,
    add_size,
    exits_on_user_error,
    read_config,
    write_json,
)
from tensormask.commands.synthetic import keep_signal, make_image, make_target, make_up_scores
from tensormask.config import CfgNode
from tensormask.engine.precision import build_autocast, set_float32_precision
from tensormask.engine.solver import build_gradient_clipper, build_lr_scheduler, build_optimizer
from tensormask.engine.step import TrainState, train_step
from tensormask.modeling import TensorMask, build_model
from tensormask.modeling.build import resolve_device
from tensormask.utils.env import describe_machine
from tensormask.utils.errors import UserError
from tensormask.utils.memory import return_freed_memory

DTYPES = ("float32", "tf32", "bfloat16", "float16")
# Pixels, of a call before the one whose memory is measured. Not smaller: in bfloat16 on a CPU,
# oneDNN reads uninitialized memory in the weight gradient of a 3x3 convolution of 1x1 pixels.
SMALL = (128, 128)
_HALF = DTYPES[2:]
_MIB = 2**20


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a model is run, and the overrides of its config."""
    add_size(parser)
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images (default: 1)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=DTYPES,
        help="bfloat16 and float16 by autocast; tf32 for a GPU (default: float32)",
    )
    parser.add_argument("--device", default="", help="default: MODEL.DEVICE of the config")
    add_overrides(parser)


def model_config(args: argparse.Namespace) -> CfgNode:
    """Return the config that the options ask for, and set the precision of float32 products.

    Raises:
        UserError: a number below 1, or a device that is not available or lacks the dtype.
    """
    for name, value in (("batch", args.batch), ("size", min(args.size))):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    half, dtype = args.dtype in _HALF, args.dtype if args.dtype in _HALF else _HALF[0]
    amp = [
        word
        for key in ("TEST.AMP", "SOLVER.AMP")
        for word in (f"{key}.ENABLED", half, f"{key}.DTYPE", dtype)
    ]
    cfg = read_config(args.config_file, [*args.opts, *amp])
    cfg.MODEL.DEVICE = str(resolve_device(args.device or cfg.MODEL.DEVICE))
    if args.dtype == "tf32" and cfg.MODEL.DEVICE == "cpu":
        raise UserError("--dtype tf32 is for a GPU: give --device cuda or another dtype")
    set_float32_precision("high" if args.dtype == "tf32" else "highest")
    return cfg


def seeded_model(cfg: CfgNode) -> TensorMask:
    """Build a model in eval mode with seeded random weights."""
    torch.manual_seed(0)
    model = build_model(cfg)
    keep_signal(model.backbone)
    return model.eval()


def detect_call(
    model: nn.Module, images: list[Tensor], **options: Any
) -> Callable[[], list[dict[str, Tensor]]]:
    """Return a function that detects in images; the options are those of `TensorMask.forward`."""

    @torch.no_grad()
    def detect() -> list[dict[str, Tensor]]:
        return model(images, **options)

    return detect


def make_samples(cfg: CfgNode, size: tuple[int, int], batch: int, num_objects: int) -> list[dict]:
    """Return a batch of one training image, with its pixels and masks on the model's device."""
    target = make_target(size, num_objects, cfg.MODEL.TENSOR_MASK.NUM_CLASSES)
    target["masks"] = target["masks"].to(cfg.MODEL.DEVICE)
    image = make_image(size).to(cfg.MODEL.DEVICE)
    return [{"image": image, "target": target, "file_name": "seeded"}] * batch


def training_step(cfg: CfgNode, model: nn.Module) -> Callable[[list[dict]], dict[str, float]]:
    """Return a function that trains on a batch, so slowly that the weights do not change."""
    cfg = cfg.clone()
    cfg.SOLVER.BASE_LR = 1e-30  # too small to change a float32
    optimizer = build_optimizer(cfg, model)
    autocast, scaler = build_autocast(cfg, torch.device(cfg.MODEL.DEVICE))
    state = TrainState(model, optimizer, build_lr_scheduler(cfg, optimizer), scaler)
    clip_gradients = build_gradient_clipper(cfg)

    def step(batch: list[dict]) -> dict[str, float]:
        return train_step(
            state, batch, iteration=0, clip_gradients=clip_gradients, autocast=autocast
        )

    return step


def peak_memory(call: Callable[[], object], device: str) -> float | None:
    """Return the MiB that a call takes at its peak, above what was in use before.

    On a GPU what PyTorch's allocator has given out, on the CPU the resident memory of the
    process; None where the system does not tell, as on macOS.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / _MIB
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    # Freed memory that glibc keeps would hide as much of the peak.
    return_freed_memory()
    before = _status_kib("VmRSS")
    reset.write_text("5", encoding="ascii")  # the peak counts from here
    call()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the model of the options; the results by name."""
    cfg, size = model_config(args), tuple(args.size)
    model = seeded_model(cfg)
    if args.weights:
        from tensormask.checkpoint.loading import load_weights

        load_weights(model, args.weights)
    results: dict[str, Any] = {"device": cfg.MODEL.DEVICE}
    small: Callable[[], object]
    call: Callable[[], object]
    if args.mode == "train":
        step = training_step(cfg, model.train())
        small, call = (
            functools.partial(step, make_samples(cfg, s, args.batch, args.objects))
            for s in (SMALL, size)
        )
    else:
        make_up_scores(model)
        output_sizes = [tuple(args.output_size or size)] * args.batch
        small, detect = (
            detect_call(model, [make_image(s).to(cfg.MODEL.DEVICE)] * args.batch, output_sizes=o)
            for s, o in ((SMALL, None), (size, output_sizes))
        )
        results["detections"] = len(detect()[0]["scores"])
        call = detect
    small()
    results["peak_mib"] = peak_memory(call, cfg.MODEL.DEVICE)
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    times = timer.blocked_autorange(min_run_time=args.seconds)
    results |= {
        "median_s": times.median,
        "iqr_s": times.iqr,
        "num_calls": len(times.times) * times.number_per_run,
        "images_per_s": args.batch / times.median,
    }
    return results


def build_parser() -> CommandParser:
    """Return the parser of the command."""
    parser = CommandParser(
        "benchmark",
        description="Measure the latency and the memory of one model, with made-up images.",
        example="--config-file tensormask_R_50_FPN_1x --size 480 640 MODEL.CHANNELS_LAST True",
    )
    add_config_file(parser)
    parser.add_argument(
        "--weights", default="", metavar="FILE", help="checkpoint (default: random weights)"
    )
    parser.add_argument(
        "--mode", default="inference", choices=("inference", "train"), help="default: inference"
    )
    parser.add_argument(
        "--output-size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="of the masks of inference, in pixels (default: --size)",
    )
    parser.add_argument(
        "--objects", type=int, default=20, metavar="N", help="of a training image (default: 20)"
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="of measuring (default: 5)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file, too")
    add_model_options(parser)
    return parser


@exits_on_user_error
def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for an error of the user."""
    args = build_parser().parse_args(arguments)
    results = measure(args)
    machine = describe_machine()
    write_json(args.json, {"options": vars(args), "machine": machine, "results": results})
    height, width = args.size
    where = machine["gpu"] if results["device"] != "cpu" else f"{machine['threads']} CPU threads"
    print(f"{args.mode}, {args.batch} x {height} x {width} px, {args.dtype}, {where}")
    print(
        f"latency: median {1e3 * results['median_s']:.4g} ms of {results['num_calls']} calls "
        f"(interquartile range {1e3 * results['iqr_s']:.2g} ms)"
    )
    print(f"throughput: {results['images_per_s']:.4g} images/s")
    if results["peak_mib"] is not None:
        print(f"peak memory: {results['peak_mib']:.0f} MiB above the model's")
    if "detections" in results:
        print(f"detections per image, with made-up scores: {results['detections']}")
    return 0
