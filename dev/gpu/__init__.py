"""What `make gpu-check` runs in a few minutes of a GPU: see check.sh. Each module is a step.

A step writes its results after each entry, and an entry that fails or takes too long does not keep
the next ones from running.
"""

import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmarks  # noqa: F401 (makes tensormask importable)
import torch

DEVICE = os.environ.get("DEVICE", "cuda")  # "cpu" for a dry run: smaller, without its times
ON_GPU = DEVICE == "cuda"
SIZE = (800, 1344) if ON_GPU else (128, 160)


class Results(dict):
    """Entries that are written to a JSON file as they come, also beside those of other processes.

    Args:
        path: the file.
        part: the key of the entries in the file; "" for its top level.
    """

    def __init__(self, path: str, part: str = "") -> None:
        super().__init__()
        self.path, self.part = Path(path), part

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        whole = json.loads(self.path.read_text()) if self.path.exists() else {}
        whole.update({self.part: dict(self)} if self.part else self)
        self.path.write_text(json.dumps(whole, indent=1))
        print(name, json.dumps(value)[:400], flush=True)

    def step(self, name: str, seconds: int, function: Callable[[], Any]) -> None:
        """Store what a function returns, or its error; it has a limit of time."""

        def stop(*_: object) -> None:
            raise TimeoutError(f"more than {seconds} s")

        start = time.perf_counter()
        signal.signal(signal.SIGALRM, stop)
        signal.alarm(seconds if ON_GPU else 10 * seconds)
        try:
            value = function()
        except Exception as error:
            where = traceback.format_exc()[-900:]
            value = {"error": f"{type(error).__name__}: {error}"[:600], "where": where}
        finally:
            signal.alarm(0)
        if isinstance(value, dict):
            value["step s"] = round(time.perf_counter() - start, 2)
        self[name] = value


def wait() -> None:
    """Wait for the GPU."""
    if ON_GPU:
        torch.cuda.synchronize()
