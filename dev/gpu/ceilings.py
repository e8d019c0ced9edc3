"""The limits of a card and its host: bytes, products, convolutions by layout, launches, waits."""

import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from gpu import DEVICE, ON_GPU, Results, wait
from tensormask.layers import _native


def ms(call: Callable[[], object], inner: int = 10, rounds: int = 5) -> float:
    """Return the median milliseconds of a call."""
    call()
    call()
    times = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        for _ in range(inner):
            call()
        wait()
        times.append((time.perf_counter() - start) / inner * 1e3)
    return statistics.median(times)


def bandwidth() -> float:
    """Return the TB/s of a copy, read and written."""
    size = 1 << (30 if ON_GPU else 22)
    a = torch.randn(size // 4, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * size / ms(lambda: b.copy_(a)) / 1e9


def products() -> dict[str, float]:
    """Return the TFLOP/s of a product of large matrices, by precision."""
    side = 8192 if ON_GPU else 256
    result = {}
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("float32", torch.float32, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        x, y = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
        result[name] = 2 * side**3 / ms(lambda x=x, y=y: x @ y, 4, 3) / 1e9
    return result


# Inputs, outputs and kernel of the towers' convolutions; 225 channels are not aligned, 232 are.
_CONVOLUTIONS = ((256, 256, 3), (128, 128, 3), (128, 225, 1), (128, 232, 1))


def convolutions() -> dict[str, dict[str, float]]:
    """Return times and TFLOP/s of `_CONVOLUTIONS` by dtype and layout."""
    height, width = (200, 336) if ON_GPU else (20, 33)
    result = {}
    for dtype in (torch.float32, torch.bfloat16) if ON_GPU else (torch.float32,):
        for layout in (torch.contiguous_format, torch.channels_last):
            for inputs, outputs, side in (
                (256, 256, 3),
                (128, 128, 3),
                (128, 225, 1),
                (128, 232, 1),
            ):
                conv = nn.Conv2d(inputs, outputs, side, padding=side // 2).to(DEVICE, dtype)
                conv = conv.to(memory_format=layout)
                x = torch.randn(1, inputs, height, width, device=DEVICE, dtype=dtype)
                x = x.contiguous(memory_format=layout).requires_grad_()
                y = conv(x)
                wanted, grad = (x, *conv.parameters()), torch.randn_like(y)
                with torch.no_grad():
                    forward = ms(lambda conv=conv, x=x: conv(x))
                backward = ms(
                    lambda y=y, wanted=wanted, grad=grad: torch.autograd.grad(
                        y, wanted, grad, retain_graph=True
                    ),
                    *(5, 3),
                )
                flops = 2 * inputs * outputs * side**2 * height * width
                name = f"{side}x{side} {inputs}->{outputs} {str(dtype)[6:]} {str(layout)[6:]}"
                result[name] = {
                    "forward ms": forward,
                    "forward TFLOP/s": flops / forward / 1e9,
                    "backward ms": backward,
                    "backward TFLOP/s": 2 * flops / backward / 1e9,
                }
    return result


def host() -> dict[str, float]:
    """Return the microseconds of a launch, a read, and uploads."""
    x = torch.zeros(8, device=DEVICE)
    calls: dict[str, Callable[[], object]] = {
        "small operation": lambda: x.add_(1),
        "item": lambda: x[0].item(),
        "tensor of a number": lambda: torch.tensor(1.5, device=DEVICE),
    }
    if ON_GPU:
        calls["pinned upload"] = lambda: torch.zeros(64).pin_memory().to(DEVICE, non_blocking=True)
    return {name: 1e3 * ms(call, 200, 3) for name, call in calls.items()}


if __name__ == "__main__":
    results = Results(sys.argv[1])
    results["versions"] = {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "CPUs": os.cpu_count(),
        "library": str(_native.LIBRARY),
        "its devices": sorted(_native.DEVICES),
    }
    if ON_GPU:
        card = torch.cuda.get_device_properties(0)
        results["GPU"] = {
            "name": card.name,
            "multiprocessors": card.multi_processor_count,
            "capability": [card.major, card.minor],
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
        }
    for name, seconds, function in (
        ("copy TB/s", 15, bandwidth),
        ("product TFLOP/s", 15, products),
        ("convolutions", 30, convolutions),
        ("host us", 15, host),
    ):
        results.step(name, seconds, function)
