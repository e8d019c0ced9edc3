"""Reads picture files of every kind as RGB."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image, ImageOps


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a picture as uint8 RGB `(H, W, 3)`, turned as its EXIF orientation says."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
