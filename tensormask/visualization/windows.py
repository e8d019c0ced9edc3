"""Images of scores and masks: the natural and the aligned view of a 4D tensor as tiles.

Masks and scores are probabilities; images are uint8 RGB arrays `(H, W, 3)`.
"""

from collections.abc import Iterable, Mapping, Sequence

import cv2
import numpy as np

from tensormask.visualization.grid import enlarge, fit, tile_grid

Colour = tuple[int, int, int]

# From background over undecided to object.
MASK_COLOURS = ((30, 70, 150), (125, 170, 215), (255, 255, 255), (240, 150, 115), (175, 20, 40))
MARK = (0, 200, 60)  # green is none of them


def mask_colours(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities `(...)` as colours `(..., 3)`: blue 0, white 0.5, red 1."""
    places = np.linspace(0, 1, len(MASK_COLOURS))
    channels = [np.interp(probabilities, places, c) for c in zip(*MASK_COLOURS, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def score_view(
    scores: np.ndarray, brightest: float, cell: int, framed: Iterable[tuple[int, int, Colour]] = ()
) -> np.ndarray:
    """Scores `(H, W)` as square cells, black for 0 and light yellow for the score `brightest`.

    Args:
        cell: side of a cell in pixels.
        framed: rows, columns and frame colours of some cells.
    """
    grey = (np.clip(scores / brightest, 0, 1) * 255).round().astype(np.uint8)
    colours = cv2.applyColorMap(grey, cv2.COLORMAP_INFERNO)
    view = enlarge(cv2.cvtColor(colours, cv2.COLOR_BGR2RGB), cell)
    for y, x, colour in framed:
        cv2.rectangle(view, (x * cell, y * cell), ((x + 1) * cell, (y + 1) * cell), colour, 2)
    return view


def natural_view(
    masks: np.ndarray,
    rows: Sequence[int],
    columns: Sequence[int],
    side: int,
    framed: Mapping[tuple[int, int], Colour] | None = None,
) -> np.ndarray:
    """Tile (y, x) is the mask ``F(:, :, y, x)`` of the window at row y and column x.

    Args:
        masks: `(R, C, V, U)`.
        rows, columns: the R rows and C columns of the windows.
        side: side of a tile in pixels, at most.
        framed: colour of a frame around the window at (y, x).
    """
    tiles = [[fit(mask_colours(mask), side) for mask in row] for row in masks]
    frames = {(rows.index(y), columns.index(x)): c for (y, x), c in (framed or {}).items()}
    return tile_grid(tiles, [f"y {y}" for y in rows], [f"x {x}" for x in columns], frames)


def aligned_view(
    maps: np.ndarray,
    offsets: tuple[Sequence[float], Sequence[float]],
    side: int,
    marked: tuple[Sequence[float], Sequence[float]] | None = None,
) -> np.ndarray:
    """Tile (v, u) is the map ``A(v, u, :, :)`` over all places.

    Args:
        maps: `(R, C, H, W)`.
        offsets: the R offsets v and the C offsets u from the middle of the mask, in its pixels.
        side: longer side of a tile in pixels, at most.
        marked: rows and columns of (H, W) that get a green ring, R of them and C of them: map
            (r, c) gets one at the r-th row and c-th column. They may be fractions, or outside.
    """
    tiles = [[fit(mask_colours(values), side) for values in row] for row in maps]
    if marked is not None:
        scale = tiles[0][0].shape[0] / maps.shape[2]
        for y, row in zip(marked[0], tiles, strict=True):
            for x, tile in zip(marked[1], row, strict=True):
                centre = round((x + 0.5) * scale), round((y + 0.5) * scale)
                cv2.circle(tile, centre, 5, (0, 0, 0), 4, cv2.LINE_AA)
                cv2.circle(tile, centre, 5, MARK, 2, cv2.LINE_AA)
    names = ([f"{axis} {value:+g}" for value in o] for axis, o in zip("vu", offsets, strict=True))
    return tile_grid(tiles, *names)


def window_crop(rgb: np.ndarray, box: Sequence[float], side: int) -> np.ndarray:
    """What a window `(x0, y0, x1, y1)` sees, `(side, side, 3)`; black beyond the image."""
    x0, y0, x1, y1 = (round(edge) for edge in box)
    seen = np.zeros((y1 - y0, x1 - x0, 3), np.uint8)
    inside = rgb[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)]
    top, left = max(-y0, 0), max(-x0, 0)
    seen[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return cv2.resize(seen, (side, side), interpolation=cv2.INTER_AREA)


def grid_through(
    place: tuple[int, int], shape: tuple[int, int], most: int
) -> tuple[list[int], list[int]]:
    """Evenly spaced rows and columns of a grid, ``place`` among them, at most ``most`` of each."""
    step = -(-max(shape) // most)
    rows, columns = (range(p % step, extent, step) for p, extent in zip(place, shape, strict=True))
    return list(rows), list(columns)


def spread(side: int, most: int) -> list[int]:
    """At most ``most`` of the pixels 0 .. side - 1, evenly spaced about the middle."""
    num = min(side, most)
    step = (side - 1) // max(1, num - 1)
    first = (side - 1 - step * (num - 1)) // 2
    return [first + step * i for i in range(num)]
