"""The command `tools/plot_metrics.py`: drawing curves."""

import sys
from pathlib import Path

import cv2
import pytest
from run_folders import write_run

from tensormask.commands import plot_metrics

pytest.importorskip("matplotlib")


def test_the_image(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name, factor)) for name, factor in (("a", 1.0), ("b", 2.0))]
    output = tmp_path / "out" / "curves.png"
    assert plot_metrics.main([*runs, "--output", str(output), "--smooth", "3"]) == 0
    assert f"4 metrics of 2 runs: {output}" in capsys.readouterr().out
    image = cv2.imread(str(output))
    assert image.shape == (720, 1800, 3)
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
    assert "tensormask[report]" in capsys.readouterr().err


def test_user_errors_are_one_line(tmp_path, capsys):
    run = str(write_run(tmp_path / "a"))
    for arguments in ([str(tmp_path)], [run, "--metrics", "x"], [run, "--smooth", "0"]):
        assert plot_metrics.main(arguments) == 2
        assert capsys.readouterr().err.startswith("error: ")
