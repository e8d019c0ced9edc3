"""What a run says of itself: the log, a console line, `metrics.json`, TensorBoard."""

import json
import logging
import math
import statistics
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tensormask.engine.distributed import is_main_process
from tensormask.utils.files import disk_full_explained, write_atomically

try:
    import resource
except ImportError:  # Windows
    resource = None

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
    # A full disk is said once, by the error of what needs the space, not by every line.
    log_file.handleError = lambda record: None
    console = logging.StreamHandler(sys.stdout)
    console.addFilter(lambda record: not (_is_progress(record) and sys.stderr.isatty()))
    form = logging.Formatter("[%(asctime)s] %(levelname)s %(message)s", "%m/%d %H:%M:%S")
    for handler in (console, log_file):
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
    losses = "  ".join(f"{k}: {v:.4g}" for k, v in metrics.items() if _is_loss(k))
    times = "  ".join(f"{k}: {v:.4f}" for k, v in metrics.items() if k.endswith("time"))
    return (
        f"iter: {iteration + 1}/{max_iter}  eta: {eta}  {losses}  "
        f"lr: {metrics['lr']:.5g}  grad_norm: {metrics['grad_norm']:.4g}  "
        f"{times} s  max_mem: {metrics['max_mem']:.0f} MiB"
    )


def _is_loss(name: str) -> bool:
    return "loss" in name and name != "loss_scale"


def log_progress(line: str) -> None:
    """Log a line that a terminal does not get, as it has `progress_bar`."""
    logger.info(line, extra={"progress": True})


def _is_progress(record: logging.LogRecord) -> bool:
    return getattr(record, "progress", False)


@contextmanager
def progress_bar(start: int, max_iter: int) -> Iterator[tqdm]:
    """A bar over the iterations on a terminal, which log lines pass above; nothing elsewhere."""
    shown = sys.stderr.isatty() and is_main_process()
    loggers = [logging.getLogger("tensormask")] if shown else []
    with (
        tqdm(total=max_iter, initial=start, desc="training", disable=not shown) as bar,
        logging_redirect_tqdm(loggers),
    ):
        yield bar


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has had, in MiB: tensors on a GPU, else all of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def format_summary(rows: Mapping[str, object]) -> str:
    """The table at the end of a run."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


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
    """Appends records to `metrics.json` and TensorBoard, each under its iteration (from 0).

    Of several processes only rank 0 writes.

    Raises:
        DiskFullError: from any method, if there is no space left.
    """

    def __init__(self, output_dir: str | Path, start_iteration: int) -> None:
        self._path = Path(output_dir) / "metrics.json"
        self._file = self._board = None
        if is_main_process():
            drop_metrics_from(self._path, start_iteration)
            self._file = open(self._path, "a", encoding="utf-8")
            # purge_step hides what a stopped run wrote beyond the checkpoint.
            self._board = SummaryWriter(str(output_dir), purge_step=start_iteration)

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics, if any; `metrics.json` is flushed, so that a kill loses no line."""
        if not metrics or self._file is None:
            return
        self._write_line({"iteration": iteration, **metrics})
        for name, value in metrics.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, iteration)

    def write_issues(self, iteration: int, issues: Mapping[str, object] | None) -> None:
        """Append a line `{"iteration": ..., "issues": ...}` to `metrics.json`, if there are any."""
        if issues is not None and self._file is not None:
            self._write_line({"iteration": iteration, "issues": issues})

    def write_evaluation(
        self, iteration: int, inference_dir: str | Path, *, drawn: bool, prefix: str = ""
    ) -> None:
        """Show TensorBoard what an evaluation has left in its folder, or in those of its sets.

        That are the sheet of predictions beside ground truth, and the curves of precision over
        recall, without the counts that TensorBoard would show with them.

        Args:
            drawn: whether this evaluation has drawn images; those that are there may be of an
                earlier one.
        """
        if self._board is None:
            return
        sheets = sorted(Path(inference_dir).glob("**/montage.png")) if drawn else []
        for path in sheets:
            tag = prefix + str(path.parent.relative_to(inference_dir) / "predictions")
            image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
            self._board.add_image(tag, image, iteration, dataformats="HWC")
        for path in sorted(Path(inference_dir).glob("**/precision_recall.json")):
            for task, curves in json.loads(path.read_text()).items():
                for name, precision in curves.items():
                    tag = prefix + str(path.parent.relative_to(inference_dir) / task / name)
                    self._write_curve(iteration, tag, precision)

    def _write_curve(self, iteration: int, tag: str, precision: Sequence[float]) -> None:
        if not precision:
            return
        # TensorBoard's order is that of thresholds on the score: recall falls.
        falling, nothing = np.array(precision[::-1]), np.zeros(len(precision))
        self._board.add_pr_curve_raw(
            tag,
            *(nothing, nothing, nothing, nothing),
            precision=falling,
            recall=np.linspace(1, 0, len(precision)),
            global_step=iteration,
            num_thresholds=len(precision),
        )

    def _write_line(self, record: Mapping[str, object]) -> None:
        with disk_full_explained(self._path):
            self._file.write(json_line(record))
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            with disk_full_explained(self._path):
                self._file.close()
                self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, object]]:
    """The records of a `metrics.json`, without a line that a killed run has left half written."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if _iteration_of(line) < math.inf]


def append_issues(output_dir: str | Path, issues: Mapping[str, object] | None) -> None:
    """Append the issues that an evaluation by itself has found to `metrics.json`, if any."""
    if issues is not None:
        with open(Path(output_dir) / "metrics.json", "a", encoding="utf-8") as file:
            file.write(json_line({"iteration": 0, "issues": issues}))


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
