"""Arrange images: titles, captions, grids of tiles, montages.

Images are uint8 RGB arrays `(H, W, 3)`, in and out; inputs are not changed.
"""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from tensormask.visualization.text import FONT_MARGIN, line_width, relative_size, text_size, write

WHITE, DARK = (255, 255, 255), (32, 32, 32)
GAP = 8  # pixels between images
TILE_GAP = 4  # pixels between the tiles of a grid, which can contain a frame


def side_by_side(
    left: np.ndarray, right: np.ndarray, titles: tuple[str, str] | None = None
) -> np.ndarray:
    """Arrange two images on white, aligned at the top, each below its title."""
    images = list(map(titled, (left, right), titles)) if titles else [left, right]
    return montage(images, columns=2)


def titled(image: np.ndarray, title: str) -> np.ndarray:
    """Add a white strip with `title` above `image`, which is widened if the title is longer."""
    check_image(image)
    height, width = image.shape[:2]
    scale = relative_size(height)
    margin, (text_width, text_height) = line_width(FONT_MARGIN, scale), text_size(title, scale)
    strip = text_height + 2 * margin
    result = np.full((strip + height, max(width, text_width + 2 * margin), 3), 255, np.uint8)
    result[strip:, :width] = image
    write(result, title, margin, margin, DARK, scale)
    return result


def captioned(image: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Add a white strip with texts below `image`, as many texts per line as fit."""
    check_image(image)
    scale = relative_size(image.shape[0])
    margin = line_width(FONT_MARGIN, scale)
    lines: list[str] = []
    for text in texts:
        longer = f"{lines[-1]}   {text}" if lines else text
        if lines and text_size(longer, scale)[0] + 2 * margin <= image.shape[1]:
            lines[-1] = longer
        else:
            lines.append(text)
    step = text_size("", scale)[1] + margin
    width = max([image.shape[1], *(text_size(line, scale)[0] + 2 * margin for line in lines)])
    height = image.shape[0] + len(lines) * step + margin * bool(lines)
    result = np.full((height, width, 3), 255, np.uint8)
    result[: image.shape[0], : image.shape[1]] = image
    for number, line in enumerate(lines):
        write(result, line, margin, image.shape[0] + number * step + margin, DARK, scale)
    return result


def montage(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Arrange images of any sizes in rows of `columns` on white.

    A column is as wide as its widest image, and a row as high as its highest.

    Raises:
        ValueError: no images, or fewer than one column.

    Example:
        >>> images = [np.zeros((height, 20, 3), np.uint8) for height in (10, 30, 50)]
        >>> montage(images, columns=2).shape  # 8 pixels between images
        (88, 48, 3)
    """
    if not images or columns < 1:
        raise ValueError(f"{len(images)} images in {columns} columns; a montage needs some of each")
    for image in images:
        check_image(image)
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    heights = [max(image.shape[0] for image in row) for row in rows]
    widths = [max(image.shape[1] for image in images[c::columns]) for c in range(len(rows[0]))]
    tops = np.cumsum([0, *(height + GAP for height in heights)])
    lefts = np.cumsum([0, *(width + GAP for width in widths)])
    canvas = np.full((tops[-1] - GAP, lefts[-1] - GAP, 3), 255, np.uint8)
    for top, row in zip(tops, rows, strict=False):
        for x, image in zip(lefts, row, strict=False):
            canvas[top : top + image.shape[0], x : x + image.shape[1]] = image
    return canvas


def tile_grid(
    tiles: Sequence[Sequence[np.ndarray]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    frames: Mapping[tuple[int, int], tuple[int, int, int]] | None = None,
) -> np.ndarray:
    """Arrange small images of one size in rows and columns with names.

    Args:
        tiles: R rows of C images.
        row_names, column_names: R and C texts, before the rows and above the columns.
        frames: RGB color of a frame around the tile at ``(row, column)``.

    Raises:
        ValueError: no tiles, tiles of different sizes, or a wrong number of names.
    """
    shapes = {tile.shape for row in tiles for tile in row}
    if len(shapes) != 1 or [len(row) for row in tiles] != [len(column_names)] * len(row_names):
        raise ValueError(
            f"{len(tiles)} rows of tiles of the shapes {sorted(shapes)} do not make a grid with "
            f"{len(row_names)} row names and {len(column_names)} column names"
        )
    ((height, width, _),) = shapes
    left = max(text_size(name)[0] for name in row_names) + 2 * FONT_MARGIN
    line_height = text_size("")[1]
    top = line_height + FONT_MARGIN
    step_y, step_x = height + TILE_GAP, width + TILE_GAP
    size = (top + len(row_names) * step_y + TILE_GAP, left + len(column_names) * step_x + TILE_GAP)
    canvas = np.full((*size, 3), 255, np.uint8)
    for row, name in enumerate(row_names):
        y = top + TILE_GAP + row * step_y
        write(canvas, name, FONT_MARGIN, y + (height - line_height) // 2, DARK)
    for column, name in enumerate(column_names):
        x = left + TILE_GAP + column * step_x
        write(canvas, name, x + max(0, width - text_size(name)[0]) // 2, 0, DARK)
    for row, column in np.ndindex(len(row_names), len(column_names)):
        y, x = top + TILE_GAP + row * step_y, left + TILE_GAP + column * step_x
        if frames and (row, column) in frames:
            corners = (x - TILE_GAP + 1, y - TILE_GAP + 1), (x + step_x - 2, y + step_y - 2)
            cv2.rectangle(canvas, *corners, frames[row, column], cv2.FILLED)
        canvas[y : y + height, x : x + width] = tiles[row][column]
    return canvas


def shrink(image: np.ndarray, max_width: int) -> np.ndarray:
    """Return a copy that is at most `max_width` pixels wide, with the same aspect ratio."""
    height, width = image.shape[:2]
    if width <= max_width:
        return image.copy()
    size = (max_width, max(1, round(height * max_width / width)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def fit(image: np.ndarray, side: int) -> np.ndarray:
    """Return a copy whose longer side is at most `side`: shrunk, or enlarged by a whole factor."""
    check_image(image)
    scale = side / max(image.shape[:2])
    if scale >= 1:
        return enlarge(image, int(scale))
    height, width = (max(1, round(extent * scale)) for extent in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """Return a copy with each pixel repeated `factor` x `factor` times; any `(H, W, ...)`."""
    if factor == 1:
        return image.copy()
    return np.ascontiguousarray(image.repeat(factor, axis=0).repeat(factor, axis=1))


def check_image(image: np.ndarray) -> None:
    """Raise ValueError unless `image` is a uint8 array `(H, W, 3)` with pixels."""
    dtype = getattr(image, "dtype", type(image))
    shape: tuple[int, ...] = getattr(image, "shape", ())
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise ValueError(f"expected a uint8 image (H, W, 3), got {dtype} of shape {shape}")
