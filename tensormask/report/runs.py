"""What the folder of a run holds: curves, evaluations, config, environment."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tensormask.config import get_cfg
from tensormask.config.node import leaves
from tensormask.engine.output_dir import CONFIG, ENVIRONMENT
from tensormask.evaluation.coco import CURVES_FILE, RESULTS_FILE
from tensormask.evaluation.details import DETAILS_FILE
from tensormask.report.curves import Curves, read_curves, short_names
from tensormask.utils.errors import UserError

logger = logging.getLogger(__name__)

TASKS = {"segm": "masks", "bbox": "boxes"}


@dataclass(frozen=True)
class Evaluation:
    """The files of an evaluation on a data set.

    Attributes:
        details: of `evaluation.json`.
        precision: of `precision_recall.json`: by "segm" and "bbox" and by name 101 precisions.
        results: the file of detections.
    """

    details: dict[str, Any]
    precision: dict[str, dict[str, list[float]]]
    results: Path


@dataclass(frozen=True)
class Run:
    """The folder of a run; what it does not have is empty.

    Attributes:
        name: tells it from the other runs of the report.
        evaluations: by the name of the data set; "(averaged weights)" is appended for those.
        config: the text of `config.yaml`.
        environment: of its last start.
    """

    folder: Path
    name: str
    curves: Curves
    evaluations: dict[str, Evaluation]
    config: str
    environment: str

    def results(self) -> dict[str, float]:
        """Return the last numbers of the training and of the evaluations, by name."""
        rows: dict[str, float] = {}
        if "total_loss" in self.curves:
            rows["iterations"] = self.curves["total_loss"][0][-1]
            rows["total loss, last"] = self.curves["total_loss"][1][-1]
        for prefix, evaluation in self._prefixed():
            for task, what in TASKS.items():
                metrics = evaluation.details.get(task, {}).get("metrics", {})
                for metric in ("AP", "AP50", "AP75", "APs", "APm", "APl", "best_f1"):
                    if metrics.get(metric) is not None:
                        title = metric.replace("best_f1", "best F1 at IoU 0.5")
                        rows[f"{prefix}{title} of {what}, %"] = metrics[metric]
        return rows

    def speed(self) -> dict[str, float]:
        """Return times and memory, by name with the unit."""
        rows: dict[str, float] = {}
        for prefix, evaluation in self._prefixed():
            if seconds := evaluation.details.get("seconds_per_image"):
                rows[f"{prefix}evaluation: ms for an image"] = 1000 * seconds
        for metric, title in (
            ("time", "training: s for an iteration (median)"),
            ("data_time", "of it waiting for data, s (median)"),
        ):
            if metric in self.curves:
                rows[title] = median(self.curves[metric][1])
        if "max_mem" in self.curves:
            rows["training: most memory, MiB"] = max(self.curves["max_mem"][1])
        return rows

    def _prefixed(self) -> Iterator[tuple[str, Evaluation]]:
        """Yield the evaluations with the name of their data set, if there are several."""
        for name, evaluation in self.evaluations.items():
            yield f"{name}: " if len(self.evaluations) > 1 else "", evaluation

    def options(self) -> dict[str, str]:
        """Return the values of all options by key.

        It is empty for a config of another version of TensorMask, which cannot be read any more.
        """
        cfg, path = get_cfg(), self.folder / CONFIG
        try:
            cfg.merge_from_file(str(path))
        except (ValueError, OSError, KeyError):
            return {}
        return {key: str(value) for key, value in leaves(cfg)}


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the folders of runs; one given twice is one run.

    Raises:
        UserError: a folder without metrics and evaluations.
    """
    folders = list({folder.resolve(): folder for folder in folders}.values())
    return [read_run(*pair) for pair in zip(folders, short_names(folders), strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """Read the folder of a run; see `read_runs`."""
    curves, evaluations = read_curves(folder), _read_evaluations(folder)
    if not curves and not evaluations:
        raise UserError(
            f"{folder} has no run: expected metrics.json of a training or "
            f"inference/{DETAILS_FILE} of an evaluation; give the OUTPUT_DIR of one"
        )
    config, environment = (_read(folder / file) for file in (CONFIG, ENVIRONMENT))
    last_start = environment.strip().rpartition("==== ")[2]
    return Run(folder, name, curves, evaluations, config, last_start)


def _read_evaluations(folder: Path) -> dict[str, Evaluation]:
    evaluations = {}
    for part, suffix in (("inference", ""), ("ema/inference", " (averaged weights)")):
        for path in sorted((folder / part).glob(f"**/{DETAILS_FILE}")):
            try:
                details = json.loads(path.read_bytes())
                precision = json.loads(_read(path.with_name(CURVES_FILE)) or "{}")
                name = details["dataset"] + suffix
            except (ValueError, KeyError, TypeError) as error:
                logger.warning("%s is left out, it cannot be read: %s", path.parent, error)
                continue
            evaluations[name] = Evaluation(details, precision, path.with_name(RESULTS_FILE))
    return evaluations


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
