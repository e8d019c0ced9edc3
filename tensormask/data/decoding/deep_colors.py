"""Reads images of more than 8 bits a channel with OpenCV, where PIL keeps 8 bits or scales them."""

import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageFile

_MODES = ("RGB", "RGBA", "RGBX", "LA")
_FORMATS = ("PNG", "TIFF", "PPM", "JPEG2000")  # in which OpenCV reads such images
_LOGGING: Any = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging  # of OpenCV 4, and of 5


class DeepColors(NamedTuple):
    """A color image of more than 8 bits, not rotated by its EXIF orientation."""

    values: np.ndarray  # uint16, (H, W) or (H, W, 3) RGB
    image: Image.Image  # of the same file, loaded by PIL


def read_deep_colors(image: Image.Image) -> DeepColors | None:
    """Read the file of an image of PIL again, if it has more bits than PIL keeps.

    Of an image that is loaded already, the file is found by its name. If it has no name, the image
    is not loaded here, so that a second call gives the same.

    Returns:
        None for other images, and for one that was changed since it was read.

    Raises:
        Exception: the file is not complete.
    """
    if not isinstance(image, ImageFile.ImageFile) or image.format not in _FORMATS:
        return None
    if image.mode not in _MODES and (image.mode, image.format) != ("I", "PPM"):
        return None
    if image.tell() and image.format != "TIFF":
        return None
    is_loaded = not image.tile
    with ExitStack() as stack:
        source = image
        if is_loaded:
            if not image.filename or not os.path.isfile(image.filename):
                return None
            with suppress(OSError, SyntaxError):  # another file may have this name now
                source = stack.enter_context(_open(image.filename, image))
        if source.fp is None or not any(map(_is_deep, source.tile)):
            return None
        is_grey = any("LA" in str(tile[3]) for tile in source.tile)
        position = source.fp.tell()
        source.fp.seek(0)
        content = source.fp.read()
        source.fp.seek(position)
    again = image
    if is_loaded or not image.filename:
        again = _open(io.BytesIO(content), image)
    again.load()
    if is_loaded and not np.array_equal(np.asarray(again), np.asarray(image)):
        return None
    values = _decode(content, image.tell())
    if values is None or values.shape[:2] != again.size[::-1]:
        return None
    if is_grey and values.ndim == 3:  # OpenCV repeats it
        values = values[:, :, 0]
    return DeepColors(values, again)


def _open(file: Any, like: ImageFile.ImageFile) -> ImageFile.ImageFile:
    """Open a file in the format of an image, at the same frame."""
    image = Image.open(file, formats=[str(like.format)])
    if like.tell():
        image.seek(like.tell())
    return image


def _is_deep(tile: Any) -> bool:
    """Return whether a part of a file may have more than 8 bits a channel, by its decoder."""
    codec, _, _, arguments = tile
    if codec == "jpeg2k":  # the header is not in the arguments
        return True
    if codec == "ppm":  # mode and highest value
        return bool(arguments[1] > 255)
    mode = arguments if isinstance(arguments, str) else arguments[0]
    return ";16" in str(mode)  # as in RGB;16B


def _decode(content: bytes, frame: int) -> np.ndarray | None:
    """Return a frame as `DeepColors.values`; None if OpenCV cannot, or finds 8 bits."""
    encoded = np.frombuffer(content, np.uint8)
    with _silent_opencv():
        if frame:
            _, frames = cv2.imdecodemulti(encoded, cv2.IMREAD_UNCHANGED, range=(frame, frame + 1))
            values = frames[0] if frames else None
        else:
            values = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16:
        return None
    return values if values.ndim == 2 else values[:, :, 2::-1]  # from BGR or BGRA


@contextmanager
def _silent_opencv() -> Iterator[None]:
    """Suppress OpenCV's messages on stderr, about odd tags of files that PIL reads."""
    level = _LOGGING.getLogLevel()
    if level:  # else another thread restores it
        _LOGGING.setLogLevel(0)
    try:
        yield
    finally:
        if level:
            _LOGGING.setLogLevel(level)
