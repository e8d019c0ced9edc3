"""Curves of runs: reading, choosing and smoothing."""

from pathlib import Path

import pytest
from run_folders import write_run

from tensormask.report import curves


def test_curves_of_a_run(tmp_path):
    found = curves.read_curves(write_run(tmp_path / "a"))
    assert set(found) == {"total_loss", "time", "lr", "segm/AP", "segm/AP-star"}
    assert found["segm/AP"] == ([500, 1000], [3.0, 3.0])
    assert found["total_loss"][0][:2] == [20, 40]


def test_choice_of_metrics(tmp_path):
    runs = [curves.read_curves(write_run(tmp_path / "a")), {"x": ([1], [1.0])}]
    assert curves.choose_metrics(runs) == ["total_loss", "segm/AP", "lr", "time"]
    assert curves.choose_metrics(runs[1:]) == ["x"]
    of_sets = dict.fromkeys(("a/segm/AP", "a/segm/APs", "ema/a/segm/AP"), ([1], [1.0]))
    assert curves.choose_metrics([of_sets]) == ["a/segm/AP", "ema/a/segm/AP"]
    assert curves.choose_metrics(runs, ["x"]) == ["x"]
    with pytest.raises(ValueError, match="no run has a metric 'loss'; available: total_loss"):
        curves.choose_metrics(runs, ["loss"])


def test_smoothing_by_hand():
    assert curves.smoothed([1.0, 2.0, 6.0, 4.0], 1) == [1.0, 2.0, 6.0, 4.0]
    assert curves.smoothed([1.0, 2.0, 6.0, 4.0], 3) == [1.0, 1.5, 3.0, 4.0]


def test_names_tell_runs_apart():
    assert curves.short_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert curves.short_names([Path("/x/a"), Path("/y/a")]) == ["x/a", "y/a"]
