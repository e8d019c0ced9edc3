"""Videos: frames survive writing and reading, and unusual videos."""

import cv2
import numpy as np
import pytest

from tensormask.utils import video
from tensormask.utils.errors import UserError
from tensormask.utils.video import VideoError, VideoReader, VideoWriter


def frames(num=4, height=48, width=96):
    """Return frames of one color, of red and of increasing blue."""
    return [np.full((height, width, 3), (200, 0, 40 * n), np.uint8) for n in range(num)]


def write(path, images, fps=12.5):
    with VideoWriter(path, fps) as writer:
        for image in images:
            writer.write(image)
    return path


def test_frames_survive(tmp_path):
    path = write(tmp_path / "new" / "a.mp4", frames())
    with VideoReader(path) as reader:
        assert (reader.fps, reader.num_frames) == (12.5, 4)
        found = list(reader)
        assert reader.num_read == 4
    np.testing.assert_allclose(np.array(found), np.array(frames()), atol=12)
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


def test_frames_of_another_size_are_resized(tmp_path):
    path = write(tmp_path / "a.mp4", [*frames(2), *frames(1, 20, 40)])
    with VideoReader(path) as reader:
        assert [frame.shape for frame in reader] == [(48, 96, 3)] * 3


def test_no_file_after_an_error_or_without_frames(tmp_path):
    write(tmp_path / "a.mp4", [])
    images = (frames(1)[0] // n for n in (1, None))
    with pytest.raises(TypeError):
        write(tmp_path / "a.mp4", images)
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "_CODEC", "none")
    with pytest.raises(UserError, match="encoder did not start"):
        write(tmp_path / "a.mp4", frames(1))


@pytest.mark.parametrize("fps", [0.0, float("nan"), 90_000.0])
def test_a_video_without_a_rate(tmp_path, monkeypatch, fps):
    path = write(tmp_path / "a.mp4", frames(1))

    class Capture:
        def __init__(self, source):
            self.capture = capture(source)

        def __getattr__(self, name):
            return getattr(self.capture, name)

        def get(self, key):
            return fps if key == cv2.CAP_PROP_FPS else -1.0

    capture = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    with VideoReader(path) as reader:
        assert (reader.fps, reader.num_frames) == (25.0, 0)
        assert len(list(reader)) == 1


def test_names_that_are_not_utf8(tmp_path):
    """OpenCV would crash, without an exception."""
    path = tmp_path / "a\udce9.mp4"
    path.touch()
    with pytest.raises(VideoError, match=r"a\\udce9\.mp4.*PYTHONUTF8"):
        VideoReader(path)
    with VideoWriter(path, 5) as writer, pytest.raises(VideoError, match="not UTF-8"):
        writer.write(np.zeros((16, 16, 3), np.uint8))
