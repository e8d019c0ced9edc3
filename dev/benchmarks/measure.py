"""Time functions in turn, compare their times, and run a function in a fresh process."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from torch.utils.benchmark import timer  # waits for the GPU before it reads the clock


def time_in_turn(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1, number: int = 1
) -> dict[str, dict[str, list[float]]]:
    """Time functions round by round in one process, so that all meet the same machine.

    Each round begins with another function, and calls each of them `number` times.

    Returns:
        By name the `wall` seconds per call of each round, and the `cpu` seconds of all threads.
    """
    names = list(calls)
    times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in names}
    for round_number in range(-warmup, rounds):
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            wall, cpu = timer(), time.process_time()
            for _ in range(number):
                calls[name]()
            wall, cpu = timer() - wall, time.process_time() - cpu
            if round_number >= 0:
                times[name]["wall"].append(wall / number)
                times[name]["cpu"].append(cpu / number)
    return times


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Return the median over the rounds of one function's time divided by another's."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def compare(times: Mapping[str, Mapping[str, list[float]]], name: str, base: str) -> dict[str, Any]:
    """Return a row of a table: medians of a function, and ratios to `base` if it was timed."""
    row: dict[str, Any] = {"model": name}
    for kind, title in (("wall", ""), ("cpu", "CPU ")):
        row[f"{title}s"] = statistics.median(times[name][kind])
        if base in times:
            row[f"{title}/ base"] = median_ratio(times[name][kind], times[base][kind])
    return row


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a function of a module, run where nothing else has been run."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
