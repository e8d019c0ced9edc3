"""An image as users give it, a path, URL, PIL image, array or tensor, as an RGB array."""

import os
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from tensormask.checkpoint.downloads import download, resolve
from tensormask.data.arrays import image_to_rgb
from tensormask.data.images import ImageError, read_image
from tensormask.utils.errors import UserError
from tensormask.utils.files import expand_home

ImageInput = str | PathLike[str] | Image.Image | np.ndarray | Tensor

MAX_DOWNLOADED_BYTES = 100_000_000  # of an image


def read_input(image: Any, channel_order: str = "RGB") -> np.ndarray:
    """Return one input of `Predictor` as uint8 RGB `(H, W, 3)`.

    Raises:
        UserError, ImageError, OSError: as `Predictor`.
    """
    if not isinstance(image, str | PathLike):
        return image_to_rgb(image, channel_order)
    scheme, separator, _ = os.fspath(image).partition("://")
    if isinstance(image, str) and separator:
        if scheme.lower() in ("https", "http"):
            return _read_url(image)
        if scheme.lower() != "file":
            raise UserError(f"{image!r} is not the URL of an image: http, https or file")
        image = resolve(image)
    image = expand_home(image)
    if os.path.isdir(image):
        raise UserError(f"{image} is a folder: give its files, as in Path({image!r}).glob('*.jpg')")
    return read_image(image)


def _read_url(url: str) -> np.ndarray:
    """Download an image, without keeping its file."""
    with tempfile.TemporaryDirectory(prefix="tensormask-") as folder:
        path = download(url, path=Path(folder) / "image", max_bytes=MAX_DOWNLOADED_BYTES)
        try:
            return read_image(path)
        except ImageError as error:
            raise ImageError(error.kind, url, error.reason) from None
