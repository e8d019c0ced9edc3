"""The peak memory of a call, measured in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_TOOLS = Path(__file__).resolve().parents[1]
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_KB_PER_MIB, _BYTES_PER_MIB = 1024, 2**20

# A small call, after which everything is loaded, and the call that is measured.
Calls = tuple[Callable[[], object], Callable[[], object]]


def peak_memory(function: str, device: str = "cpu", **options: Any) -> dict[str, float]:
    """Measure in a fresh process what a call needs at its peak, above what it needs before.

    Args:
        function: "module:name" of a function that is called with `options` and gives `Calls`. Its
            module is one of `benchmarks`, and the options are what JSON can hold.
        device: of the memory: "cpu" counts the resident memory of the process, "cuda" what
            PyTorch's allocator has given out.

    Returns:
        in MiB `base`, the memory after the small call; `peak`, the most during the other; `above`,
        their difference.

    Raises:
        ValueError: the process has failed, or this is no Linux.
    """
    if device == "cpu" and not _CLEAR.exists():
        raise ValueError("the peak of resident memory is measured on Linux only: leave memory out")
    request = json.dumps({"function": function, "device": device, "options": options})
    command = [sys.executable, "-m", "benchmarks.memory", request]
    done = subprocess.run(command, cwd=_TOOLS, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"memory of {function}: the process has failed\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(calls: Calls, device: str) -> dict[str, float]:
    """What `peak_memory` returns, of this process."""
    small, large = calls
    small()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated() / _BYTES_PER_MIB
        large()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / _BYTES_PER_MIB
        return {"base": base, "peak": peak, "above": peak - base}
    _give_back_free_memory()
    base = _status("VmRSS")
    _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    large()
    peak = _status("VmHWM")
    return {"base": base, "peak": peak, "above": peak - base}


def _give_back_free_memory() -> None:
    """What glibc keeps of freed memory would be there to be used, and hide as much of the peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(key: str) -> float:
    """A line of the process's status, in MiB."""
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{key}:")]
    return int(line.split()[1]) / _KB_PER_MIB


def main() -> None:
    """Answer one request of `peak_memory`: the numbers are the last line that is printed."""
    request = json.loads(sys.argv[1])
    module, name = request["function"].split(":")
    calls = getattr(importlib.import_module(module), name)(**request["options"])
    print(json.dumps(measure(calls, request["device"])))


if __name__ == "__main__":
    main()
