"""swap_align2nat per level of the bipyramid, in turn with copy_, x + 1 and plain PyTorch."""

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import median_ratio, time_in_turn
from tensormask.layers import _native
from tensormask.layers._native import op_backend
from tensormask.layers.swap_align2nat import swap_align2nat, swap_align2nat_at
from tensormask.utils.errors import UserError
from tensormask.utils.tables import format_records

# The finest level of an image of 800 x 1344 px, and the masks of the two window sizes there.
HEIGHT, WIDTH = 200, 336
_SIDES = (15, 11)
_LAMBDAS = (1, 2, 4, 8, 16, 32)
_NUM_WINDOWS = 100
_CALLS_ON_GPU = 20  # in one measurement: a single call is shorter than the clock's resolution

Times = dict[str, list[float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    dtypes = ("float64", "float32", "float16", "bfloat16")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=dtypes)
    parser.add_argument("--lambdas", nargs="+", type=int, default=_LAMBDAS, metavar="N")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default: 7")
    parser.add_argument(
        "--without-reference", action="store_true", help="leave out the slow plain PyTorch"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print tables, and return their numbers."""
    if args.device not in _native.DEVICES:
        raise UserError(f"no compiled operator to measure: {_native.why_not(args.device)}")
    dense, windows = [], []
    for dtype in (getattr(torch, name) for name in args.dtypes):
        for side in _SIDES:
            rows = [_measure_dense(args, side, lambda_val, dtype) for lambda_val in args.lambdas]
            dense += rows
            windows.append(_measure_windows(args, side, dtype, rows[-1]))
    print(
        f"dense, (1, V*U, {HEIGHT}, {WIDTH}), {args.device}, {torch.get_num_threads()} threads; "
        f"median of {args.rounds} rounds in turn. `forward` and `backward` write into existing "
        "memory like copy_, `op` is the public function; `/` is a ratio of times."
    )
    print(format_records(dense))
    print(
        f"\n{_NUM_WINDOWS} windows over the levels, each level a feature map of its own. `even` is "
        f"the time of the dense `op` at lambda = {args.lambdas[-1]} for as many pixels."
    )
    print(format_records(windows))
    return {"dense": dense, "windows": windows}


def _measure_dense(
    args: argparse.Namespace, side: int, lambda_val: int, dtype: torch.dtype
) -> dict[str, Any]:
    ops = torch.ops.tensormask
    x = torch.randn(1, side**2, HEIGHT, WIDTH, device=args.device).to(dtype)
    copy, grad_x = torch.empty_like(x), torch.empty_like(x)
    out = ops.swap_align2nat(x, lambda_val, -6.0)
    grad = torch.randn_like(out)
    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: copy.copy_(x),
        "plus one": lambda: x + 1,
        "forward": lambda: ops.swap_align2nat.out(x, lambda_val, -6.0, out=out),
        "backward": lambda: ops.swap_align2nat_backward.out(
            grad, lambda_val, HEIGHT, WIDTH, out=grad_x
        ),
        "op": lambda: swap_align2nat(x, lambda_val),
    }
    if not args.without_reference:
        calls |= _reference(lambda x: [swap_align2nat(x, lambda_val)], [x], [grad])
    times = _time(args, calls)
    row = {"dtype": str(dtype)[6:], "V*U": side**2, "lambda": lambda_val}
    row["copy GB/s"] = 2e-6 * x.numel() * x.element_size() / statistics.median(times["copy"])
    for name, base, ratio in (
        ("forward", "copy", "forward/copy"),
        ("backward", "copy", "backward/copy"),
        ("op", "plus one", "/(x+1)"),
    ):
        row[f"{name} ms"] = statistics.median(times[name])
        row[ratio] = median_ratio(times[name], times[base])
    return row | _speedups(times)


def _measure_windows(
    args: argparse.Namespace, side: int, dtype: torch.dtype, dense: dict[str, Any]
) -> dict[str, Any]:
    """Measure the windows of all levels together; each level reads a feature map of its own."""
    ops = torch.ops.tensormask
    generator = torch.Generator().manual_seed(0)
    maps, windows = [], []
    for i, lambda_val in enumerate(args.lambdas):
        count = (_NUM_WINDOWS + i) // len(args.lambdas)
        limits = (1, math.ceil(HEIGHT / lambda_val), math.ceil(WIDTH / lambda_val))
        columns = [torch.randint(limit, (count,), generator=generator) for limit in limits]
        maps.append(torch.randn(1, side**2, HEIGHT, WIDTH, device=args.device).to(dtype))
        windows.append(torch.stack(columns, 1).to(args.device))
    levels = list(zip(windows, args.lambdas, strict=True))

    def forward(*maps: Tensor) -> list[Tensor]:
        return [swap_align2nat_at(x, *level) for x, level in zip(maps, levels, strict=True)]

    def backward() -> None:
        for grad, level in zip(grads, levels, strict=True):
            ops.swap_align2nat_at_backward(grad, *level, 1, HEIGHT, WIDTH)

    grads = [torch.randn_like(masks) for masks in forward(*maps)]
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: forward(*maps),
        "backward": backward,
    }
    if not args.without_reference:
        calls |= _reference(forward, maps, grads)
    times = _time(args, calls)
    pixels = sum(grad.numel() for grad in grads)
    lambda_val = dense["lambda"]
    locations = math.ceil(HEIGHT / lambda_val) * math.ceil(WIDTH / lambda_val)
    even = dense["op ms"] * pixels / (side * lambda_val) ** 2 / locations
    row = {"dtype": str(dtype)[6:], "V*U": side**2, "pixels": pixels, "even ms": even}
    row["forward ms"] = statistics.median(times["forward"])
    row["/even"] = row["forward ms"] / even
    row["backward ms"] = statistics.median(times["backward"])
    return row | _speedups(times)


def _reference(
    function: Callable[..., list[Tensor]], inputs: list[Tensor], grads: list[Tensor]
) -> dict[str, Callable[[], object]]:
    """Return the passes of a function in plain PyTorch."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with op_backend("reference"):
        results = function(*leaves)

    def forward() -> None:
        with op_backend("reference"):
            function(*inputs)

    return {
        "reference forward": forward,
        "reference backward": lambda: torch.autograd.grad(
            results, leaves, grads, retain_graph=True
        ),
    }


def _time(args: argparse.Namespace, calls: dict[str, Callable[[], object]]) -> Times:
    """Return the milliseconds of a call in each round, by name."""
    number = _CALLS_ON_GPU if args.device == "cuda" else 1
    times = time_in_turn(calls, rounds=args.rounds, number=number)
    return {name: [1e3 * t for t in of_name["wall"]] for name, of_name in times.items()}


def _speedups(times: Times) -> dict[str, float]:
    return {
        f"{name} speedup": median_ratio(times[f"reference {name}"], times[name])
        for name in ("forward", "backward")
        if f"reference {name}" in times
    }
