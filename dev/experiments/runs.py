"""Runs of experiments: a JSON line each, found again by its settings, and scored alike."""

import contextlib
import io
import json
import statistics
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from pycocotools.cocoeval import COCOeval

from tensormask.utils.env import describe_machine
from tensormask.utils.errors import UserError

_AREAS = {"": 0, "s": 1, "m": 2, "l": 3}  # on COCOeval's area axis


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, in their order; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def find_run(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record with these settings, or None."""
    wanted = json.loads(json.dumps(settings))
    return next((run for run in read_runs(path) if run["settings"] == wanted), None)


def choose_runs(path: Path, data: str, **wanted: Collection[Any]) -> list[dict[str, Any]]:
    """Return the records of a data set, with one of the wanted values for each named setting.

    Raises:
        UserError: no record has them.
    """
    runs = [
        run
        for run in read_runs(path)
        if run["settings"]["data"] == data
        and all(run["settings"][name] in values for name, values in wanted.items())
    ]
    if not runs:
        wishes = "".join(f", {name} {[*values]}" for name, values in wanted.items())
        raise UserError(f"{path} has no run of {data}{wishes}")
    return runs


def append_run(path: Path, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Append a record with commit and machine, in one write: several processes can share a file."""
    where = {"commit": commit(), "machine": describe_machine()}
    line = json.dumps({"settings": settings, **results, **where}) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def commit() -> str:
    """Return the short hash of the checkout, with `-dirty` if its files differ; "" without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def score(dataset: Any, results_file: Path, limits: Sequence[int]) -> dict[str, dict[str, float]]:
    """Score a file in COCO's results format, by pycocotools alone.

    Args:
        dataset: a `CocoDataset` without crowds.
        limits: detections per image and class that count.

    Returns:
        By IoU type, in percent: `AP@100`, `AP50@100`, `AP75@100`, `APs@100`, `APm@100`, `APl@100`,
        and so for each limit. -1 where there is no object of that size.
    """
    results = json.loads(results_file.read_text(encoding="utf-8"))
    scores: dict[str, dict[str, float]] = {}
    for iou_type, region in (("bbox", "bbox"), ("segm", "segmentation")):
        # Only one kind of region: loadRes computes areas from the box if it is present.
        kept = [
            {key: result[key] for key in ("image_id", "category_id", "score", region)}
            for result in results
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            truth = dataset.to_coco()
            if not kept:  # loadRes needs one
                image = next(iter(truth.imgs))
                empty = {"bbox": [0, 0, 1, 1], "segmentation": {"size": [1, 1], "counts": "1"}}
                found = {"image_id": image, "category_id": next(iter(truth.cats)), "score": 0.0}
                kept = [{**found, region: empty[region]}]
            evaluation = COCOeval(truth, truth.loadRes(kept), iou_type)
            evaluation.params.maxDets = sorted({1, 10, *limits})
            evaluation.evaluate()
            evaluation.accumulate()
        scores[iou_type] = {
            name: value for limit in limits for name, value in _summary(evaluation, limit).items()
        }
    return scores


def _summary(evaluation: COCOeval, limit: int) -> dict[str, float]:
    at_limit = evaluation.params.maxDets.index(limit)
    precision = evaluation.eval["precision"][..., at_limit]  # (thresholds, recalls, classes, areas)

    def mean(thresholds: slice, area: int) -> float:
        values = precision[thresholds, :, :, area]
        values = values[values > -1]
        return 100 * float(values.mean()) if values.size else -1.0

    every = slice(None)
    summary = {f"AP{letter}": mean(every, area) for letter, area in _AREAS.items()}
    summary |= {"AP50": mean(slice(0, 1), 0), "AP75": mean(slice(5, 6), 0)}
    return {f"{name}@{limit}": value for name, value in summary.items()}


def group_seeds(records: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return lists of records whose settings differ in the seed only."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        settings = {key: value for key, value in record["settings"].items() if key != "seed"}
        groups.setdefault(json.dumps(settings), []).append(record)
    return list(groups.values())


def summarize(runs: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """Return the columns of a table for runs with several seeds; AP at each limit of detections."""
    row: dict[str, object] = {"seeds": " ".join(str(run["settings"]["seed"]) for run in runs)}
    limits = [name[3:] for name in runs[0]["segm"] if name.startswith("AP@")]
    for iou_type, title in (("segm", "mask"), ("bbox", "box")):
        for metric in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
            values = [[run[iou_type][f"{metric}@{limit}"] for run in runs] for limit in limits]
            if min(values[0]) >= 0 and (
                iou_type == "segm" or metric[2:].isdigit() or metric == "AP"
            ):
                name = f"{title} {metric} at {'/'.join(limits)}"
                row[name] = " / ".join(map(mean_and_spread, values))
    row["steps"] = round(statistics.fmean(run["steps"] for run in runs))
    row["CPU s"] = round(statistics.fmean(run["train_cpu_seconds"] for run in runs))
    return row


def mean_and_spread(values: Sequence[float]) -> str:
    """Return the mean, and half of the range: of 1.0 and 3.0, `2.0 ± 1.0`."""
    mean = f"{sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.1f}"


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """Return dicts with the same keys as a table in Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
