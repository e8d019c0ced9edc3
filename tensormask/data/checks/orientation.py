"""Whether image files and annotations have one orientation and size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from tensormask.data.checks.annotations import Annotation
from tensormask.data.checks.segmentation import segmentation_to_rle

_FEW, _TURNED_SHARE = 2, 0.1
_SAME_FACTOR = 0.02
_FEW_OUTLINES, _MOST_OUTLINES, _CLEARLY = 4, 0.75, 1.2
_LOOSE = np.ones((5, 5), np.uint8)  # outlines are drawn some pixels beside of edges
# The image as it is stored, from the upright one, by EXIF orientation.
_STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image),
    7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
    8: lambda image: np.rot90(image, -1),
}


@dataclass(frozen=True)
class Orientations:
    """M image files.

    Attributes:
        stated: float64 `(M, 2)`, (height, width) in pixels of the annotations.
        stored: float64 `(M, 2)`, of the file, before EXIF turns it.
        tags: int64 `(M,)`, EXIF orientation; from 5 on it exchanges height and width.
    """

    stated: np.ndarray
    stored: np.ndarray
    tags: np.ndarray


def file_size_cause(files: Orientations) -> tuple[str, str] | None:
    """Return the name of a diagnosis and its detail, or None if sizes agree for most files."""
    stated, stored = files.stated, files.stored
    transposes = files.tags >= 5
    upright = np.where(transposes[:, None], stored[:, ::-1], stored)
    wrong = (stated != upright).any(axis=1)
    as_stored = wrong & (stated == stored).all(axis=1)
    num_transposed, count = np.count_nonzero(transposes), np.count_nonzero(as_stored)
    if count >= max(_FEW, num_transposed / 2, _TURNED_SHARE * len(wrong)):
        detail = f"{count} of {len(wrong)} images state the size before they are turned"
        return "images_not_turned", detail
    num_wrong = np.count_nonzero(wrong)
    if num_wrong < _FEW or 2 * num_wrong <= len(wrong):
        return None
    (height, width), (true_height, true_width) = stated[wrong][0], upright[wrong][0]
    detail = f"{num_wrong} of {len(wrong)} images, such as {width:g} x {height:g} for a file of "
    detail += f"{true_width:g} x {true_height:g}"
    swapped = wrong & (stated == upright[:, ::-1]).all(axis=1)
    factors = (stated / upright)[wrong]
    if 2 * np.count_nonzero(swapped) > num_wrong:
        detail += "; width and height are exchanged"
    elif np.ptp(factors) <= _SAME_FACTOR * np.median(factors):
        detail += f"; the annotations' size is {np.median(factors):.3g} times that of the file"
    return "images_of_another_size", detail


def stored_fits_better(rgb: np.ndarray, tag: int, annotations: list[Annotation]) -> bool | None:
    """Return whether the outlines of masks follow the edges of the image before EXIF turned it.

    Args:
        rgb: the upright image, `(H, W, 3)`.
        tag: its EXIF orientation, 2 to 8.
        annotations: of the image, checked.

    Returns:
        None if no mask fits both forms of the image.
    """
    strength = np.zeros(2)
    for number, image in enumerate((rgb, _STORED[tag](rgb))):
        size = image.shape[:2]
        outlines = np.zeros(size, dtype=bool)
        for annotation in annotations:
            mask = annotation["segmentation"]
            # A run-length code cannot be read at another size.
            if mask and (isinstance(mask, list) or size == rgb.shape[:2]):
                outlines |= _outline(mask_utils.decode(segmentation_to_rle(mask, size)) > 0)
        if not outlines.any():
            return None
        # Of each channel: two colors can be equally bright.
        edges = np.hypot(*np.gradient(image.astype(np.float32), axis=(0, 1))).max(axis=2)
        strength[number] = cv2.dilate(edges, _LOOSE)[outlines].mean()
    return bool(strength[1] > _CLEARLY * strength[0])


def outlines_cause(fits: list[bool]) -> tuple[str, str] | None:
    """Return the diagnosis of the results of `stored_fits_better`, one for each image."""
    if len(fits) < _FEW_OUTLINES or sum(fits) < _MOST_OUTLINES * len(fits):
        return None
    detail = f"the outlines of the masks fit {sum(fits)} of {len(fits)} images with an orientation "
    return "images_not_turned", detail + "better before they are turned"


def _outline(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a mask `(H, W)` with a neighbor that is not of it, and this neighbor."""
    outline = np.zeros_like(mask)
    for axis in (0, 1):
        differs = np.diff(mask, axis=axis)
        before = (slice(None, -1), slice(None))[:: 1 - 2 * axis]
        after = (slice(1, None), slice(None))[:: 1 - 2 * axis]
        outline[before] |= differs
        outline[after] |= differs
    return outline
