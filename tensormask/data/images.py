"""Reads image files of every kind as 8-bit RGB.

Ordinary images get the pixels of detectron2's reader: what PIL's `convert("RGB")` makes of them
after they are turned upright, so that transparency is dropped and palettes are looked up. Grey
images of more than 8 bits, which PIL would clip at 255, are stretched (`stretch_to_8_bits`). Of
a file with several frames the first is taken.
"""

from __future__ import annotations

import functools
import os
import stat
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from tensormask.utils.errors import UserError

# EXIF's orientation, and what turns an image of it upright.
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
# What is read whatever a file is called. PIL knows more formats; some of them, EPS and WMF, it has
# other programs read, which nobody wants for images from anywhere.
_FORMATS = (
    *("JPEG", "MPO", "PNG", "TIFF", "WEBP", "AVIF", "GIF", "BMP", "DIB", "PPM", "JPEG2000"),
    *("TGA", "ICO", "PCX", "SGI", "PSD", "DDS", "IM", "PFM"),
)
_DEEP_GREY_MODES = ("I", "F")  # and I;16, I;16B, ...: 16 or 32 bits, integers or floats
_DARK_PERCENTILE, _BRIGHT_PERCENTILE = 0.1, 99.9


class ImageError(UserError):
    """An image that cannot be read.

    Args:
        kind: what is wrong, one of the image kinds of `issues.ISSUES`.
        path: the file.
        reason: what is the matter with it, to be read after the path.
    """

    def __init__(self, kind: str, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(kind, path, reason)  # the arguments: errors of workers are pickled
        self.kind = kind
        self.path = os.fspath(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} {self.reason}."


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an image as uint8 RGB `(H, W, 3)`, turned as its EXIF orientation says.

    Raises:
        ImageError: there is no such file (`kind` "image_missing"), or it is no file, or no
            whole image, or states more pixels than PIL takes for honest, 179 million
            ("image_broken").
    """
    try:
        # Anything but a file could keep the reader waiting for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ImageError("image_broken", path, "is no file")
        # PIL warns of odd metadata and of large images; neither keeps them from being read.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_formats()) as image:
                return _to_rgb(image)
    except ImageError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError("image_missing", path, "is not there") from None
    except UnidentifiedImageError:  # its text is the path once more
        raise ImageError("image_broken", path, "is no image of a kind that PIL knows") from None
    except Exception as error:  # PIL fails in many ways on broken files
        reason = str(error).rstrip(".") or type(error).__name__
        raise ImageError("image_broken", path, f"cannot be read: {reason}") from error


@functools.cache
def _formats() -> list[str]:
    """Those of `_FORMATS` that this PIL was built with."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def stretch_to_8_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of any range as uint8, dark and bright ends of the image as 0 and 255.

    Linear from the 0.1th to the 99.9th percentile of the finite values, and clipped there: of 16
    bits a microscope often uses few, and single hot pixels should not decide. Where nearly all
    values are the same it goes from the lowest to the highest; an image of one value is black.
    Infinities become 0 and 255, NaN becomes 0.
    """
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    low = high = 0.0
    if len(finite):
        low, high = np.percentile(finite, (_DARK_PERCENTILE, _BRIGHT_PERCENTILE))
        if low == high:
            low, high = finite.min(), finite.max()
    # The span of an image of one value does not matter; 0 would divide by nothing.
    stretched = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / (high - low or 1)
    return np.round(stretched.clip(0, 1) * 255).astype(np.uint8)


def _to_rgb(image: Image.Image) -> np.ndarray:
    image.load()  # before the orientation: PIL turns TIFFs by itself, and then resets it
    turn = _UPRIGHT.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode in _DEEP_GREY_MODES or image.mode.startswith("I;16"):
        grey = stretch_to_8_bits(np.asarray(image))
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # broken metadata of an image that is whole
        return None
