"""Times callables in turn, prints tables, and says on what machine."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def time_in_turn(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    device: str | torch.device = "cpu",
) -> dict[str, list[float]]:
    """Times callables round by round in one process, so that all meet the same machine.

    Each round begins with another candidate. On a GPU the device is idle before and after a call.

    Args:
        candidates: what to call, by name.
        rounds: how often each is timed.
        warmup: rounds before that which are not timed.

    Returns:
        The seconds of each round, by name.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            synchronize(device)
            start = time.perf_counter()
            candidates[name]()
            synchronize(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summarise(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, dict[str, float]]:
    """The `median_s`, `min_s` and `speedup` of each candidate of `time_in_turn`.

    The speedup is the median over the rounds of how many times as fast as `base` it was in that
    round.
    """
    return {
        name: {
            "median_s": statistics.median(times),
            "min_s": min(times),
            "speedup": statistics.median(
                base_time / time for base_time, time in zip(seconds[base], times, strict=True)
            ),
        }
        for name, times in seconds.items()
    }


def median_ratio(times: Sequence[float], base_times: Sequence[float]) -> float:
    """The median over the rounds of `time_in_turn` of one candidate's time over another's."""
    return statistics.median(
        time / base_time for time, base_time in zip(times, base_times, strict=True)
    )


def synchronize(device: str | torch.device) -> None:
    """Wait until a GPU is idle."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a table of text: the keys above, numbers to the right."""
    header = list(rows[0])
    cells = [header] + [[_format_cell(row[key]) for key in header] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [isinstance(rows[0][key], int | float) for key in header]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in cells
    )


def describe_machine() -> dict[str, Any]:
    """What numbers depend on: processor, threads, GPU, versions, and the commit of this tree."""
    cuda = torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _format_cell(value: Any) -> str:
    # Four digits say as much as a measurement holds.
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this tree, with "-dirty" behind it where files differ; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
