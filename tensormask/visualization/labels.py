"""Write a label next to each object, where it covers no other label and little of the objects."""

import itertools
from collections.abc import Sequence

import cv2
import numpy as np

from tensormask.visualization.colors import Color
from tensormask.visualization.text import FONT_MARGIN, line_width, text_size, write

MAX_COVERED = 0.4  # part of an object's box that labels may cover together
MAX_FILLED = 0.25  # part of the image that all labels together may fill
ORDER_COST = 0.01  # of each position that would be preferred; a covered box costs 1


def draw_labels(
    canvas: np.ndarray,
    texts: Sequence[str],
    boxes: np.ndarray,
    colors: Sequence[Color],
    scale: float,
) -> None:
    """Write the label of each box `(K, 4)`, int xyxy, into `canvas` in place; the first ones first.

    Texts are enlarged by `scale`.
    """
    margin = line_width(FONT_MARGIN, scale)
    sizes = np.array([text_size(text, scale) for text in texts], int).reshape(-1, 2) + 2 * margin
    positions = place_labels(sizes, boxes, canvas.shape[:2])
    for text, position, size, color in zip(texts, positions, sizes, colors, strict=True):
        if position is not None:
            x, y = position
            end = (x + int(size[0]) - 1, y + int(size[1]) - 1)
            cv2.rectangle(canvas, (x, y), end, color, cv2.FILLED)
            brightness = np.dot(color, (0.299, 0.587, 0.114))
            ink = (0, 0, 0) if brightness > 120 else (255, 255, 255)
            write(canvas, text, x + margin, y + margin, ink, scale)


def place_labels(
    sizes: np.ndarray, boxes: np.ndarray, canvas_size: tuple[int, int]
) -> list[tuple[int, int] | None]:
    """Choose the top left corner of the label of each box, or None to omit it.

    The first labels are placed first. Of the positions above, below, inside and beside its box that
    are inside of the image and clear of earlier labels, each label takes the one that covers the
    least of all boxes. It is omitted if at each position labels would cover more than 40 % of a
    box. All are omitted if they would together fill more than a quarter of the image.

    Args:
        sizes: int `(K, 2)`, width and height of the labels.
        boxes: int `(K, 4)` xyxy.
        canvas_size: height and width of the image.
    """
    if sizes.prod(1).sum() > MAX_FILLED * np.prod(canvas_size):
        return [None] * len(boxes)
    areas = np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(1), 1)
    covered = np.zeros(len(boxes))
    placed = np.zeros((0, 4), int)
    positions: list[tuple[int, int] | None] = []
    for size, box in zip(sizes, boxes, strict=True):
        corners = np.clip(_candidates(size, box), 0, np.maximum(np.flip(canvas_size) - size, 0))
        labels = np.concatenate([corners, corners + size], axis=1)
        reach = np.concatenate([corners.min(0), corners.max(0) + size])[None]
        near = np.flatnonzero(_intersections(reach, boxes)[0])
        parts = _intersections(labels, boxes[near]) / areas[near]
        # The root, because a label on a large other object seems to be that object's.
        cost = np.sqrt(parts).sum(1) + ORDER_COST * np.arange(len(labels))
        cost[(parts + covered[near] > MAX_COVERED).any(1)] = np.inf
        cost[_intersections(labels, placed).any(1)] = np.inf
        best = cost.argmin()
        if np.isinf(cost[best]):
            positions.append(None)
            continue
        covered[near] += parts[best]
        placed = np.concatenate([placed, labels[best : best + 1]])
        positions.append((int(corners[best, 0]), int(corners[best, 1])))
    return positions


def _candidates(size: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Return corners `(P, 2)` of labels that touch `box` or are inside, preferred first."""
    (width, height), (x0, y0, x1, y1) = size, box
    left, center, right = x0, (x0 + x1 - width) // 2, x1 - width
    above, top, middle, bottom, below = y0 - height, y0, (y0 + y1 - height) // 2, y1 - height, y1
    return np.array(
        [
            *itertools.product((left, right, center), (above, below, top, bottom, middle)),
            *itertools.product((x1, x0 - width), (top, middle, bottom)),
        ]
    )


def _intersections(boxes_a: np.ndarray, boxes_b: np.ndarray) -> np.ndarray:
    """Return the shared areas `(A, B)` of boxes."""
    a, b = boxes_a.T[..., None], boxes_b.T
    widths = np.minimum(a[2], b[2]) - np.maximum(a[0], b[0])
    heights = np.minimum(a[3], b[3]) - np.maximum(a[1], b[1])
    return np.maximum(widths, 0) * np.maximum(heights, 0)
