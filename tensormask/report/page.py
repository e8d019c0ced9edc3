"""The page of one or several runs: what its template, `report.html.j2`, shows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensormask.config import get_cfg
from tensormask.config.node import leaves
from tensormask.evaluation.error_kinds import KINDS
from tensormask.report.curves import choose_metrics
from tensormask.report.figures import NUM_COLORS, draw_curves, draw_precision
from tensormask.report.images import choose_images, draw_images, rows_of
from tensormask.report.runs import TASKS, Evaluation, Run
from tensormask.utils.extras import require
from tensormask.visualization.html.page import write_page

NUM_IMAGES = 3  # best ones, and as many worst ones
MAX_CURVES = 12  # of classes in a figure
MAX_MATRIX = 15  # classes in a confusion matrix
NUM_CONFUSIONS = 20  # of more classes


def write_report(runs: Sequence[Run], path: Path, *, num_images: int = NUM_IMAGES) -> Path:
    """Write the page of runs to a file, and return its path.

    Raises:
        UserError: a package of the extra `report` is not installed.
    """
    sets = list(dict.fromkeys(name for run in runs for name in run.evaluations))
    return write_page(
        path,
        "report.html.j2",
        runs=runs,
        num_colors=NUM_COLORS,
        results=compare([run.results() for run in runs]),
        speed=compare([run.speed() for run in runs]),
        curves=_draw_metrics(runs),
        sets=[_describe_set(name, runs, num_images) for name in sets],
        options=changed_options(runs),
        differ=len(runs) > 1,
    )


def compare(columns: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Return a row for each name that occurs, with the values of the columns, None for none.

    Example:
        >>> compare([{"a": 1}, {"a": 2, "b": 3}])
        [('a', [1, 2]), ('b', [None, 3])]
    """
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name) for column in columns]) for name in names]


def changed_options(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Return the rows of `compare` of the options that a run does not leave at its default."""
    defaults = {key: str(value) for key, value in leaves(get_cfg())}
    return [
        (key, values)
        for key, values in compare([run.options() for run in runs])
        if {*values} - {None, defaults.get(key)}
    ]


def _svg(markup: str) -> Any:
    return require("markupsafe", extra="report").Markup(markup)


def _draw_metrics(runs: Sequence[Run]) -> list[Any]:
    names = choose_metrics([run.curves for run in runs])
    return [
        _svg(draw_curves(name, {run.name: run.curves.get(name) for run in runs})) for name in names
    ]


def _describe_set(name: str, runs: Sequence[Run], num_images: int) -> dict[str, Any]:
    """Return what the page shows of the evaluations on one data set."""
    colors = {run.name: number for number, run in enumerate(runs)}
    by_run = {run.name: run.evaluations[name] for run in runs if name in run.evaluations}
    tasks = {
        task: what
        for task, what in TASKS.items()
        if any(task in evaluation.details for evaluation in by_run.values())
    }
    best, worst = choose_images(list(by_run.values()), num_images)
    drawn = draw_images(by_run, [*best, *worst])
    return {
        "name": name,
        "colors": colors,
        "tasks": tasks,
        "evaluations": {run: evaluation.details for run, evaluation in by_run.items()},
        "precision": {task: _draw_precision(task, by_run, colors) for task in tasks},
        "kinds": KINDS,
        "largest_cost": _largest_cost(by_run.values(), tasks),
        "confusions": [
            {"run": run, **_confusion(evaluation)} for run, evaluation in by_run.items()
        ],
        "images": [
            (title, [drawn[image_id] for image_id in ids if image_id in drawn])
            for title, ids in (("Best", best), ("Worst", worst))
            if num_images
        ],
        "num_images": max((len(rows_of(e)) for e in by_run.values()), default=0),
    }


def _draw_precision(
    task: str, by_run: Mapping[str, Evaluation], colors: Mapping[str, int]
) -> list[Any]:
    """Draw precision over recall: of several runs a figure for each IoU, else one of the run."""
    curves = {run: evaluation.precision.get(task, {}) for run, evaluation in by_run.items()}
    titles = {"AP": "mean of IoU 0.5 to 0.95", "AP50": "IoU 0.5", "AP75": "IoU 0.75"}
    if len(colors) > 1:
        # Each run keeps its color, also where others have no evaluation.
        return [
            _svg(
                draw_precision(
                    f"{TASKS[task]}, {title}",
                    {run: curves.get(run, {}).get(name, []) for run in colors},
                    legend=False,
                )
            )
            for name, title in titles.items()
        ]
    (evaluation,) = by_run.values()
    (of_run,) = curves.values()
    named = {titles[name]: precision for name, precision in of_run.items() if precision}
    figures = [_svg(draw_precision(f"{TASKS[task]}, mean over classes", named))]
    by_class = evaluation.details.get(task, {}).get("precision50", {})
    if 1 < len(by_class) <= MAX_CURVES:
        figures.append(_svg(draw_precision(f"{TASKS[task]}, IoU 0.5, by class", by_class)))
    return figures


def _largest_cost(evaluations: Any, tasks: Mapping[str, str]) -> float:
    costs = [
        error["dAP"] or 0.0
        for evaluation in evaluations
        for task in tasks
        for error in evaluation.details.get(task, {}).get("errors", {}).values()
    ]
    return max(costs, default=0.0) or 1.0


def _confusion(evaluation: Evaluation) -> dict[str, Any]:
    """Return `names` with `matrix` for few classes, else `pairs`; by masks if there are any."""
    task = "segm" if "segm" in evaluation.details else "bbox"
    of_task = evaluation.details[task]
    names = [row["class"] for row in of_task["by_class"]]
    counts = {(truth, predicted): n for truth, predicted, n in of_task["confusion"]}
    labels = range(len(names) + 1)
    named = [*names, "background"]
    wrong = sorted((p for p in counts if p[0] != p[1]), key=lambda pair: -counts[pair])
    sums = {truth: sum(counts.get((truth, other), 0) for other in labels) for truth in labels}
    matrix = [
        [(counts.get((a, b), 0), counts.get((a, b), 0) / max(1, sums[a])) for b in labels]
        for a in (labels if len(names) <= MAX_MATRIX else ())
    ]
    pairs = [(named[a], named[b], counts[a, b]) for a, b in wrong[:NUM_CONFUSIONS]]
    threshold = of_task["threshold"]
    return {
        **{"what": TASKS[task], "threshold": threshold},
        **{"names": named, "matrix": matrix, "pairs": [] if matrix else pairs},
    }
