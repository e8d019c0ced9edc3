"""Log, metrics.json and TensorBoard: valid JSON, no repeated curves, correct medians and times."""

import contextlib
import itertools
import json
import logging
import math
import os

import cv2
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from tensormask.engine import events
from tensormask.utils.files import DiskFullError
from tensormask.visualization.instances import save_image

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

PROGRESS = {
    **{"total_loss": 3.5, "loss_cls": 1.25, "lr": 0.02, "grad_norm": 7.0},
    **{"time": 0.5, "data_time": 0.125, "max_mem": 1234.4, "eta_seconds": 3661.4},
}


def read_lines(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_progress_line():
    line = events.format_progress(19, 40, PROGRESS)
    assert line == (
        "iter: 20/40  eta: 1:01:01  total_loss: 3.5  loss_cls: 1.25  lr: 0.02  grad_norm: 7  "
        "time: 0.5000  data_time: 0.1250 s  max_mem: 1234 MiB"
    )


def test_medians_since_the_last_line():
    window = events.RecentMetrics()
    for loss, seconds in ((1.0, 1.0), (100.0, 1.0), (3.0, 4.0)):
        window.add({"loss": loss, "time": seconds})
    assert window.pop_medians() == {"loss": 3.0, "time": 1.0}
    assert window.seconds_left(10) == pytest.approx(20.0)  # mean 2 s, over the lines too
    window.add({"loss": 7.0, "time": 2.0})
    assert window.pop_medians() == {"loss": 7.0, "time": 2.0}


def test_medians_ignore_nan_in_any_order():
    window = events.RecentMetrics()
    for values in itertools.permutations([1.0, math.nan, 2.0, math.inf, 4.0]):
        for value in values:
            window.add({"grad_norm": value, "loss": math.nan, "time": 1.0})
        medians = window.pop_medians()
        assert medians["grad_norm"] == 3.0, values
        assert math.isnan(medians["loss"])


def test_time_left_depends_on_recent_iterations_only():
    window = events.RecentMetrics()
    for seconds in [100.0] * 50 + [2.0] * events.ETA_ITERATIONS:
        window.add({"time": seconds})
    assert window.seconds_left(3) == pytest.approx(6.0)


def test_writer_fills_json_and_tensorboard(tmp_path):
    with events.MetricsWriter(tmp_path, 0) as writer:
        writer.write(19, PROGRESS)
        writer.write(39, {"segm/AP": 12.5, "segm/APl": math.nan})
        writer.write(39, {})
    assert read_lines(tmp_path / "metrics.json") == [
        {"iteration": 19, **PROGRESS},
        {"iteration": 39, "segm/AP": 12.5, "segm/APl": None},
    ]
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in board.Scalars("segm/AP")] == [(39, 12.5)]
    assert "segm/APl" not in board.Tags()["scalars"]


def test_a_resumed_writer_does_not_repeat_curves(tmp_path):
    with events.MetricsWriter(tmp_path, 0) as writer:
        for iteration in (9, 19, 29):
            writer.write(iteration, {"loss": float(iteration)})
    path = tmp_path / "metrics.json"
    path.write_text(path.read_text() + '{"iteration": 3, "lo')  # killed here
    with events.MetricsWriter(tmp_path, 29) as writer:
        writer.write(29, {"loss": 0.5})
    assert [(r["iteration"], r["loss"]) for r in read_lines(path)] == [(9, 9), (19, 19), (29, 0.5)]
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(9, 9), (19, 19), (29, 0.5)]


def test_an_evaluation_in_tensorboard(tmp_path):
    for name in ("run", "inference", "inference/b"):
        (tmp_path / name).mkdir()
    montage = np.zeros((4, 6, 3), np.uint8)
    montage[..., 0] = 255
    save_image(tmp_path / "inference" / "montage.png", montage)
    curves = {"segm": {"AP50": [1.0, 0.5, 0.25], "AP75": []}}
    (tmp_path / "inference" / "b" / "precision_recall.json").write_text(json.dumps(curves))
    with events.MetricsWriter(tmp_path / "run", 0) as writer:
        writer.write_evaluation(9, tmp_path / "inference", drawn=True, prefix="ema/")
        writer.write_evaluation(19, tmp_path / "inference", drawn=False, prefix="ema/")
    board = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0}).Reload()
    (image,) = board.Images("ema/predictions")
    assert image.step == 9
    shown = cv2.imdecode(np.frombuffer(image.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(shown[..., ::-1], montage)
    assert board.Tags()["tensors"] == ["ema/b/segm/AP50"]
    drawn = board.Tensors("ema/b/segm/AP50")
    assert [event.step for event in drawn] == [9, 19]
    *_, precision, recall = tensor_util.make_ndarray(drawn[0].tensor_proto)
    assert precision.tolist() == [0.25, 0.5, 1.0]
    assert recall.tolist() == [1.0, 0.5, 0.0]


def test_incomplete_lines_are_not_read(tmp_path):
    path = tmp_path / "metrics.json"
    assert events.read_metrics(path) == []
    broken = '{"iteration": "a"}\n[1]\n{"iteration": null}\n{"iteration": 4, "lo'
    path.write_text('{"iteration": 3, "loss": 1.5}\n' + broken)
    assert events.read_metrics(path) == [{"iteration": 3, "loss": 1.5}]


def test_a_full_disk_is_an_error_of_the_metrics_and_not_of_the_log(tmp_path, capfd):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    (tmp_path / "log.txt").symlink_to("/dev/full")
    events.setup_logging(tmp_path)
    events.logger.info("hello")
    (tmp_path / "metrics.json").symlink_to("/dev/full")
    with pytest.raises(DiskFullError), events.MetricsWriter(tmp_path, 0) as writer:
        with pytest.raises(DiskFullError, match=r"metrics\.json"):
            writer.write(0, {"loss": 1.0})
    for handler in logging.getLogger("tensormask").handlers:
        with contextlib.suppress(OSError):  # what is still in its buffer
            handler.close()
    output = capfd.readouterr()
    assert "Logging error" not in output.err
    assert output.out.count("hello") == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_has_a_bar_instead_of_progress_lines(tmp_path, capsys, monkeypatch, terminal):
    monkeypatch.setattr(events.sys.stderr, "isatty", lambda: terminal, raising=False)
    events.setup_logging(tmp_path)
    with events.progress_bar(10, 30) as bar:
        assert bar.disable is not terminal
        assert terminal is False or bar.n == 10
        events.log_progress("iter: 20/30")
        events.logger.warning("a warning")
    output = capsys.readouterr()
    assert ("iter: 20/30" in output.out + output.err) is not terminal
    assert "a warning" in output.out + output.err
    assert "iter: 20/30" in (tmp_path / "log.txt").read_text()


def test_log_goes_to_console_and_file_once(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    events.setup_logging(tmp_path / "other")
    events.setup_logging(tmp_path)
    events.logger.info("hello")
    assert capsys.readouterr().out.count("hello") == 1
    assert (tmp_path / "log.txt").read_text().count("hello") == 1
    assert (tmp_path / "other" / "log.txt").read_text() == ""
