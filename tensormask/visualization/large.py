"""Draw the detections of a large image on a small copy of it."""

from collections.abc import Iterable

import numpy as np

from tensormask.visualization.colors import Color
from tensormask.visualization.instances import (
    BOX_WIDTH,
    OUTLINE_WIDTH,
    draw_rectangle,
    draw_region,
)
from tensormask.visualization.text import line_width, relative_size


def draw_cropped(
    small: np.ndarray,
    factor: int,
    regions: Iterable[tuple[int, int, np.ndarray]],
    colors: Iterable[Color],
) -> np.ndarray:
    """Draw masks, tinted and outlined, on a copy of an image, without texts.

    Args:
        small: `(H, W, 3)` uint8 RGB, the image divided by `factor`.
        factor: a whole number.
        regions: `(x0, y0, mask)` of each object in pixels of the large image, mask `(h, w)` bool;
            in the order of drawing.
        colors: RGB of each.
    """
    canvas = small.copy()
    width = line_width(OUTLINE_WIDTH, relative_size(max(small.shape[:2]) // 4))
    for (x0, y0, mask), color in zip(regions, colors, strict=True):
        if mask.size:
            corner = x0 // factor, y0 // factor
            draw_region(
                canvas, _divided(mask, x0 % factor, y0 % factor, factor), corner, color, width
            )
    return canvas


def draw_boxes(
    small: np.ndarray, factor: int, boxes: np.ndarray, colors: Iterable[Color]
) -> np.ndarray:
    """Draw boxes `(K, 4)` in pixels of the large image, as `draw_cropped` draws masks."""
    canvas = small.copy()
    corners = (boxes / factor).round().astype(int)
    for box, color in zip(corners, colors, strict=True):
        draw_rectangle(canvas, box, color, BOX_WIDTH)
    return canvas


def _divided(mask: np.ndarray, left: int, top: int, factor: int) -> np.ndarray:
    """Return a mask in blocks of `factor` pixels: those of which it covers half, or else any.

    Args:
        left, top: the columns and rows of the first blocks before the mask.
    """
    if factor == 1:
        return mask
    bottom, right = -(top + mask.shape[0]) % factor, -(left + mask.shape[1]) % factor
    padded = np.pad(mask, ((top, bottom), (left, right)))
    shape = padded.shape[0] // factor, factor, padded.shape[1] // factor, factor
    share = padded.reshape(shape).mean((1, 3))
    half = share >= 0.5
    return half if half.any() else share > 0
