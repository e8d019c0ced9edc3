"""The curves of a run: metrics over its iterations, from `metrics.json`."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from tensormask.engine.events import METRICS, read_metrics
from tensormask.utils.errors import UserError

Curve = tuple[list[int], list[float]]
Curves = dict[str, Curve]

# The ten that tell whether a run learns, how well, and what its time goes into.
CHOSEN = (
    *("total_loss", "loss_cls", "loss_box_reg", "loss_mask", "segm/AP", "bbox/AP"),
    *("lr", "grad_norm", "time", "data_time"),
)


def read_curves(run: Path) -> Curves:
    """Return iterations, counted from 1, and values of each metric of a run, by name.

    It is empty for a folder without `metrics.json`, or with one without metrics.
    """
    curves: Curves = {}
    for record in read_metrics(run / METRICS):
        for name, value in record.items():
            if name != "iteration" and isinstance(value, int | float):
                iterations, values = curves.setdefault(name, ([], []))
                iterations.append(record["iteration"] + 1)
                values.append(value)
    return curves


def choose_metrics(runs: Iterable[Curves], wanted: Sequence[str] | None = None) -> list[str]:
    """Return the metrics to draw: `wanted`, or those of `CHOSEN` that the runs have.

    Of several test sets, and of averaged weights, each has its own, such as `ema/segm/AP`. Runs
    with none of these, such as those of other programs, have all metrics drawn.

    Raises:
        UserError: no run has a wanted metric.
    """
    known = list(dict.fromkeys(name for of_run in runs for name in of_run))
    if wanted is None:
        chosen = [name for end in CHOSEN for name in known if f"/{name}".endswith(f"/{end}")]
        return chosen or known
    for name in wanted:
        if name not in known:
            raise UserError(f"no run has a metric {name!r}; available: {', '.join(known)}")
    return list(wanted)


def smoothed(values: Sequence[float], num: int) -> list[float]:
    """Return the mean of each value and of up to `num - 1` before it."""
    parts = (values[max(0, end - num) : end] for end in range(1, len(values) + 1))
    return [math.fsum(part) / len(part) for part in parts]


def short_names(runs: Sequence[Path]) -> list[str]:
    """Return the last parts of the paths, as many as needed to tell them apart."""
    parts = [run.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(of_run[-length:]) for of_run in parts]
        if len(set(names)) == len(names):
            break
    return names
