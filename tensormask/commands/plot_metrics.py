"""Draw the curves of one or several runs: `tensormask plot-metrics output/a output/b`.

Reads `metrics.json` of each run, and draws a panel for each metric, with a curve for each run.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from tensormask.commands.common import CommandParser, exits_on_user_error
from tensormask.engine.events import read_metrics
from tensormask.utils.errors import UserError

COLUMNS = 3
TIMES = ("time", "data_time", "forward_time", "backward_time", "optimizer_time", "eta_seconds")

Curve = tuple[list[int], list[float]]


def build_parser() -> CommandParser:
    """Return the parser of the command."""
    parser = CommandParser(
        "plot-metrics",
        description="Draw the curves of one or several runs.",
        example="output/a output/b --metrics total_loss segm/AP --smooth 5",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="names in metrics.json (default: all except times and AP by class)",
    )
    parser.add_argument(
        "--smooth",
        type=int,
        default=1,
        metavar="N",
        help="draw the mean over N records, and the raw values behind it in gray (default: 1)",
    )
    parser.add_argument("--output", type=Path, default=Path("metrics.png"), metavar="FILE")
    return parser


@exits_on_user_error
def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for an error of the user."""
    args = build_parser().parse_args(arguments)
    if args.smooth < 1:
        raise UserError(f"--smooth is {args.smooth}; give 1 or more")
    curves = {run: read_curves(run) for run in dict.fromkeys(args.runs)}
    metrics = choose_metrics(curves, args.metrics)
    draw(curves, metrics, args.smooth, args.output)
    print(f"{len(metrics)} metrics of {len(curves)} runs: {args.output}")
    return 0


def read_curves(run: Path) -> dict[str, Curve]:
    """Return iterations, counted from 1, and values of each metric of a run, by name.

    Raises:
        UserError: the folder has no `metrics.json`, or one without metrics.
    """
    curves: dict[str, Curve] = {}
    for record in read_metrics(run / "metrics.json"):
        for name, value in record.items():
            if name != "iteration" and isinstance(value, int | float):
                iterations, values = curves.setdefault(name, ([], []))
                iterations.append(record["iteration"] + 1)
                values.append(value)
    if not curves:
        raise UserError(f"no metrics in {run / 'metrics.json'}: give the OUTPUT_DIR of a run")
    return curves


def choose_metrics(curves: dict[Path, dict[str, Curve]], wanted: Sequence[str] | None) -> list[str]:
    """Return the metrics to draw: `wanted`, or all except times and AP by class.

    Raises:
        UserError: no run has a wanted metric.
    """
    known = list(dict.fromkeys(name for of_run in curves.values() for name in of_run))
    if wanted is None:
        return [name for name in known if name not in TIMES and "/AP-" not in name]
    for name in wanted:
        if name not in known:
            raise UserError(f"no run has a metric {name!r}; available: {', '.join(known)}")
    return list(wanted)


def smoothed(values: Sequence[float], num: int) -> list[float]:
    """Return the mean of each value and of up to `num - 1` before it."""
    parts = (values[max(0, end - num) : end] for end in range(1, len(values) + 1))
    return [math.fsum(part) / len(part) for part in parts]


def draw(
    curves: dict[Path, dict[str, Curve]], metrics: Sequence[str], smooth: int, output: Path
) -> None:
    """Draw a panel for each metric to a PNG, or in another format by the suffix of `output`.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'tensormask[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(COLUMNS, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5 * columns, 3 * rows), squeeze=False, layout="constrained"
    )
    names = short_names(list(curves))
    for axis, metric in zip(axes.flat, metrics, strict=False):
        for number, of_run in enumerate(curves.values()):
            if metric not in of_run:
                continue
            iterations, values = of_run[metric]
            few = len(values) <= 20
            raw = few or smooth == 1 or metric == "lr"
            if not raw:
                axis.plot(iterations, values, color="0.8", linewidth=0.8, zorder=0)
            line = values if raw else smoothed(values, smooth)
            marker = "o" if few else None
            axis.plot(iterations, line, color=f"C{number}", marker=marker, markersize=3)
        axis.set_title(metric)
        axis.set_xlabel("iterations")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(metrics) :]:
        axis.set_axis_off()
    handles = [plt.Line2D([], [], color=f"C{number}") for number in range(len(names))]
    figure.legend(handles, names, loc="outside upper center", ncols=min(4, len(names)))
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    plt.close(figure)


def short_names(runs: Sequence[Path]) -> list[str]:
    """Return the last parts of the paths, as many as needed to tell them apart."""
    parts = [run.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(of_run[-length:]) for of_run in parts]
        if len(set(names)) == len(names):
            break
    return names
