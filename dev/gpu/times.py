"""Times of our model beside torchvision's Mask R-CNN, with and without pasting; the top kernels.

python -m gpu.times FILE {bfloat16,tf32} [KEY VALUE ...]
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks import inference, models, train
from benchmarks.measure import time_in_turn
from benchmarks.models import OURS, THEIRS

from gpu import DEVICE, ON_GPU, SIZE, Results, wait
from tensormask.commands.synthetic import make_image

_HOST = ("Launch", "Synchronize", "Memcpy", "HostAlloc", "cudaMalloc")  # calls of CUDA's library
Call = Callable[[], object]


def arguments(dtype: str, overrides: list[str], batch: int = 1) -> argparse.Namespace:
    """Return the options of `dev/benchmark.py`."""
    detections = 100 if ON_GPU else 10
    return argparse.Namespace(
        config_file=models.CONFIG_FILE,
        size=SIZE,
        batch=batch,
        device=DEVICE,
        dtype=dtype,
        rounds=1,  # medians are taken here
        threads=torch.get_num_threads(),
        objects=20,
        positive_iou=0.5,
        opts=["TEST.DETECTIONS_PER_IMAGE", detections, *overrides],
    )


def medians(calls: dict[str, Call]) -> dict[str, float]:
    """Return the median milliseconds of functions that are called in turn."""
    times = time_in_turn(calls, rounds=7 if ON_GPU else 1, warmup=2 if ON_GPU else 0)
    return {name: 1e3 * statistics.median(t["wall"]) for name, t in times.items()}


def profile(call: Call, count: int = 20) -> dict[str, Any]:
    """Return the kernels that take the longest, and the calls of the host."""
    if not ON_GPU:
        return {}
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA, activity.CPU]) as record:
        wait()
        start = time.perf_counter()
        call()
        wait()
        wall = time.perf_counter() - start
    events = record.key_averages()
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    return {
        "wall ms": 1e3 * wall,
        "kernels ms": sum(e.self_device_time_total for e in kernels) / 1e3,
        "number": sum(e.count for e in kernels),
        "host": {e.key: e.count for e in events if any(word in e.key for word in _HOST)},
        "top": [[e.key[:110], e.count, e.self_device_time_total / 1e3] for e in kernels[:count]],
    }


def inference_calls(args: argparse.Namespace) -> dict[str, Call]:
    """Return detections by both models, whole and without pasting masks into the image."""
    cfg = models.configure(args)
    ours, theirs = (inference.build(cfg, name, SIZE, 1) for name in (OURS, THEIRS))
    calls = {
        name: inference.make_call(cfg, name, model, SIZE, 1)
        for name, model in ((OURS, ours), (THEIRS, theirs))
    }
    image = make_image(SIZE).to(DEVICE)

    @torch.no_grad()
    def detect() -> object:
        return ours.detect([image])

    def unpasted() -> object:
        theirs.transform.postprocess = lambda result, *_: result
        try:
            return calls[THEIRS]()
        finally:
            del theirs.transform.postprocess

    return {
        **calls,
        f"{OURS}, without pasting": detect,
        f"{THEIRS}, without pasting": unpasted,
    }


def training_calls(args: argparse.Namespace) -> dict[str, Call]:
    """Return a step of both models."""
    cfg = models.configure(args)
    return {
        name: functools.partial(train.make_step(args, cfg, name)[1], SIZE)
        for name in (OURS, THEIRS)
    }


if __name__ == "__main__":
    file, dtype, wanted, *overrides = sys.argv[1:]
    results = Results(file, " ".join([dtype, *overrides]))
    if not ON_GPU and dtype == "tf32":
        dtype = "float32"
    tasks: dict[str, Callable[[], dict[str, Call]]] = {
        "inference": lambda: inference_calls(arguments(dtype, overrides)),
        "training, 1 image": lambda: training_calls(arguments(dtype, overrides)),
        "training, 2 images": lambda: training_calls(arguments(dtype, overrides, batch=2)),
    }
    for name in [name for name in tasks if wanted in ("all", name)]:
        make_calls = tasks[name]
        calls: dict[str, Call] = {}

        def measure(make_calls: Callable = make_calls, calls: dict = calls) -> dict[str, float]:
            calls.update(make_calls())
            return medians(calls)

        results.step(f"{name}, ms", 100, measure)
        for model in [m for m in (OURS, THEIRS) if m in calls]:
            kernels = functools.partial(profile, calls[model])
            results.step(f"{name}, kernels of {model}", 20, kernels)
