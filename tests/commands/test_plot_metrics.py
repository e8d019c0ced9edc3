"""The command `tools/plot_metrics.py`: reading, choosing and drawing curves."""

import json
import sys
from pathlib import Path

import cv2
import pytest

from tensormask.commands import plot_metrics

pytest.importorskip("matplotlib")


def write_run(folder, factor=1.0):
    folder.mkdir(parents=True)
    records = [
        {"iteration": i, "total_loss": factor / (i + 1), "time": 0.5, "lr": 0.1}
        for i in range(19, 999, 20)
    ]
    records.insert(2, {"iteration": 49, "issues": {"a": {}}})
    records += [
        {"iteration": i, "segm/AP": 3.0 * factor, "segm/AP-star": 1.0, "segm/APl": None}
        for i in (499, 999)
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.json").write_text(text + '{"iteration": 9')
    return folder


def test_curves_of_a_run(tmp_path):
    curves = plot_metrics.read_curves(write_run(tmp_path / "a"))
    assert set(curves) == {"total_loss", "time", "lr", "segm/AP", "segm/AP-star"}
    assert curves["segm/AP"] == ([500, 1000], [3.0, 3.0])
    assert curves["total_loss"][0][:2] == [20, 40]


def test_choice_of_metrics(tmp_path):
    curves = {tmp_path: plot_metrics.read_curves(write_run(tmp_path / "a"))}
    assert plot_metrics.choose_metrics(curves, None) == ["total_loss", "lr", "segm/AP"]
    assert plot_metrics.choose_metrics(curves, ["time"]) == ["time"]
    with pytest.raises(ValueError, match="no run has a metric 'loss'; available: total_loss"):
        plot_metrics.choose_metrics(curves, ["loss"])


def test_smoothing_by_hand():
    assert plot_metrics.smoothed([1.0, 2.0, 6.0, 4.0], 1) == [1.0, 2.0, 6.0, 4.0]
    assert plot_metrics.smoothed([1.0, 2.0, 6.0, 4.0], 3) == [1.0, 1.5, 3.0, 4.0]


def test_names_tell_runs_apart():
    assert plot_metrics.short_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert plot_metrics.short_names([Path("/x/a"), Path("/y/a")]) == ["x/a", "y/a"]


def test_the_image(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name, factor)) for name, factor in (("a", 1.0), ("b", 2.0))]
    output = tmp_path / "out" / "curves.png"
    assert plot_metrics.main([*runs, "--output", str(output), "--smooth", "3"]) == 0
    assert f"3 metrics of 2 runs: {output}" in capsys.readouterr().out
    image = cv2.imread(str(output))
    assert image.shape == (360, 1800, 3)
    for blue_green_red in ((180, 119, 31), (14, 127, 255)):  # matplotlib's first two colors
        assert (image == blue_green_red).all(axis=2).sum() > 100


def test_a_metric_that_one_run_lacks_and_an_empty_cell(tmp_path):
    runs = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    path = Path(runs[1], "metrics.json")
    path.write_text(path.read_text().replace('"lr"', '"other"'))
    names = ["total_loss", "lr", "time", "segm/AP"]
    output = str(tmp_path / "curves.png")
    assert plot_metrics.main([*runs, "--output", output, "--metrics", *names]) == 0
    assert cv2.imread(output).shape == (720, 1800, 3)


def test_without_matplotlib_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot_metrics.main([str(write_run(tmp_path / "a"))]) == 2
    assert "tensormask[plot]" in capsys.readouterr().err


def test_user_errors_are_one_line(tmp_path, capsys):
    run = str(write_run(tmp_path / "a"))
    for arguments in ([str(tmp_path)], [run, "--metrics", "x"], [run, "--smooth", "0"]):
        assert plot_metrics.main(arguments) == 2
        assert capsys.readouterr().err.startswith("error: ")
