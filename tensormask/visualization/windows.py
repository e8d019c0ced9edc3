"""Draw window scores and masks: the natural and the aligned view of a 4D tensor as tiles.

Masks and scores are probabilities; images are uint8 RGB arrays `(H, W, 3)`.
"""

from collections.abc import Iterable, Mapping, Sequence

import cv2
import numpy as np

from tensormask.visualization.grid import enlarge, fit, tile_grid

Color = tuple[int, int, int]

# From background (0) over undecided (0.5) to object (1).
MASK_COLORS = ((30, 70, 150), (125, 170, 215), (255, 255, 255), (240, 150, 115), (175, 20, 40))
MARK = (0, 200, 60)  # green, unlike these colors


def mask_colors(probabilities: np.ndarray) -> np.ndarray:
    """Map probabilities `(...)` to colors `(..., 3)`: 0 to blue, 0.5 to white, 1 to red."""
    points = np.linspace(0, 1, len(MASK_COLORS))
    channels = [np.interp(probabilities, points, c) for c in zip(*MASK_COLORS, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def score_view(
    scores: np.ndarray, brightest: float, cell: int, frames: Iterable[tuple[int, int, Color]] = ()
) -> np.ndarray:
    """Draw scores `(H, W)` as square cells, black for 0 and light yellow for `brightest`.

    Args:
        cell: side of a cell in pixels.
        frames: rows, columns and colors of frames around cells.
    """
    grey = (np.clip(scores / brightest, 0, 1) * 255).round().astype(np.uint8)
    colors = cv2.applyColorMap(grey, cv2.COLORMAP_INFERNO)
    view = enlarge(cv2.cvtColor(colors, cv2.COLOR_BGR2RGB), cell)
    for y, x, color in frames:
        cv2.rectangle(view, (x * cell, y * cell), ((x + 1) * cell, (y + 1) * cell), color, 2)
    return view


def natural_view(
    masks: np.ndarray,
    rows: Sequence[int],
    columns: Sequence[int],
    side: int,
    frames: Mapping[tuple[int, int], Color] | None = None,
) -> np.ndarray:
    """Draw a grid whose tile (y, x) is the mask ``F(:, :, y, x)`` of the window at (y, x).

    Args:
        masks: `(R, C, V, U)`.
        rows, columns: the R rows and C columns of the windows.
        side: maximum side of a tile in pixels.
        frames: color of a frame around the window at (y, x).
    """
    tiles = [[fit(mask_colors(mask), side) for mask in row] for row in masks]
    at = {(rows.index(y), columns.index(x)): color for (y, x), color in (frames or {}).items()}
    return tile_grid(tiles, [f"y {y}" for y in rows], [f"x {x}" for x in columns], at)


def aligned_view(
    slices: np.ndarray,
    offsets: tuple[Sequence[float], Sequence[float]],
    side: int,
    marks: tuple[Sequence[float], Sequence[float]] | None = None,
) -> np.ndarray:
    """Draw a grid whose tile (v, u) is the slice ``A(v, u, :, :)`` over all locations.

    Args:
        slices: `(R, C, H, W)`.
        offsets: the R offsets v and the C offsets u from the center of the mask, in its pixels.
        side: maximum longer side of a tile in pixels.
        marks: R rows and C columns of (H, W) that get a green ring: slice (r, c) at the r-th row
            and the c-th column. They may be fractions, or outside.
    """
    tiles = [[fit(mask_colors(values), side) for values in row] for row in slices]
    if marks is not None:
        scale = tiles[0][0].shape[0] / slices.shape[2]
        for y, row in zip(marks[0], tiles, strict=True):
            for x, tile in zip(marks[1], row, strict=True):
                center = round((x + 0.5) * scale), round((y + 0.5) * scale)
                cv2.circle(tile, center, 5, (0, 0, 0), 4, cv2.LINE_AA)
                cv2.circle(tile, center, 5, MARK, 2, cv2.LINE_AA)
    row_names, column_names = [f"v {v:+g}" for v in offsets[0]], [f"u {u:+g}" for u in offsets[1]]
    return tile_grid(tiles, row_names, column_names)


def window_crop(rgb: np.ndarray, box: Sequence[float], side: int) -> np.ndarray:
    """Return the part of an image in a window `(x0, y0, x1, y1)`, resized to `(side, side, 3)`.

    It is black beyond the image.
    """
    x0, y0, x1, y1 = (round(edge) for edge in box)
    crop = np.zeros((y1 - y0, x1 - x0, 3), np.uint8)
    inside = rgb[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)]
    top, left = max(-y0, 0), max(-x0, 0)
    crop[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA)


def grid_through(
    index: tuple[int, int], shape: Sequence[int], max_num: int
) -> tuple[list[int], list[int]]:
    """Return evenly spaced rows and columns that include those of `index`, at most `max_num` each.

    Args:
        index: row and column in the grid.
        shape: number of rows and columns of the grid.
    """
    step = -(-max(shape) // max_num)
    rows, columns = (range(i % step, extent, step) for i, extent in zip(index, shape, strict=True))
    return list(rows), list(columns)


def spread(side: int, max_num: int) -> list[int]:
    """Return at most `max_num` of the pixels 0 .. side - 1, evenly spaced about the middle."""
    num = min(side, max_num)
    step = (side - 1) // max(1, num - 1)
    first = (side - 1 - step * (num - 1)) // 2
    return [first + step * i for i in range(num)]
