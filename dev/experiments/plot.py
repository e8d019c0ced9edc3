"""Plot mask AP of dev/compare_maskrcnn.py by processor time and by steps, a line for each model."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from experiments.runs import group_seeds
from tensormask.utils.extras import require

# Title, and key of a record.
AXES = {"processor time of the steps, s": "train_cpu_seconds", "steps": "steps"}


def plot_comparison(runs: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Draw a point for each model and budget: the mean of its seeds, with their range as a bar."""
    figure = require("matplotlib.figure", extra="report").Figure((11, 4.5), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    groups: dict[str, list[Sequence[Mapping[str, Any]]]] = {}
    for seeds in group_seeds(runs):
        settings = seeds[0]["settings"]
        groups.setdefault(" ".join([settings["model"], *settings["opts"]]), []).append(seeds)
    for panel, (title, key) in zip(panels, AXES.items(), strict=True):
        for label, budgets in groups.items():
            points = sorted(_point(seeds, key) for seeds in budgets)
            x, mean, below, above = zip(*points, strict=True)
            panel.errorbar(x, mean, (below, above), marker="o", capsize=4, label=fill(label, 40))
        panel.set_xlabel(title)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.4)
    panels[0].set_ylabel("mask AP at 100 detections")
    panels[0].legend()
    figure.savefig(output, dpi=100)


def _point(seeds: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float, float, float]:
    """Return the means on the axis and of the AP, and how far seeds lie below and above it."""
    scores = [run["segm"]["AP@100"] for run in seeds]
    mean = statistics.fmean(scores)
    return statistics.fmean(run[key] for run in seeds), mean, mean - min(scores), max(scores) - mean
