"""Read the frames of videos and cameras, and write videos, with OpenCV. Frames are RGB."""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import cv2
import numpy as np

from tensormask.utils.errors import UserError
from tensormask.utils.files import expand_home

DEFAULT_FPS = 25.0  # of files and cameras that state none
_CODEC = "mp4v"  # MPEG-4 part 2, which every build of OpenCV with FFmpeg writes
_MAX_FPS = 1000


class VideoError(UserError):
    """A video or camera that cannot be read."""


class VideoReader:
    """Context manager that iterates over the frames of a video, uint8 RGB `(H, W, 3)`.

    Args:
        source: the path or URL of a video, or the number of a camera.

    Attributes:
        fps: frames per second.
        num_frames: as stated by the file; 0 if unknown, as of cameras.
        num_read: how many frames have been read.

    Raises:
        VideoError: OpenCV cannot open it; or, at the end, it had no or not all of its frames.
    """

    def __init__(self, source: str | Path | int) -> None:
        if not isinstance(source, int):
            source = type(source)(expand_home(source))
        self.name = f"camera {source}" if isinstance(source, int) else str(source)
        if isinstance(source, Path) and not source.exists():
            raise VideoError(f"{source} does not exist")
        _check_name(self.name)
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        if not self._capture.isOpened():
            reason = "it is not available, or is used by another program"
            if not isinstance(source, int):
                reason = "it is damaged, not a video, or of a codec that OpenCV does not read"
            raise VideoError(f"{self.name} cannot be opened: {reason}")
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps < _MAX_FPS else DEFAULT_FPS
        self.num_frames = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self.num_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._capture.release()

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            is_read, frame = self._capture.read()
            if not is_read:
                break
            self.num_read += 1
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        if not self.num_read:
            raise VideoError(f"{self.name} has no frames that OpenCV can read")
        # The stated number is an estimate in some formats.
        if self.num_read < 0.9 * self.num_frames:
            raise VideoError(
                f"{self.name} is damaged: {self.num_read} of {self.num_frames} frames were read"
            )


class VideoWriter:
    """Context manager that writes frames to an MP4 file, under a temporary name until it ends.

    After an error in the block, or without frames, there is no file. The codec is MPEG-4 part 2,
    which drops the last row or column of an odd size.
    """

    def __init__(self, path: str | Path, fps: float) -> None:
        self.path, self.fps = path, fps = Path(expand_home(path)), fps
        self._temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def __enter__(self) -> Self:
        return self

    def write(self, rgb: np.ndarray) -> None:
        """Add a frame, uint8 RGB `(H, W, 3)`; later frames are resized to the first one's size.

        Raises:
            UserError: OpenCV cannot write videos here.
        """
        if self._writer is None:
            _check_name(str(self._temporary))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._size = (rgb.shape[1], rgb.shape[0])
            code = cv2.VideoWriter.fourcc(*_CODEC)
            self._writer = cv2.VideoWriter(str(self._temporary), code, self.fps, self._size)
            if not self._writer.isOpened():
                raise UserError(
                    f"{self.path} cannot be written: OpenCV's {_CODEC} encoder did not start for "
                    f"{self._size[0]} x {self._size[1]} pixels; save images instead"
                )
        if (rgb.shape[1], rgb.shape[0]) != self._size:  # OpenCV would drop it in silence
            rgb = cv2.resize(rgb, self._size)
        self._writer.write(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self._writer is None:
            return
        self._writer.release()
        if error is None:
            self._temporary.replace(self.path)
        else:
            self._temporary.unlink(missing_ok=True)


def _check_name(path: str) -> None:
    """Refuse a path with bytes that are not UTF-8, at which OpenCV crashes.

    In the locale C, these are all names beyond ASCII.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        raise VideoError(
            f"OpenCV cannot open {path!a}: its name is not UTF-8, or the locale is not: rename "
            "it, or set PYTHONUTF8=1"
        ) from None
