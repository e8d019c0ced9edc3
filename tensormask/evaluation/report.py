"""Evaluation results as tables for people, and their comparison with what a config expects."""

import math
from collections.abc import Mapping, Sequence

from tensormask.utils.errors import UserError
from tensormask.utils.tables import format_table

OVERALL_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
CLASS_PREFIX = "AP-"


class UnexpectedResultsError(RuntimeError):
    """Results are not what TEST.EXPECTED_RESULTS says; the message holds a table of all of them."""


def results_table(
    results: Mapping[str, Mapping[str, float]], oracle: Mapping[str, float] | None = None
) -> str:
    """Results of `evaluate` as text: overall and by size, then by class.

    Args:
        results: metrics in percent of each task ("bbox", "segm").
        oracle: mask metrics of the true masks seen through the windows, for a row of its own and a
            column by class.

    Returns:
        Lines without a newline at the end; NaN is shown as "-".
    """
    rows = dict(results)
    if oracle is not None:
        rows["oracle"] = oracle
    if not rows:
        return "no results"
    extra = [name for metrics in rows.values() for name in metrics if "@" in name]
    columns = [*OVERALL_METRICS, *dict.fromkeys(extra)]
    overall = [["", *columns]]
    overall += [
        [task, *(_number(metrics.get(name, math.nan)) for name in columns)]
        for task, metrics in rows.items()
    ]
    table = format_table(overall)
    by_class = _class_table(rows)
    return f"{table}\n\n{by_class}" if by_class else table


def verify_results(
    expected: Sequence[Sequence], results: Mapping[str, Mapping[str, float]]
) -> None:
    """Compares results with a config's TEST.EXPECTED_RESULTS.

    Args:
        expected: rows `[task, metric, value, tolerance]`, such as `["segm", "AP", 30.0, 3.0]`.
        results: metrics of each task, as `evaluate` returns them.

    Raises:
        UnexpectedResultsError: a metric is further than its tolerance from its value, or NaN, or
            missing. All rows are in the message.
        ValueError: a row that has another form.
    """
    rows = [["task", "metric", "expected", "tolerance", "found", ""]]
    num_failed = 0
    for row in expected:
        if len(row) != 4:
            raise UserError(
                "a row of TEST.EXPECTED_RESULTS is [task, metric, value, tolerance], such as "
                f"['segm', 'AP', 30.0, 3.0]; given: {row!r}"
            )
        task, metric, value, tolerance = row
        found = results.get(task, {}).get(metric)
        # Written so that NaN fails.
        passed = found is not None and abs(found - value) <= tolerance
        num_failed += not passed
        shown = "missing" if found is None else f"{found:.4f}"
        verdict = "ok" if passed else "FAILED"
        rows.append([task, metric, f"{value:g}", f"{tolerance:g}", shown, verdict])
    if num_failed:
        raise UnexpectedResultsError(
            f"{num_failed} of {len(expected)} results are not as TEST.EXPECTED_RESULTS has them\n"
            + format_table(rows)
        )


def _class_table(rows: Mapping[str, Mapping[str, float]], num_blocks: int = 3) -> str:
    """AP by class, `num_blocks` classes beside each other so that 80 of them fit on a screen."""
    keys = [name for metrics in rows.values() for name in metrics if name.startswith(CLASS_PREFIX)]
    keys = list(dict.fromkeys(keys))
    if not keys:
        return ""
    num_lines = max(-(-len(keys) // num_blocks), min(len(keys), 10))
    blocks = []
    for start in range(0, len(keys), num_lines):
        block = [["AP by class", *rows]]
        for key in keys[start : start + num_lines]:
            values = (_number(metrics.get(key, math.nan)) for metrics in rows.values())
            block.append([key.removeprefix(CLASS_PREFIX), *values])
        block += [[""] * len(block[0])] * (num_lines + 1 - len(block))
        lines = format_table(block).split("\n")
        width = max(map(len, lines))
        blocks.append([line.ljust(width) for line in lines])
    return "\n".join("     ".join(line).rstrip() for line in zip(*blocks, strict=True))


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
