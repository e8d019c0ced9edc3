"""Reads image files of any format as 8-bit RGB.

Ordinary images get the same pixels as in detectron2: they are rotated by their EXIF orientation and
converted by PIL's `convert("RGB")`, which drops transparency and looks up palettes. Grey images of
more than 8 bits, which PIL would clip at 255, are stretched (`stretch_to_8_bits`). The first frame
of a file with several frames is used.
"""

from __future__ import annotations

import os
import stat
import warnings
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError

from tensormask.utils.errors import UserError

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
_DARK_PERCENTILE, _BRIGHT_PERCENTILE = 0.1, 99.9


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
    """
    try:
        # A pipe or device could block the reader for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ImageError("image_broken", path, "is not a regular file")
        # PIL warns of odd metadata and of large images, both of which can be read.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.init()  # fills Image.OPEN with the formats that this PIL was built with
            formats = [name for name in _FORMATS if name in Image.OPEN]
            with Image.open(path, formats=formats) as image:
                image.load()  # before the EXIF: PIL rotates a TIFF itself and resets the tag
                return to_rgb(_upright(image))
    except ImageError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError("image_missing", path, "does not exist") from None
    except UnidentifiedImageError:  # its text repeats the path
        raise ImageError("image_broken", path, "is not an image that PIL can read") from None
    except Exception as error:  # PIL fails in many ways on broken files
        reason = str(error).rstrip(".") or type(error).__name__
        raise ImageError("image_broken", path, f"cannot be read: {reason}") from error


def stretch_to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale grey values of any range to uint8, so that the image uses 0 to 255.

    The scale is linear from the 0.1th to the 99.9th percentile of the finite values, and clips
    there: a microscope often uses few of 16 bits, and single hot pixels must not set the scale. If
    the two percentiles are equal, lowest and highest value are used; a constant image is black.
    Infinities become 0 and 255, NaN becomes 0.

    Example:
        >>> stretch_to_8_bits(np.array([100, 150, 200])).tolist()
        [0, 128, 255]
    """
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    low = high = 0.0
    if len(finite):
        low, high = np.percentile(finite, (_DARK_PERCENTILE, _BRIGHT_PERCENTILE))
        if low == high:
            low, high = finite.min(), finite.max()
    # `or 1` avoids a division by zero in a constant image.
    stretched = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / (high - low or 1)
    return np.round(stretched.clip(0, 1) * 255).astype(np.uint8)


def to_rgb(image: Image.Image) -> np.ndarray:
    """Convert an image of PIL, of any mode, to uint8 RGB `(H, W, 3)`."""
    if image.mode in _DEEP_GREY_MODES or image.mode.startswith("I;16"):
        grey = stretch_to_8_bits(np.asarray(image))
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, such as ".jpg", of the formats that `read_image` reads."""
    known = Image.registered_extensions()
    return frozenset(
        suffix for suffix, name in known.items() if name in _FORMATS and name in Image.OPEN
    )


def _upright(image: Image.Image) -> Image.Image:
    """Rotate an image by its EXIF orientation."""
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # the metadata are broken, but not the image
        return image
    return image if turn is None else image.transpose(turn)
