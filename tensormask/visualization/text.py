"""Text on images, and how large texts and lines are for an image's size.

OpenCV 5 draws Latin, Greek, Cyrillic, CJK and more; OpenCV 4 draws ASCII only, and "?" for
everything else.
"""

import cv2
import numpy as np

FONT, FONT_SCALE, FONT_MARGIN = cv2.FONT_HERSHEY_SIMPLEX, 0.45, 3
REFERENCE_SIDE = 640  # pixels: smaller images have texts and lines of the same size


def relative_size(side: int) -> float:
    """Return the factor by which texts and lines are enlarged on an image of `side` pixels.

    It grows more slowly than the image, so that a large image is readable both when it is shown at
    the size of a screen and when it is enlarged.

    Example:
        >>> [relative_size(side) for side in (128, 640, 1280, 3840)]
        [1.0, 1.0, 1.5, 3.5]
    """
    return max(1.0, 0.5 + side / (2 * REFERENCE_SIDE))


def line_width(width: float, scale: float) -> int:
    """Return the whole number of pixels of a line or margin of `width` pixels, times `scale`."""
    return max(1, round(width * scale))


def text_size(text: str, scale: float = 1.0) -> tuple[int, int]:
    """Return width and height of a line in pixels; the height is the same for all texts."""
    (_, ascent), descent = cv2.getTextSize("p", FONT, FONT_SCALE * scale, line_width(1, scale))
    (width, _), _ = cv2.getTextSize(text, FONT, FONT_SCALE * scale, line_width(1, scale))
    return width, ascent + descent


def write(
    image: np.ndarray,
    text: str,
    x: int,
    y: int,
    color: tuple[int, int, int],
    scale: float = 1.0,
) -> None:
    """Write a line into `image` in place, with the top left corner of its rectangle at `(x, y)`."""
    (_, ascent), _ = cv2.getTextSize("p", FONT, FONT_SCALE * scale, line_width(1, scale))
    weight = line_width(1, scale)
    corner = (x, y + ascent)
    cv2.putText(image, text, corner, FONT, FONT_SCALE * scale, color, weight, cv2.LINE_AA)
