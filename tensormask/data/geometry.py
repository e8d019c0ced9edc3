"""Geometry of an augmentation: how pixels, points and boxes of an image move.

A `Geometry` is a fixed chain, each step of which can be left out: crop, resize, flip, window (a
crop that can reach beyond the image, which pads it), and rotation by quarter turns. Crop, flip,
window and rotation move whole pixels, so only the resize interpolates.

Without crop, window and rotation, pixels and boxes equal those of detectron2's mapper: images are
resized with PIL's bilinear filter, and the coordinates of boxes are transformed before they are
clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

FLIPS = ("horizontal", "vertical", "both", "none")
# Color of the padding within an augmented image, RGB: ImageNet's mean, as SSD's zoom-out.
PADDING_COLOR = (124, 116, 104)


class Region(NamedTuple):
    """A rectangle of whole pixels."""

    top: int
    left: int
    height: int
    width: int

    def slices(self) -> tuple[slice, slice]:
        """Return the rows and columns."""
        rows = slice(self.top, self.top + self.height)
        return rows, slice(self.left, self.left + self.width)

    def intersection(self, other: Region) -> Region:
        """Return the common part; height and width are 0 or more."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom = min(self.top + self.height, other.top + other.height)
        right = min(self.left + self.width, other.left + other.width)
        return Region(top, left, max(0, bottom - top), max(0, right - left))

    def relative_to(self, other: Region) -> Region:
        """Return the region with its corner relative to that of another one."""
        return self._replace(top=self.top - other.top, left=self.left - other.left)


@dataclass(frozen=True)
class Geometry:
    """A crop, a resize, a flip, a window and a rotation, in this order.

    Attributes:
        old_size: (height, width) of the image in pixels.
        new_size: (height, width) after the resize.
        flip: "horizontal", "vertical", "both" or "none".
        quarter_turns: rotation at the end, in steps of 90 degrees counterclockwise.
        crop: the part of the old image that is resized; None for all of it.
        window: the part of the resized and flipped image that is left; what is outside of the
            image is padding. None for all of it.

    Example:
        >>> geometry = Geometry((10, 10), (30, 20), "horizontal")
        >>> transform_boxes(np.array([[1.0, 2.0, 5.0, 4.0]]), geometry).tolist()
        [[10.0, 6.0, 18.0, 12.0]]
    """

    old_size: tuple[int, int]
    new_size: tuple[int, int]
    flip: str = "none"
    quarter_turns: int = 0
    crop: Region | None = None
    window: Region | None = None

    @property
    def source(self) -> Region:
        """The part of the old image that is resized."""
        return self.crop or Region(0, 0, *self.old_size)

    @property
    def frame(self) -> Region:
        """The window, also if it is the whole image."""
        return self.window or Region(0, 0, *self.new_size)

    @property
    def visible(self) -> Region:
        """The part of the frame that shows the image, relative to the frame."""
        return self.frame.intersection(Region(0, 0, *self.new_size)).relative_to(self.frame)

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) after all steps."""
        height, width = self.frame[2:]
        return (width, height) if self.quarter_turns % 2 else (height, width)

    @property
    def can_cut(self) -> bool:
        """Whether objects within the image can leave it."""
        return self.crop is not None or self.window is not None

    @property
    def flips_rows(self) -> bool:
        """Whether the flip reverses the rows."""
        return self.flip in ("vertical", "both")

    @property
    def flips_columns(self) -> bool:
        """Whether the flip reverses the columns."""
        return self.flip in ("horizontal", "both")


def transform_image(
    image: np.ndarray,
    geometry: Geometry,
    recolor: Callable[[Image.Image], Image.Image] | None = None,
) -> np.ndarray:
    """Transform a uint8 image `(H, W, 3)`; `recolor` changes it after the resize.

    Pixels that the window hides are not computed, and padding is not recolored.
    """
    pixels = _visible_pixels(image, geometry)
    if recolor is not None and pixels.size:
        pixels = np.asarray(recolor(Image.fromarray(pixels)))
    if geometry.flips_rows:
        pixels = pixels[::-1]
    if geometry.flips_columns:
        pixels = pixels[:, ::-1]
    frame, visible = geometry.frame, geometry.visible
    if visible[2:] != frame[2:]:
        padded = np.empty((frame.height, frame.width, 3), dtype=np.uint8)
        padded[:] = PADDING_COLOR
        padded[visible.slices()] = pixels
        pixels = padded
    return np.rot90(pixels, geometry.quarter_turns)


def _visible_pixels(image: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Crop and resize an image, and return the part that the window will show after the flip."""
    pixels = image[geometry.source.slices()]
    (old_height, old_width), (height, width) = geometry.source[2:], geometry.new_size
    shown = geometry.frame.intersection(Region(0, 0, height, width))
    if geometry.flips_rows:
        shown = shown._replace(top=height - shown.top - shown.height)
    if geometry.flips_columns:
        shown = shown._replace(left=width - shown.left - shown.width)
    if 0 in shown[2:]:
        return np.empty((shown.height, shown.width, 3), dtype=np.uint8)
    if (height, width) == (old_height, old_width):
        return pixels[shown.slices()]
    box = None
    if shown != (0, 0, height, width):
        rows, columns = shown.slices()
        left, right = (x * old_width / width for x in (columns.start, columns.stop))
        top, bottom = (y * old_height / height for y in (rows.start, rows.stop))
        box = (left, top, right, bottom)
    resized = Image.fromarray(pixels).resize(
        (shown.width, shown.height), Image.Resampling.BILINEAR, box=box
    )
    return np.asarray(resized)


def transform_points(points: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Transform points `(P, 2)`, (x, y) in pixels, to float64 without clipping.

    Integer points are truncated after scaling, because detectron2 stores them as integers again,
    unless it crops them.
    """
    frame = geometry.frame
    points = flipped_points(points, geometry) - (frame.left, frame.top)
    return _turned(points, geometry)


def flipped_points(points: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Transform points as `transform_points`, up to the flip: without window and rotation."""
    source, (height, width) = geometry.source, geometry.new_size
    truncates = np.asarray(points).dtype.kind in "iu" and geometry.crop is None
    points = np.asarray(points, dtype=np.float64)
    if geometry.crop is not None:
        points = points - (source.left, source.top)
    points = points * (width / source.width, height / source.height)
    if truncates:
        points = np.trunc(points)
    if geometry.flips_columns:
        points[:, 0] = width - points[:, 0]
    if geometry.flips_rows:
        points[:, 1] = height - points[:, 1]
    return points


def transform_boxes(boxes: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Transform boxes `(K, 4)`, (x0, y0, x1, y1) in pixels, and clip them to the visible image."""
    corners = transform_points(np.reshape(boxes, (-1, 2)), geometry).reshape(-1, 2, 2)
    top, left, height, width = geometry.visible
    shown = _turned(np.array([[left, top], [left + width, top + height]], float), geometry)
    low = np.clip(corners.min(axis=1), shown.min(axis=0), shown.max(axis=0))
    high = np.clip(corners.max(axis=1), shown.min(axis=0), shown.max(axis=0))
    return np.concatenate([low, high], axis=1)


def leave_image(boxes: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Return per box `(K, 4)` whether the crop or the window cuts it or hides it, bool `(K,)`."""
    if not geometry.can_cut:
        return np.zeros(len(boxes), dtype=bool)
    corners = transform_points(np.reshape(boxes, (-1, 2)), geometry).reshape(-1, 4)
    moved = np.concatenate(
        [np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])],
        axis=1,
    )
    return (transform_boxes(boxes, geometry) != moved).any(axis=1)


def nearest_pixels(geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Return the old row of each row before the rotation, and the old column of each column.

    They are chosen as by PIL's resize to the nearest pixel; padding has -1.
    """

    def source_indices(old: int, new: int) -> np.ndarray:
        # Only PIL itself rounds as PIL does at every size.
        line = Image.fromarray(np.arange(old, dtype=np.int32)[None])
        return np.asarray(line.resize((new, 1), Image.Resampling.NEAREST))[0]

    rows, columns = map(source_indices, geometry.source[2:], geometry.new_size)
    rows, columns = rows + geometry.source.top, columns + geometry.source.left
    if geometry.flips_rows:
        rows = rows[::-1]
    if geometry.flips_columns:
        columns = columns[::-1]
    if geometry.window is None:
        return rows, columns
    shown = geometry.window.intersection(Region(0, 0, *geometry.new_size)).slices()
    framed = [np.full(length, -1, dtype=rows.dtype) for length in geometry.window[2:]]
    for line, at, source, part in zip(
        framed, geometry.visible.slices(), (rows, columns), shown, strict=True
    ):
        line[at] = source[part]
    return framed[0], framed[1]


def _turned(points: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Rotate points `(P, 2)` of the frame."""
    height, width = geometry.frame[2:]
    for _ in range(geometry.quarter_turns % 4):
        points = np.stack([points[:, 1], width - points[:, 0]], axis=1)
        height, width = width, height
    return points
