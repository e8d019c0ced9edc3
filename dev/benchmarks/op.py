"""swap_align2nat per level of the bipyramid, in turn with copy_, x + 1 and the reference."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import bare
from .timing import format_table, time_in_turn

bare.prepare()

from tensormask.layers import _native  # noqa: E402
from tensormask.layers._native import op_backend  # noqa: E402
from tensormask.layers.swap_align2nat import swap_align2nat, swap_align2nat_at  # noqa: E402

# The finest level of an image of 800 x 1344 px, and the masks of the two window sizes there.
_HEIGHT, _WIDTH = 200, 336
_SIDES = (15, 11)
_LAMBDAS = (1, 2, 4, 8, 16, 32)
_NUM_WINDOWS = 100
# On a GPU a call is over before the clock has ticked: many are timed at once.
_CALLS_ON_GPU = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32"],
        choices=("float64", "float32", "float16", "bfloat16"),
        metavar="DTYPE",
        help="float64, float32, float16, bfloat16 (default: float32)",
    )
    parser.add_argument(
        "--lambdas", nargs="+", type=int, default=list(_LAMBDAS), metavar="N", help="default: all"
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default: 7")
    parser.add_argument(
        "--without-reference", action="store_true", help="leave the slow PyTorch reference out"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print tables, and return their numbers."""
    if args.device not in _native.DEVICES:
        raise ValueError(f"there is nothing to measure: {_native.why_not(args.device)}")
    dense, windows = [], []
    for dtype in (getattr(torch, name) for name in args.dtypes):
        for side in _SIDES:
            rows = [_measure_dense(args, side, lambda_val, dtype) for lambda_val in args.lambdas]
            dense += rows
            windows.append(_measure_windows(args, side, dtype, rows[-1]))
    print(
        f"dense, (1, V*U, {_HEIGHT}, {_WIDTH}), {args.device}, {torch.get_num_threads()} threads; "
        f"median of {args.rounds} rounds in turn. `forward` and `backward` write into existing "
        "memory as copy_ does, `op` is the public function; `/` is a ratio of times."
    )
    print(format_table(dense))
    print(
        f"\n{_NUM_WINDOWS} windows over the levels, each level a map of its own. `even` is their "
        f"pixels times the time of `op` per pixel at lambda = {args.lambdas[-1]}: both make their "
        "result anew."
    )
    print(format_table(windows))
    return {"dense": dense, "windows": windows}


def _measure_dense(
    args: argparse.Namespace, side: int, lambda_val: int, dtype: torch.dtype
) -> dict[str, Any]:
    ops = torch.ops.tensormask
    x = torch.randn(1, side**2, _HEIGHT, _WIDTH, device=args.device).to(dtype)
    copy, grad_x = torch.empty_like(x), torch.empty_like(x)
    out = ops.swap_align2nat(x, lambda_val, -6.0)
    grad = torch.randn_like(out)
    calls = {
        "copy": lambda: copy.copy_(x),
        "plus one": lambda: x + 1,
        "forward": lambda: ops.swap_align2nat.out(x, lambda_val, -6.0, out=out),
        "backward": lambda: ops.swap_align2nat_backward.out(
            grad, lambda_val, _HEIGHT, _WIDTH, out=grad_x
        ),
        "op": lambda: swap_align2nat(x, lambda_val),
    }
    if not args.without_reference:
        calls |= _reference_calls(x, grad, lambda x: swap_align2nat(x, lambda_val))
    times = _time(args, calls)
    row = {
        "dtype": str(dtype).removeprefix("torch."),
        "V*U": side**2,
        "lambda": lambda_val,
        "copy GB/s": 2e-6 * x.numel() * x.element_size() / statistics.median(times["copy"]),
    }
    for name in ("forward", "backward"):
        row |= _compared(times, name, "copy", f"{name} ms", "/copy")
    row |= _compared(times, "op", "plus one", "op ms", "/(x+1)")
    return row | _speedups(times)


def _measure_windows(
    args: argparse.Namespace, side: int, dtype: torch.dtype, dense: dict[str, Any]
) -> dict[str, Any]:
    """All levels' windows as one: each level reads a map of its own."""
    ops = torch.ops.tensormask
    generator = torch.Generator().manual_seed(0)
    levels = []
    for i, lambda_val in enumerate(args.lambdas):
        count = (_NUM_WINDOWS + i) // len(args.lambdas)
        limits = (1, math.ceil(_HEIGHT / lambda_val), math.ceil(_WIDTH / lambda_val))
        columns = [torch.randint(limit, (count,), generator=generator) for limit in limits]
        x = torch.randn(1, side**2, _HEIGHT, _WIDTH, device=args.device).to(dtype)
        levels.append((x, torch.stack(columns, 1).to(args.device), lambda_val))
    grads = [torch.randn_like(swap_align2nat_at(*level)) for level in levels]

    def forward(function: Callable[..., Tensor]) -> list[Tensor]:
        return [function(x, windows, lambda_val) for x, windows, lambda_val in levels]

    def backward() -> None:
        for grad, (_, windows, lambda_val) in zip(grads, levels, strict=True):
            ops.swap_align2nat_at_backward(grad, windows, lambda_val, 1, _HEIGHT, _WIDTH)

    def native(x: Tensor, windows: Tensor, lambda_val: int) -> Tensor:
        return ops.swap_align2nat_at(x, windows, lambda_val, -6.0)

    calls = {"forward": lambda: forward(native), "backward": backward}
    if not args.without_reference:
        with op_backend("reference"):
            for x, *_ in levels:
                x.requires_grad_()
            outs = forward(swap_align2nat_at)
            inputs = [x for x, *_ in levels]
            calls["reference forward"] = lambda: _with_reference(forward, swap_align2nat_at)
            calls["reference backward"] = lambda: torch.autograd.grad(
                outs, inputs, grads, retain_graph=True
            )
    with torch.no_grad():
        times = _time(args, calls)
    pixels = sum(grad.numel() for grad in grads)
    even = pixels * dense["op ms"] / (side * dense["lambda"]) ** 2
    even /= math.ceil(_HEIGHT / dense["lambda"]) * math.ceil(_WIDTH / dense["lambda"])
    row = {
        "dtype": str(dtype).removeprefix("torch."),
        "V*U": side**2,
        "pixels": pixels,
        "even ms": even,
        "forward ms": statistics.median(times["forward"]),
        "/even": statistics.median(times["forward"]) / even,
        "backward ms": statistics.median(times["backward"]),
    }
    if args.device == "cuda":
        row["kernels us"] = _kernel_time(lambda: forward(native))
    return row | _speedups(times)


def _reference_calls(x: Tensor, grad: Tensor, function: Callable[[Tensor], Tensor]) -> dict:
    with op_backend("reference"):
        leaf = x.clone().requires_grad_()
        result = function(leaf)
    return {
        "reference forward": lambda: _with_reference(function, x),
        "reference backward": lambda: torch.autograd.grad(result, leaf, grad, retain_graph=True),
    }


def _with_reference(function: Callable, *arguments: Any) -> Any:
    with op_backend("reference"):
        return function(*arguments)


def _time(args: argparse.Namespace, calls: dict[str, Callable]) -> dict[str, list[float]]:
    """Milliseconds a call of each round, by name."""
    many = _CALLS_ON_GPU if args.device == "cuda" else 1
    repeated = {name: _repeated(call, many) for name, call in calls.items()}
    times = time_in_turn(repeated, rounds=args.rounds, device=args.device)
    return {name: [1000 * t / many for t in row] for name, row in times.items()}


def _repeated(call: Callable, times: int) -> Callable[[], None]:
    def repeat() -> None:
        for _ in range(times):
            call()

    return repeat


def _compared(times: dict, name: str, base: str, column: str, ratio: str) -> dict[str, float]:
    """The median time, and the median over the rounds of its ratio to another."""
    pairs = zip(times[name], times[base], strict=True)
    ratios = [time / base_time for time, base_time in pairs]
    short = name if name != "op" else ""
    return {column: statistics.median(times[name]), f"{short}{ratio}": statistics.median(ratios)}


def _speedups(times: dict[str, list[float]]) -> dict[str, float]:
    return {
        f"{name} speedup": statistics.median(
            slow / fast for slow, fast in zip(times[f"reference {name}"], times[name], strict=True)
        )
        for name in ("forward", "backward")
        if f"reference {name}" in times
    }


def _kernel_time(call: Callable) -> float:
    """Microseconds that kernels ran on the GPU, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    return sum(
        event.self_device_time_total
        for event in record.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
