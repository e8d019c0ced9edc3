"""Tables of results, and results compared with what a config expects."""

import math

import pytest

from tensormask.evaluation import UnexpectedResultsError, results_table, verify_results

RESULTS = {"segm": {"AP": 30.5, "AP50": math.nan, "AP-a": 1.0}, "bbox": {"AP": 40.0, "AP-a": 2.0}}


def test_expected_results_within_tolerance_pass():
    verify_results([], RESULTS)
    verify_results([["segm", "AP", 30.0, 0.5], ["bbox", "AP", 43, 3]], RESULTS)


@pytest.mark.parametrize(
    "row, shown",
    [
        (["segm", "AP", 30.0, 0.4], "30.5000"),
        (["segm", "AP", 31.0, 0.4], "30.5000"),
        (["segm", "AP50", 30.0, 100.0], "nan"),
        (["segm", "AP75", 30.0, 100.0], "missing"),
        (["keypoints", "AP", 30.0, 100.0], "missing"),
    ],
)
def test_unexpected_results_fail_with_all_rows(row, shown):
    with pytest.raises(UnexpectedResultsError, match="1 of 2") as caught:
        verify_results([["bbox", "AP", 40.0, 0.1], row], RESULTS)
    *_, good, bad = str(caught.value).splitlines()
    assert good.split() == ["bbox", "AP", "40", "0.1", "40.0000", "ok"]
    assert bad.split()[-2:] == [shown, "FAILED"]


def test_a_malformed_expectation_is_refused():
    with pytest.raises(ValueError, match="EXPECTED_RESULTS"):
        verify_results([["segm", "AP", 30.0]], RESULTS)


def test_results_table():
    oracle = {"AP": 51.2, "AP-a": 3.0}
    assert results_table(RESULTS, oracle).splitlines() == [
        "           AP  AP50  AP75  APs  APm  APl",
        "segm    30.50     -     -    -    -    -",
        "bbox    40.00     -     -    -    -    -",
        "oracle  51.20     -     -    -    -    -",
        "",
        "AP by class  segm  bbox  oracle",
        "a            1.00  2.00    3.00",
    ]


def test_no_results():
    assert results_table({}) == "no results"


def test_results_table_holds_every_class_and_limit():
    names = [f"class {i}" for i in range(80)]
    metrics = {"AP": 1.0, "AP@400": 22.0} | {f"AP-{name}": i for i, name in enumerate(names)}
    table = results_table({"segm": metrics})
    assert "AP@400" in table
    assert all(f"class {i} " in table and f"{i}.00" in table for i in range(80))
    assert len(table.splitlines()) < 40
