"""From an image and its annotations to what the model is trained on: resizing and flips.

Pixels, boxes and masks are those of detectron2's mapper: images are resized with PIL's bilinear
filter; the annotation's box and polygons are transformed as numbers and then clipped or
rasterised; an RLE is resized to the nearest pixel. Boxes are not recomputed from masks.

All that is random is drawn once, by `Augmentation.draw`, into a `Geometry`; the rest are functions
of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_utils

from tensormask.data.checks.annotations import Annotation
from tensormask.data.checks.segmentation import run_lengths, segmentation_to_rle, usable_polygons
from tensormask.utils.errors import UserError

FLIPS = ("horizontal", "vertical", "none")
SAMPLINGS = ("choice", "range")
# Detectron2 calls a box of at most this many pixels in height or width empty.
_EMPTY_SIDE = 1e-5


@dataclass(frozen=True)
class Geometry:
    """A resize from `old_size` to `new_size`, both (height, width) in pixels, then a flip."""

    old_size: tuple[int, int]
    new_size: tuple[int, int]
    flip: str = "none"


@dataclass(frozen=True)
class Augmentation:
    """Resize-shortest-edge and a flip with probability 1/2.

    Attributes:
        min_sizes: lengths in pixels of the shorter side to choose from, or (lowest, highest) of a
            range; 0 leaves the size as it is.
        sampling: "choice" or "range".
        max_size: the longer side in pixels that is not passed.
        flip: "horizontal", "vertical" or "none".
    """

    min_sizes: tuple[int, ...]
    max_size: int
    sampling: str = "choice"
    flip: str = "none"

    def __post_init__(self) -> None:
        if self.sampling not in SAMPLINGS:
            raise UserError(f"sampling of sizes is one of {SAMPLINGS}, not {self.sampling!r}.")
        if self.flip not in FLIPS:
            raise UserError(f"flip is one of {FLIPS}, not {self.flip!r}.")
        if not self.min_sizes or min(self.min_sizes) < 0:
            raise UserError(f"lengths of the shorter side are pixels, not {self.min_sizes}.")
        if self.sampling == "range" and (
            len(self.min_sizes) != 2 or self.min_sizes[0] > self.min_sizes[1]
        ):
            raise UserError(f"a range of sizes is (lowest, highest), not {self.min_sizes}.")

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> Geometry:
        """Draws the geometry for an image of `size` (height, width) in pixels."""
        if self.sampling == "range":
            short = int(rng.integers(self.min_sizes[0], self.min_sizes[1] + 1))
        else:
            short = self.min_sizes[int(rng.integers(len(self.min_sizes)))]
        flipped = rng.random() < 0.5
        new_size = size if short == 0 else resized_size(size, short, self.max_size)
        return Geometry(size, new_size, self.flip if flipped else "none")


def build_train_transform(cfg: Any) -> Augmentation:
    """The training augmentation that a config asks for."""
    if cfg.INPUT.MASK_FORMAT not in ("polygon", "bitmask"):
        raise UserError(
            f'INPUT.MASK_FORMAT is "polygon" or "bitmask", not {cfg.INPUT.MASK_FORMAT!r}; '
            "both end in bitmaps here."
        )
    return Augmentation(
        min_sizes=_as_sizes(cfg.INPUT.MIN_SIZE_TRAIN),
        max_size=cfg.INPUT.MAX_SIZE_TRAIN,
        sampling=cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
        flip=cfg.INPUT.RANDOM_FLIP,
    )


def build_test_transform(cfg: Any) -> Augmentation:
    """The resize before inference that a config asks for."""
    return Augmentation(
        min_sizes=_as_sizes(cfg.INPUT.MIN_SIZE_TEST), max_size=cfg.INPUT.MAX_SIZE_TEST
    )


def resized_size(size: tuple[int, int], short: int, longest: int) -> tuple[int, int]:
    """(height, width) with a shorter side of `short` px, less if the longer passes `longest`."""
    height, width = size
    scale = short / min(height, width)
    new_height, new_width = (short, scale * width) if height < width else (scale * height, short)
    if max(new_height, new_width) > longest:
        shrink = longest / max(new_height, new_width)
        new_height, new_width = new_height * shrink, new_width * shrink
    # A side that would round to nothing keeps a pixel; PIL refuses 0.
    return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))


def transform_image(image: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Transforms a uint8 image `(H, W, 3)`."""
    if geometry.new_size != geometry.old_size:
        height, width = geometry.new_size
        image = np.asarray(
            Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        )
    return _flip(image, geometry.flip)


def transform_points(points: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Transforms points `(P, 2)`, (x, y) in pixels, without clipping, to float64.

    Integers are truncated after they are scaled: detectron2 writes them back as integers.
    """
    (old_height, old_width), (height, width) = geometry.old_size, geometry.new_size
    integers = np.asarray(points).dtype.kind in "iu"
    points = np.asarray(points, dtype=np.float64) * (width / old_width, height / old_height)
    if integers:
        points = np.trunc(points)
    if geometry.flip == "horizontal":
        points[:, 0] = width - points[:, 0]
    elif geometry.flip == "vertical":
        points[:, 1] = height - points[:, 1]
    return points


def transform_boxes(boxes: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Transforms boxes `(K, 4)`, (x0, y0, x1, y1) in pixels, and clips them to the new image."""
    corners = transform_points(np.reshape(boxes, (-1, 2)), geometry).reshape(-1, 2, 2)
    height, width = geometry.new_size
    low = np.clip(corners.min(axis=1), 0.0, (width, height))
    high = np.clip(corners.max(axis=1), 0.0, (width, height))
    return np.concatenate([low, high], axis=1)


def nearest_pixels(geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """The old row of each new row, and column of each new column, in PIL's nearest resize."""

    def old_places(old: int, new: int) -> np.ndarray:
        # Asking PIL is the one way to round as it does at every size.
        line = Image.fromarray(np.arange(old, dtype=np.int32)[None])
        return np.asarray(line.resize((new, 1), Image.Resampling.NEAREST))[0]

    rows, columns = map(old_places, geometry.old_size, geometry.new_size)
    if geometry.flip == "vertical":
        rows = rows[::-1]
    elif geometry.flip == "horizontal":
        columns = columns[::-1]
    return rows, columns


def transform_polygons(
    polygons: Sequence[Sequence[float]], geometry: Geometry, out: np.ndarray
) -> None:
    """Transforms polygons and then sets the pixels inside any of them in `out`, bool `(H, W)`."""
    moved = [
        transform_points(np.reshape(polygon, (-1, 2)), geometry).ravel()
        for polygon in usable_polygons(polygons)
    ]
    x, y, part = _decode_extent(segmentation_to_rle(moved, geometry.new_size))
    out[y : y + part.shape[0], x : x + part.shape[1]] = part


def transform_rle(
    rle: dict[str, Any],
    geometry: Geometry,
    pixels: tuple[np.ndarray, np.ndarray],
    out: np.ndarray,
) -> None:
    """Sets in `out`, bool `(H, W)`, the pixels of an RLE at `pixels = nearest_pixels(geometry)`.

    Raises:
        ValueError: the RLE is not of the image's size.
    """
    x, y, part = _decode_extent(segmentation_to_rle(rle, geometry.old_size))
    rows = np.flatnonzero((pixels[0] >= y) & (pixels[0] < y + part.shape[0]))
    columns = np.flatnonzero((pixels[1] >= x) & (pixels[1] < x + part.shape[1]))
    if len(rows) and len(columns):
        place = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        out[place] = part[np.ix_(pixels[0][rows] - y, pixels[1][columns] - x)]


def transform_annotations(
    annotations: Sequence[Annotation], labels: Sequence[int], geometry: Geometry
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """The training target of an image.

    Args:
        annotations: COCO annotations with a box and a segmentation.
        labels: the label of each, from 0.
        geometry: the transform of the image.

    Returns:
        - the target: `boxes (K, 4)` float32, `labels (K,)` int64, `masks (K, H, W)` bool, in the
          annotations' order, without the objects whose box or mask the transform leaves empty;
        - which annotations are in it, bool.
    """
    # Detectron2 adds in 32 bits, transforms in 64, and looks for empty boxes in 32 again.
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = transform_boxes(boxes, geometry).astype(np.float32)
    masks = np.zeros((len(annotations), *geometry.new_size), dtype=bool)
    pixels = nearest_pixels(geometry)
    for annotation, mask in zip(annotations, masks, strict=True):
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, dict):
            transform_rle(segmentation, geometry, pixels, out=mask)
        else:
            transform_polygons(segmentation, geometry, out=mask)

    kept = (boxes[:, 2:] - boxes[:, :2] > _EMPTY_SIDE).all(axis=1) & masks.any(axis=(1, 2))
    if not kept.all():
        boxes, masks = boxes[kept], masks[kept]
    target = {
        "boxes": torch.from_numpy(boxes),
        "labels": torch.tensor(labels, dtype=torch.int64)[torch.from_numpy(kept)],
        "masks": torch.from_numpy(masks),
    }
    return target, kept


def image_to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 `(H, W, 3)` to a contiguous uint8 tensor `(3, H, W)`."""
    # A copy, always: numpy calls a flipped side of one pixel contiguous, torch refuses its stride.
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def _decode_extent(rle: dict[str, Any]) -> tuple[int, int, np.ndarray]:
    """The part of a sound RLE that has all of its pixels: decoding it costs a fraction.

    Returns:
        The column and the row at which the part begins, and the part, bool `(h, w)`.
    """
    height = rle["size"][0]
    runs = run_lengths(rle["counts"])
    ends = runs.cumsum()
    objects = np.flatnonzero(runs[1::2]) * 2 + 1  # the runs of foreground that have a pixel
    if not len(objects):
        return 0, 0, np.zeros((0, 0), dtype=bool)
    # Runs go down the columns: what is before the first and behind the last are other columns.
    first, last = objects[[0, -1]].tolist()
    begin, end = int(ends[first - 1]), int(ends[last])
    left, right = begin // height, -(-end // height)
    counts = [begin - left * height, *runs[first : last + 1].tolist(), right * height - end]
    size = [height, right - left]
    columns = mask_utils.frPyObjects({"size": size, "counts": counts}, *size)
    _, y, _, h = mask_utils.toBbox(columns).astype(int).tolist()
    return left, y, mask_utils.decode(columns)[y : y + h].view(bool)


def _flip(array: np.ndarray, flip: str) -> np.ndarray:
    if flip == "horizontal":
        return array[:, ::-1]
    return array[::-1] if flip == "vertical" else array


def _as_sizes(sizes: int | Sequence[int]) -> tuple[int, ...]:
    """Detectron2 takes one size as a number, too."""
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)
