"""What a run says of itself: the log, a console line, `metrics.json`, TensorBoard."""

import json
import logging
import math
import statistics
import sys
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from tensormask.engine.checkpoint import write_atomically

logger = logging.getLogger(__name__)

ETA_ITERATIONS = 200
Results = Mapping[str, Mapping[str, float]]


def setup_logging(output_dir: str | Path) -> None:
    """Send the messages of this package to the console and, after what is there, to `log.txt`.

    A second call moves the log to another folder.
    """
    package = logging.getLogger("tensormask")
    package.setLevel(logging.INFO)
    for handler in list(package.handlers):
        package.removeHandler(handler)
        handler.close()
    log_file = logging.FileHandler(Path(output_dir) / "log.txt", encoding="utf-8")
    form = logging.Formatter("[%(asctime)s] %(levelname)s %(message)s", "%m/%d %H:%M:%S")
    for handler in (logging.StreamHandler(sys.stdout), log_file):
        handler.setFormatter(form)
        package.addHandler(handler)


def json_line(record: Mapping[str, object]) -> str:
    """Write a record as one line of valid JSON; NaN and infinities become null."""
    valid = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(valid, allow_nan=False) + "\n"


def flatten_results(results: Results) -> dict[str, float]:
    """Name each number by its way through nested results: `{"bbox/AP": 40.0, ...}`."""
    flat = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{name}": number for name, number in flatten_results(value).items()}
        else:
            flat[key] = value
    return flat


def format_progress(iteration: int, max_iter: int, metrics: Mapping[str, float]) -> str:
    """Make the console line of a training iteration from its metrics (`metrics.json`'s names)."""
    eta = timedelta(seconds=round(metrics["eta_seconds"]))
    losses = "  ".join(f"{k}: {v:.4g}" for k, v in metrics.items() if "loss" in k)
    return (
        f"iter: {iteration + 1}/{max_iter}  eta: {eta}  {losses}  "
        f"lr: {metrics['lr']:.5g}  grad_norm: {metrics['grad_norm']:.4g}  "
        f"time: {metrics['time']:.4f} s  data_time: {metrics['data_time']:.4f} s"
    )


class RecentMetrics:
    """Collects the metrics of the iterations since the last line, and foretells the end.

    A line shows medians over its iterations, which a single slow or unlucky one does not move; the
    time left is the mean of the last 200 iterations times those that are left.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}
        self._times: deque[float] = deque(maxlen=ETA_ITERATIONS)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one iteration; `time` is its length in seconds."""
        for name, value in metrics.items():
            self._values.setdefault(name, []).append(value)
        self._times.append(metrics["time"])

    def pop_medians(self) -> dict[str, float]:
        """Give the median of each metric since the last call, and start afresh."""
        medians = {name: statistics.median(values) for name, values in self._values.items()}
        self._values.clear()
        return medians

    def seconds_left(self, iterations_left: int) -> float:
        """Estimate the seconds that `iterations_left` iterations will take."""
        return statistics.fmean(self._times) * iterations_left


class MetricsWriter:
    """Appends records to `metrics.json` and TensorBoard, each under its iteration (from 0)."""

    def __init__(self, output_dir: str | Path, start_iteration: int) -> None:
        path = Path(output_dir) / "metrics.json"
        drop_metrics_from(path, start_iteration)
        self._file = open(path, "a", encoding="utf-8")
        # purge_step hides what a stopped run wrote beyond the checkpoint.
        self._board = SummaryWriter(str(output_dir), purge_step=start_iteration)

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics, if any; `metrics.json` is flushed, so that a kill loses no line."""
        if not metrics:
            return
        self._file.write(json_line({"iteration": iteration, **metrics}))
        self._file.flush()
        for name, value in metrics.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, iteration)

    def write_faults(self, iteration: int, faults: Mapping[str, object] | None) -> None:
        """Append a line `{"iteration": ..., "faults": ...}` to `metrics.json`, if there are any."""
        if faults is not None:
            self._file.write(json_line({"iteration": iteration, "faults": faults}))
            self._file.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def append_faults(output_dir: str | Path, faults: Mapping[str, object] | None) -> None:
    """Append the faults that an evaluation by itself has found to `metrics.json`, if any."""
    if faults is not None:
        with open(Path(output_dir) / "metrics.json", "a", encoding="utf-8") as file:
            file.write(json_line({"iteration": 0, "faults": faults}))


def drop_metrics_from(path: str | Path, start_iteration: int) -> None:
    """Keep the lines of a `metrics.json` before `start_iteration`, so that none comes up twice.

    A line that is no JSON, as a killed run leaves it at the end, goes too. What goes is counted in
    the log.
    """
    path = Path(path)
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _iteration_of(line) < start_iteration]
    if len(kept) < len(lines):
        logger.info(
            "%s: %d of %d lines of an earlier run dropped, from iteration %d on",
            path,
            len(lines) - len(kept),
            len(lines),
            start_iteration,
        )
        write_atomically(path, lambda file: file.write("".join(kept).encode()))


def _iteration_of(line: str) -> float:
    if not line.endswith("\n"):
        return math.inf
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return math.inf
