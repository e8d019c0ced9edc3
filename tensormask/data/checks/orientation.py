"""Sizes of image files against those that the annotations state."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_FEW, _TURNED_SHARE = 2, 0.1
_SAME_FACTOR = 0.02


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
