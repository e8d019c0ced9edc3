"""The compiled operator at windows: checked against its CPU kernels, and its times.

python -m gpu.kernels LABEL FILE   LABEL names the library in FILE
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.models import CONFIG_FILE

from gpu import DEVICE, ON_GPU, SIZE, Results
from tensormask.commands.synthetic import make_target
from tensormask.config import get_cfg
from tensormask.layers import _native
from tensormask.modeling.assignment import assign
from tensormask.modeling.build import build_windows

ops = torch.ops.tensormask


def ms(call: Callable[[], object], inner: int = 10, rounds: int = 7) -> float:
    """Return the median milliseconds of a call, by the GPU's clock."""
    if not ON_GPU:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        for _ in range(inner):
            call()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / inner)
    return statistics.median(times)


def measure(maps: torch.Tensor, windows: torch.Tensor, ratio: int) -> dict[str, Any]:
    """Compare and time both passes at windows of maps (N, V*U, H, W) on the CPU."""
    size = (maps.shape[0], *maps.shape[2:])
    expected = ops.swap_align2nat_at(maps, windows, ratio, -6.0)
    grad = torch.randn_like(expected)
    expected_back = ops.swap_align2nat_at_backward(grad, windows, ratio, *size)
    x, at, g = (t.to(DEVICE) for t in (maps, windows, grad))
    last = x.contiguous(memory_format=torch.channels_last)  # as the 1x1 convolution returns it

    def forward(x: torch.Tensor = x) -> torch.Tensor:
        return ops.swap_align2nat_at(x, at, ratio, -6.0)

    def backward() -> torch.Tensor:
        return ops.swap_align2nat_at_backward(g, at, ratio, *size)

    eps = torch.finfo(maps.dtype).eps
    return {
        "forward error/eps": ((forward().cpu() - expected).abs().max() / eps).item(),
        "backward error/eps": ((backward().cpu() - expected_back).abs().max() / eps).item(),
        "forward ms": ms(forward),
        "forward channels_last ms": ms(lambda: forward(last)),
        "backward ms": ms(backward),
        "zero fill ms": ms(lambda: torch.zeros_like(x)),
    }


def training_image(images: int, objects: int) -> list[dict[str, Any]]:
    """Measure at the positive windows of a training batch, per level, size and dtype."""
    cfg = get_cfg()
    cfg.merge_from_file(CONFIG_FILE)
    geometry, rows = build_windows(cfg), []
    boxes = [make_target(SIZE, objects, seed=i)["boxes"] for i in range(images)]
    positives = assign(boxes, geometry, geometry.grids(SIZE))
    height, width = (-(-side // geometry.strides[0]) for side in SIZE)
    for level, size, at in positives.groups():
        ratio, side = geometry.strides[level] // geometry.strides[0], geometry.mask_sizes[size]
        columns = (positives.image, positives.y, positives.x)
        windows = torch.stack(columns, 1)[at].contiguous()
        for dtype in (torch.float32, torch.bfloat16):
            maps = torch.randn(images, side**2, height, width).to(dtype)
            row = {"images": images, "lambda": ratio, "side": side, "windows": len(windows)}
            rows.append({**row, "dtype": str(dtype)[6:], **measure(maps, windows, ratio)})
    return rows


def many_windows(count: int) -> dict[str, Any]:
    """Measure at random windows of one image."""
    height, width = (-(-side // 4) for side in SIZE)
    windows = torch.stack([torch.randint(n, (count,)) for n in (1, height, width)], 1)
    return {"windows": count, **measure(torch.randn(1, 225, height, width), windows, 1)}


if __name__ == "__main__":
    results = Results(sys.argv[2], sys.argv[1])
    results["library"] = str(_native.LIBRARY)
    results.step("1 image of 20 objects", 30, lambda: training_image(1, 20))
    results.step("2 images of 7 objects", 30, lambda: training_image(2, 7))
    for number in (1000, 6000) if ON_GPU else (50,):
        results.step(f"{number} random windows", 20, lambda count=number: many_windows(count))
