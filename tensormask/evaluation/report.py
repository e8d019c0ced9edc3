"""Format evaluation results as tables, and compare them with TEST.EXPECTED_RESULTS."""

import math
from collections.abc import Mapping, Sequence

from tensormask.utils.errors import UserError
from tensormask.utils.tables import format_table

OVERALL_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
CLASS_PREFIX = "AP-"


class UnexpectedResultsError(RuntimeError):
    """Results differ from TEST.EXPECTED_RESULTS; the message contains a table of all of them."""


def results_table(
    results: Mapping[str, Mapping[str, float]], oracle: Mapping[str, float] | None = None
) -> str:
    """Format the results of `evaluate`: overall and by object size, then by class.

    Args:
        results: metrics in percent of each task ("bbox", "segm").
        oracle: metrics of `evaluate_oracle`, which get a row and a column of the class table.

    Returns:
        Lines without a final newline; NaN is shown as "-".

    Example:
        >>> print(results_table({"segm": {"AP": 35.4, "AP50": 57.3}}))
                 AP   AP50  AP75  APs  APm  APl
        segm  35.40  57.30     -    -    -    -
    """
    rows = dict(results)
    if oracle is not None:
        rows["oracle"] = oracle
    if not rows:
        return "no results"
    extra = [name for metrics in rows.values() for name in metrics if "@" in name]
    overall = [["", *OVERALL_METRICS, *dict.fromkeys(extra)]]
    for task, metrics in rows.items():
        overall.append([task, *(_number(metrics, name) for name in overall[0][1:])])
    table = format_table(overall)
    by_class = _class_table(rows)
    return f"{table}\n\n{by_class}" if by_class else table


def verify_results(
    expected: Sequence[Sequence], results: Mapping[str, Mapping[str, float]]
) -> None:
    """Raise an error unless results are within the tolerances of a config's TEST.EXPECTED_RESULTS.

    Args:
        expected: rows `[task, metric, value, tolerance]`, such as `["segm", "AP", 30.0, 3.0]`.
        results: metrics of each task, as `evaluate` returns them.

    Raises:
        UnexpectedResultsError: a metric differs from its value by more than its tolerance, is NaN
            or is missing. The message contains all rows.
        ValueError: a malformed row.
    """
    rows = [["task", "metric", "expected", "tolerance", "actual", ""]]
    num_failed = 0
    for row in expected:
        if len(row) != 4:
            raise UserError(
                "a row of TEST.EXPECTED_RESULTS is [task, metric, value, tolerance], such as "
                f"['segm', 'AP', 30.0, 3.0]; given: {row!r}"
            )
        task, metric, value, tolerance = row
        actual = results.get(task, {}).get(metric)
        # NaN fails this comparison.
        passed = actual is not None and abs(actual - value) <= tolerance
        num_failed += not passed
        shown = "missing" if actual is None else f"{actual:.4f}"
        verdict = "ok" if passed else "FAILED"
        rows.append([task, metric, f"{value:g}", f"{tolerance:g}", shown, verdict])
    if num_failed:
        raise UnexpectedResultsError(
            f"{num_failed} of {len(expected)} results differ from TEST.EXPECTED_RESULTS\n"
            + format_table(rows)
        )


def _class_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Format AP by class, 3 classes per line so that 80 classes fit on a screen."""
    names = dict.fromkeys(name for metrics in rows.values() for name in metrics)
    keys = [name for name in names if name.startswith(CLASS_PREFIX)]
    if not keys:
        return ""
    num_lines = max(-(-len(keys) // 3), min(len(keys), 10))
    blocks = []
    for start in range(0, len(keys), num_lines):
        block = [["AP by class", *rows]]
        for key in keys[start : start + num_lines]:
            values = (_number(metrics, key) for metrics in rows.values())
            block.append([key.removeprefix(CLASS_PREFIX), *values])
        block += [[""] * len(block[0])] * (num_lines + 1 - len(block))
        lines = format_table(block).split("\n")
        width = max(map(len, lines))
        blocks.append([line.ljust(width) for line in lines])
    return "\n".join("     ".join(line).rstrip() for line in zip(*blocks, strict=True))


def _number(metrics: Mapping[str, float], name: str) -> str:
    value = metrics.get(name, math.nan)
    return "-" if math.isnan(value) else f"{value:.2f}"
