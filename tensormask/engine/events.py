"""Logging of a run: console, `log.txt`, progress, `metrics.json` and TensorBoard."""

import json
import logging
import math
import statistics
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tensormask.engine.distributed import is_main_process
from tensormask.utils.console import escape_unencodable
from tensormask.utils.errors import UserError
from tensormask.utils.files import expand_home, reraise_disk_full, write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

LOG = "log.txt"
METRICS = "metrics.json"
ETA_ITERATIONS = 200


def setup_logging(output_dir: str | Path) -> None:
    """Send this package's log messages to the console, and append them to `log.txt` in a folder.

    A second call moves the log to another folder.
    """
    escape_unencodable()
    package = logging.getLogger("tensormask")
    package.setLevel(logging.INFO)
    for handler in list(package.handlers):
        package.removeHandler(handler)
        handler.close()
    console = logging.StreamHandler(sys.stdout)
    console.addFilter(lambda record: getattr(record, "on_console", True))
    form = logging.Formatter("[%(asctime)s] %(levelname)s %(message)s", "%m/%d %H:%M:%S")
    # File names that are not valid in the file system's encoding cannot be written in any other.
    log_file = _LogFile(Path(output_dir) / LOG, encoding="utf-8", errors="backslashreplace")
    for handler in (console, log_file):
        handler.setFormatter(form)
        package.addHandler(handler)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore a full disk: whatever needs the space raises it once, not every log line."""


def log_error(error: Exception) -> None:
    """Write the error that ends a run to `log.txt` only, with a traceback if it is no `UserError`.

    The command or Python prints it on the console.
    """
    traceback = None if isinstance(error, UserError) else error
    logger.error("%s", error, exc_info=traceback, extra={"on_console": False})


def json_line(record: Mapping[str, object]) -> str:
    """Format a record as one line of valid JSON; NaN and infinities become null.

    Example:
        >>> json_line({"loss": math.nan, "grad_norm": math.inf, "lr": 0.5})
        '{"loss": null, "grad_norm": null, "lr": 0.5}\\n'
    """
    valid = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(valid, allow_nan=False) + "\n"


def flatten_results(results: Mapping[str, Any]) -> dict[str, float]:
    """Flatten nested results to `{"bbox/AP": 40.0, ...}`.

    Example:
        >>> flatten_results({"bbox": {"AP": 40.0}, "ema": {"bbox": {"AP": 41.0}}})
        {'bbox/AP': 40.0, 'ema/bbox/AP': 41.0}
    """
    flat: dict[str, float] = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{name}": number for name, number in flatten_results(value).items()}
        else:
            flat[key] = value
    return flat


def format_progress(iteration: int, max_iter: int, metrics: Mapping[str, float]) -> str:
    """Format the console line of an iteration from its metrics (named as in `metrics.json`)."""
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
    """Log a line of progress; a terminal shows `progress_bar` instead."""
    logger.info(line, extra={"on_console": not sys.stderr.isatty()})


@contextmanager
def progress_bar(start: int, max_iter: int) -> Iterator[tqdm]:
    """Show a progress bar below the log lines if stderr is a terminal; else a disabled bar."""
    shown = sys.stderr.isatty() and is_main_process()
    loggers = [logging.getLogger("tensormask")] if shown else []
    with (
        tqdm(total=max_iter, initial=start, desc="training", disable=not shown) as bar,
        logging_redirect_tqdm(loggers),
    ):
        yield bar


def peak_memory(device: torch.device) -> float:
    """Return the peak memory of this process in MiB: of tensors on a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def format_summary(rows: Mapping[str, object]) -> str:
    """Format the table at the end of a run."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


class RecentMetrics:
    """Collect the metrics of the iterations since the last log line, and estimate the time left.

    A line shows medians over its iterations, since they ignore outliers. The time left is the mean
    time of the last 200 iterations times the number of remaining ones.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}
        self._times: deque[float] = deque(maxlen=ETA_ITERATIONS)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add the metrics of one iteration; `time` is its duration in seconds."""
        for name, value in metrics.items():
            self._values.setdefault(name, []).append(value)
        self._times.append(metrics["time"])

    def pop_medians(self) -> dict[str, float]:
        """Return the median of each metric since the last call, without NaNs, and clear them."""
        medians = {name: _median(values) for name, values in self._values.items()}
        self._values.clear()
        return medians

    def seconds_left(self, iterations_left: int) -> float:
        """Estimate the seconds that `iterations_left` iterations will take."""
        return statistics.fmean(self._times) * iterations_left


def _median(values: Sequence[float]) -> float:
    """Return the median of the numbers that are not NaN; NaN if all are."""
    return statistics.median([v for v in values if not math.isnan(v)] or [math.nan])


class MetricsWriter(AbstractContextManager):
    """Write records to `metrics.json` and TensorBoard, each with its iteration (from 0).

    Only rank 0 writes. The end of the context closes the files.

    Raises:
        DiskFullError: from any method, if the disk is full.
    """

    def __init__(self, output_dir: str | Path, start_iteration: int) -> None:
        self._path = Path(output_dir) / METRICS
        self._file: IO[str] | None = None
        self._board: SummaryWriter | None = None
        if is_main_process():
            drop_metrics_from(self._path, start_iteration)
            self._file = open(self._path, "a", encoding="utf-8")
            self._board = _open_board(output_dir, start_iteration)

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics, if any; `metrics.json` is flushed, so that a kill loses no line."""
        if not metrics:
            return
        self._write_line({"iteration": iteration, **metrics})
        for name, value in metrics.items():
            if self._board is not None and math.isfinite(value):
                self._board.add_scalar(name, value, iteration)

    def write_issues(self, iteration: int, issues: Mapping[str, object] | None) -> None:
        """Append a line `{"iteration": ..., "issues": ...}` to `metrics.json`, if there are any."""
        if issues is not None:
            self._write_line({"iteration": iteration, "issues": issues})

    def write_evaluation(
        self, iteration: int, inference_dir: str | Path, *, drawn: bool, prefix: str = ""
    ) -> None:
        """Add the files of an evaluation, of one or more data sets, to TensorBoard.

        These are the montage of predictions beside ground truth, and the precision-recall curves,
        without the counts that TensorBoard usually shows with them.

        Args:
            drawn: whether this evaluation has drawn images; existing ones may be of an earlier one.
        """
        if self._board is None:
            return
        montages = sorted(Path(inference_dir).glob("**/montage.png")) if drawn else []
        for path in montages:
            tag = prefix + str(path.parent.relative_to(inference_dir) / "predictions")
            # Read by Python: cv2.imread knows no names beyond ASCII on Windows.
            data = np.frombuffer(path.read_bytes(), np.uint8)
            image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
            if image is not None:
                self._board.add_image(tag, image[..., ::-1], iteration, dataformats="HWC")
        for path in sorted(Path(inference_dir).glob("**/precision_recall.json")):
            for task, curves in json.loads(path.read_bytes()).items():
                for name, precision in curves.items():
                    tag = prefix + str(path.parent.relative_to(inference_dir) / task / name)
                    if precision:
                        _write_curve(self._board, tag, precision, iteration)

    def _write_line(self, record: Mapping[str, object]) -> None:
        if self._file is not None:
            with reraise_disk_full(self._path):
                self._file.write(json_line(record))
                self._file.flush()

    def __exit__(self, *exception: object) -> None:
        with reraise_disk_full(self._path):
            if self._file is not None:
                self._file.close()
            if self._board is not None:
                self._board.close()


def _open_board(output_dir: str | Path, start_iteration: int) -> "SummaryWriter | None":
    """Return TensorBoard's writer, or None if it cannot write to a folder of this name."""
    from torch.utils import tensorboard  # slow to import

    try:
        # purge_step hides the records that a stopped run wrote after its checkpoint.
        return tensorboard.SummaryWriter(str(output_dir), purge_step=start_iteration)
    except UnicodeEncodeError:
        logger.warning("No TensorBoard events: the name of %s is not valid UTF-8", output_dir)
        return None


def _write_curve(board: "SummaryWriter", tag: str, precision: list[float], iteration: int) -> None:
    # TensorBoard orders a curve by threshold on the score: recall decreases.
    no_counts = np.zeros(len(precision))
    board.add_pr_curve_raw(
        tag,
        *(no_counts, no_counts, no_counts, no_counts),
        precision=np.array(precision[::-1]),
        recall=np.linspace(1, 0, len(precision)),
        global_step=iteration,
        num_thresholds=len(precision),
    )


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the records of a `metrics.json`, without an incomplete line of a killed run."""
    path = Path(expand_home(path))
    content = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = content.splitlines(keepends=True)
    return [json.loads(line) for line in lines if _iteration_of(line) < math.inf]


def append_issues(output_dir: str | Path, issues: Mapping[str, object] | None) -> None:
    """Append the issues found by an evaluation without training to `metrics.json`, if any."""
    if issues is not None:
        with open(Path(output_dir) / METRICS, "a", encoding="utf-8") as file:
            file.write(json_line({"iteration": 0, "issues": issues}))


def drop_metrics_from(path: str | Path, start_iteration: int) -> None:
    """Remove the records of a `metrics.json` from `start_iteration` on: the run repeats them.

    Incomplete lines, which a killed run can leave, are removed too. The log has the number of
    removed lines.
    """
    path = Path(path)
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    earlier = [line for line in lines if _iteration_of(line) < start_iteration]
    if len(earlier) < len(lines):
        logger.info(
            "%s: removed %d of %d lines of an earlier run, from iteration %d on",
            *(path, len(lines) - len(earlier), len(lines), start_iteration),
        )
        write_atomically(path, lambda file: file.write("".join(earlier).encode()))


def _iteration_of(line: str) -> float:
    if not line.endswith("\n"):
        return math.inf
    try:
        iteration = json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return iteration if isinstance(iteration, int) else math.inf
