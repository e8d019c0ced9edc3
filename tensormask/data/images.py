"""Reads image files of any format as 8-bit RGB.

Ordinary images get the same pixels as in detectron2: they are rotated by their EXIF orientation and
converted by PIL's `convert("RGB")`, which drops transparency and looks up palettes. Images of more
than 8 bits, which PIL would clip or cut to 8, are converted as arrays of their values are
(`pixels`). The first frame of a file with several frames is used.
"""

from __future__ import annotations

import errno
import os
import stat
import warnings
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from tensormask.data.decoding.deep_colors import read_deep_colors
from tensormask.data.decoding.formats import describe_format
from tensormask.data.decoding.pixels import stretch_to_8_bits, values_to_rgb
from tensormask.utils.errors import UserError
from tensormask.utils.files import expand_home

__all__ = [
    "ImageError",
    "image_suffixes",
    "read_image",
    "stretch_to_8_bits",
    "to_rgb",
    "upright_size",
]

_T = TypeVar("_T")

# EXIF's orientation, and the transpose that turns such an image upright.
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The formats that are read, whatever the file's suffix. PIL knows more; for some, EPS and WMF, it
# runs other programs, which is not safe for untrusted images.
_FORMATS = (
    *("JPEG", "MPO", "PNG", "TIFF", "WEBP", "AVIF", "GIF", "BMP", "DIB", "PPM", "JPEG2000"),
    *("TGA", "ICO", "PCX", "SGI", "PSD", "DDS", "IM", "PFM"),
)
_DEEP_GREY_MODES = ("I", "F")  # and I;16, I;16B, ...: 16 or 32 bits, integers or floats
_NO_RESOURCES = {errno.ENOMEM, errno.EMFILE, errno.ENFILE}  # too little memory, too many open files
_SAMPLE_FORMAT_TAG, _UNSIGNED = 0x0153, 1  # of TIFF; without the tag, integers are unsigned


class ImageError(UserError):
    """An image that cannot be read.

    Args:
        kind: one of the image kinds of `issues.ISSUES`.
        path: the file.
        reason: the rest of the message, which begins with the path.
    """

    def __init__(self, kind: str, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(kind, path, reason)  # as arguments, so that workers can pickle it
        self.kind = kind
        self.path = os.fspath(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} {self.reason}."


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image as uint8 RGB `(H, W, 3)`, rotated by its EXIF orientation.

    Raises:
        ImageError: the file does not exist (`kind` "image_missing"), or it is not a regular file,
            not a complete image, or states more pixels than PIL accepts, 179 million
            ("image_broken").
        MemoryError, OSError: the process has no memory or no open file left.
    """
    return _read(path, to_rgb)


def upright_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the (height, width) that `read_image` would give, from the header of the file.

    Raises:
        ImageError, MemoryError, OSError: as `read_image`, for what the header shows.
    """
    return _read(path, _upright_size)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if _orientation(image) >= 5 else (height, width)


def _read(path: str | os.PathLike[str], read: Callable[[Image.Image], _T]) -> _T:
    path = expand_home(path)
    try:
        # A pipe or device could block the reader for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ImageError("image_broken", path, "is not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of large images
            Image.init()  # fills Image.OPEN with the formats that this PIL was built with
            formats = [name for name in _FORMATS if name in Image.OPEN]
            with Image.open(path, formats=formats) as image:
                return read(image)
    except ImageError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError("image_missing", path, "does not exist") from None
    except UnidentifiedImageError:  # its text repeats the path
        raise ImageError("image_broken", path, describe_format(path)) from None
    except Exception as error:  # PIL fails in many ways on broken files
        if is_out_of_resources(error):
            raise
        reason = str(error).rstrip(".") or type(error).__name__
        raise ImageError("image_broken", path, f"cannot be read: {reason}") from error


def is_out_of_resources(error: Exception) -> bool:
    """Return whether an error of reading comes from the process, not from the image."""
    is_of_system = isinstance(error, OSError) and error.errno in _NO_RESOURCES
    return is_of_system or isinstance(error, MemoryError)


def to_rgb(image: Image.Image) -> np.ndarray:
    """Convert an image of PIL, of any mode, to uint8 RGB `(H, W, 3)`, rotated by its EXIF.

    Raises:
        Exception: PIL has not read the file yet, and cannot.
    """
    # PIL warns of odd metadata and of transparency, which are no reasons to refuse an image.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if deep := read_deep_colors(image):
            rgb, image = values_to_rgb(deep.values), deep.image
        else:
            image.load()  # before the EXIF: PIL rotates a TIFF itself and resets the tag
            rgb = _loaded_to_rgb(image)
        return _upright(rgb, image)


def _loaded_to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode in _DEEP_GREY_MODES or image.mode.startswith("I;16"):
        values = np.asarray(image)
        tags = getattr(image, "tag_v2", None)  # of a TIFF
        if image.mode == "I" and tags and tags.get(_SAMPLE_FORMAT_TAG, (1,))[0] == _UNSIGNED:
            values = values.view(np.uint32)  # PIL has no such mode
        return values_to_rgb(values, stretches_floats=True)
    if image.mode == "La":  # PIL has no direct conversion
        image = image.convert("LA")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, such as ".jpg", of the formats that `read_image` reads."""
    known = Image.registered_extensions()
    return frozenset(
        suffix for suffix, name in known.items() if name in _FORMATS and name in Image.OPEN
    )


def _upright(rgb: np.ndarray, image: Image.Image) -> np.ndarray:
    """Rotate the pixels `(H, W, 3)` of an image by its EXIF orientation."""
    turn = _UPRIGHT.get(_orientation(image))
    return rgb if turn is None else np.asarray(Image.fromarray(rgb).transpose(turn))


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # the metadata are broken, but not the image
        return 1
    return found if found in _UPRIGHT else 1
