"""Draw the curves of one or several runs: `tensormask plot-metrics output/a output/b`.

Reads `metrics.json` of each run, and draws a panel for each metric, with a curve for each run.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from tensormask.commands.common import CommandParser, exits_on_user_error
from tensormask.engine.events import METRICS
from tensormask.report.curves import (
    CHOSEN,
    Curves,
    choose_metrics,
    read_curves,
    short_names,
    smoothed,
)
from tensormask.utils.errors import UserError
from tensormask.utils.extras import require

COLUMNS = 3


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
        help=f"names in metrics.json (default: {' '.join(CHOSEN)})",
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
    for run, of_run in curves.items():
        if not of_run:
            raise UserError(f"no metrics in {run / METRICS}: give the OUTPUT_DIR of a run")
    metrics = choose_metrics(curves.values(), args.metrics)
    draw(curves, metrics, args.smooth, args.output)
    print(f"{len(metrics)} metrics of {len(curves)} runs: {args.output}")
    return 0


def draw(curves: dict[Path, Curves], metrics: Sequence[str], smooth: int, output: Path) -> None:
    """Draw a panel for each metric to a PNG, or in another format by the suffix of `output`.

    Raises:
        UserError: matplotlib is not installed.
    """
    require("matplotlib", extra="report").use("Agg")
    plt = require("matplotlib.pyplot", extra="report")

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
