"""Resize and flip images, boxes and masks: from an image and its annotations to model input.

Pixels, boxes and masks equal those of detectron2's mapper: images are resized with PIL's bilinear
filter, the coordinates of boxes and polygons are transformed before they are clipped or
rasterized, and an RLE is resized to the nearest pixel. Boxes are not recomputed from masks.

`Augmentation.draw` draws all random numbers and returns a `Geometry`; the other functions depend
only on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_utils

from tensormask.config import CfgNode
from tensormask.data.checks.annotations import Annotation
from tensormask.data.checks.segmentation import run_lengths, segmentation_to_rle, valid_polygons
from tensormask.utils.errors import UserError

FLIPS = ("horizontal", "vertical", "none")
SAMPLINGS = ("choice", "range")
# In detectron2 a box of at most this many pixels in height or width is empty.
_EMPTY_SIDE = 1e-5


@dataclass(frozen=True)
class Geometry:
    """A resize from `old_size` to `new_size`, both (height, width) in pixels, then a flip.

    Example:
        >>> geometry = Geometry((10, 10), (30, 20), "horizontal")
        >>> transform_boxes(np.array([[1.0, 2.0, 5.0, 4.0]]), geometry).tolist()
        [[10.0, 6.0, 18.0, 12.0]]
    """

    old_size: tuple[int, int]
    new_size: tuple[int, int]
    flip: str = "none"


@dataclass(frozen=True)
class Augmentation:
    """Resize-shortest-edge and a flip with probability 1/2.

    Attributes:
        min_sizes: the shorter side in pixels: values to choose from, or (lowest, highest) of a
            range; 0 keeps the image's size.
        max_size: the upper limit of the longer side in pixels.
        sampling: "choice" or "range".
        flip: "horizontal", "vertical" or "none".

    Raises:
        ValueError: a value is not valid.
    """

    min_sizes: tuple[int, ...]
    max_size: int
    sampling: str = "choice"
    flip: str = "none"

    def __post_init__(self) -> None:
        if self.sampling not in SAMPLINGS:
            raise UserError(f"the sampling of sizes is one of {SAMPLINGS}, not {self.sampling!r}.")
        if self.flip not in FLIPS:
            raise UserError(f"the flip is one of {FLIPS}, not {self.flip!r}.")
        sizes = self.min_sizes
        if not sizes or min(sizes) < 0:
            raise UserError(f"the shorter side takes lengths in pixels, 0 or more, not {sizes}.")
        if self.sampling == "range" and (len(sizes) != 2 or sizes[0] > sizes[1]):
            raise UserError(f"a range of sizes is (lowest, highest), not {sizes}.")

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> Geometry:
        """Draw a random geometry for an image of `size` (height, width) in pixels."""
        if self.sampling == "range":
            short = int(rng.integers(self.min_sizes[0], self.min_sizes[1] + 1))
        else:
            short = self.min_sizes[int(rng.integers(len(self.min_sizes)))]
        flipped = rng.random() < 0.5
        new_size = size if short == 0 else resized_size(size, short, self.max_size)
        return Geometry(size, new_size, self.flip if flipped else "none")


def build_train_transform(cfg: CfgNode) -> Augmentation:
    """Return the training augmentation of a config."""
    if cfg.INPUT.MASK_FORMAT not in ("polygon", "bitmask"):
        raise UserError(
            f'INPUT.MASK_FORMAT is {cfg.INPUT.MASK_FORMAT!r}; set it to "polygon" or "bitmask" '
            "(both are read as bitmaps)."
        )
    return Augmentation(
        min_sizes=_as_sizes(cfg.INPUT.MIN_SIZE_TRAIN),
        max_size=cfg.INPUT.MAX_SIZE_TRAIN,
        sampling=cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
        flip=cfg.INPUT.RANDOM_FLIP,
    )


def build_test_transform(cfg: CfgNode) -> Augmentation:
    """Return the resize before inference of a config."""
    return Augmentation(
        min_sizes=_as_sizes(cfg.INPUT.MIN_SIZE_TEST), max_size=cfg.INPUT.MAX_SIZE_TEST
    )


def resized_size(size: tuple[int, int], short: int, longest: int) -> tuple[int, int]:
    """Return (height, width) with a shorter side of `short` px and a longer of at most `longest`.

    Example:
        >>> resized_size((480, 640), 800, 1333)
        (800, 1067)
    """
    height, width = size
    scale = short / min(height, width)
    new_height, new_width = (short, scale * width) if height < width else (scale * height, short)
    if max(new_height, new_width) > longest:
        shrink = longest / max(new_height, new_width)
        new_height, new_width = new_height * shrink, new_width * shrink
    # A side that would round to 0 keeps one pixel, because PIL rejects 0.
    return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))


def transform_image(image: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Transform a uint8 image `(H, W, 3)`."""
    if geometry.new_size != geometry.old_size:
        height, width = geometry.new_size
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        image = np.asarray(resized)
    if geometry.flip == "horizontal":
        return image[:, ::-1]
    return image[::-1] if geometry.flip == "vertical" else image


def transform_points(points: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Transform points `(P, 2)`, (x, y) in pixels, to float64 without clipping.

    Integer points are truncated after scaling, because detectron2 stores them as integers again.
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
    """Transform boxes `(K, 4)`, (x0, y0, x1, y1) in pixels, and clip them to the new image."""
    corners = transform_points(np.reshape(boxes, (-1, 2)), geometry).reshape(-1, 2, 2)
    height, width = geometry.new_size
    low = np.clip(corners.min(axis=1), 0.0, (width, height))
    high = np.clip(corners.max(axis=1), 0.0, (width, height))
    return np.concatenate([low, high], axis=1)


def nearest_pixels(geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Return the old row of each new row and the old column of each new one, as PIL resizes."""

    def source_indices(old: int, new: int) -> np.ndarray:
        # Only PIL itself rounds as PIL does at every size.
        line = Image.fromarray(np.arange(old, dtype=np.int32)[None])
        return np.asarray(line.resize((new, 1), Image.Resampling.NEAREST))[0]

    rows, columns = map(source_indices, geometry.old_size, geometry.new_size)
    if geometry.flip == "vertical":
        rows = rows[::-1]
    elif geometry.flip == "horizontal":
        columns = columns[::-1]
    return rows, columns


def transform_polygons(
    polygons: Sequence[Sequence[float]], geometry: Geometry, out: np.ndarray
) -> None:
    """Transform polygons, then set the pixels inside any of them in `out`, bool `(H, W)`."""
    transformed = [
        transform_points(np.reshape(polygon, (-1, 2)), geometry).ravel()
        for polygon in valid_polygons(polygons)
    ]
    x, y, part = _decode_extent(segmentation_to_rle(transformed, geometry.new_size))
    out[y : y + part.shape[0], x : x + part.shape[1]] = part


def transform_rle(
    rle: dict[str, Any], geometry: Geometry, pixels: tuple[np.ndarray, np.ndarray], out: np.ndarray
) -> None:
    """Resize an RLE by `pixels = nearest_pixels(geometry)` and set its pixels in `out`.

    Args:
        rle: a valid RLE of the old size.
        geometry: the transform of the image.
        pixels: the source row and column of each new row and column.
        out: bool `(H, W)` of the new size.

    Raises:
        ValueError: the RLE has another size than the image.
    """
    x, y, part = _decode_extent(segmentation_to_rle(rle, geometry.old_size))
    rows = np.flatnonzero((pixels[0] >= y) & (pixels[0] < y + part.shape[0]))
    columns = np.flatnonzero((pixels[1] >= x) & (pixels[1] < x + part.shape[1]))
    if len(rows) and len(columns):
        region = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        out[region] = part[np.ix_(pixels[0][rows] - y, pixels[1][columns] - x)]


def transform_annotations(
    annotations: Sequence[Annotation], labels: Sequence[int], geometry: Geometry
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Return the training target of an image.

    Args:
        annotations: COCO annotations with a box and a segmentation.
        labels: the label of each, from 0.
        geometry: the transform of the image.

    Returns:
        - the target: `boxes (K, 4)` float32, `labels (K,)` int64, `masks (K, H, W)` bool, in the
          order of the annotations; objects whose transformed box or mask is empty are left out;
        - bool, per annotation: whether the target includes it.
    """
    # Like detectron2: add in 32 bits, transform in 64, test for empty boxes in 32.
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

    has_area = (boxes[:, 2:] - boxes[:, :2] > _EMPTY_SIDE).all(axis=1)
    included = np.logical_and(has_area, masks.any(axis=(1, 2)))
    if not included.all():
        boxes, masks = boxes[included], masks[included]
    target = {
        "boxes": torch.from_numpy(boxes),
        "labels": torch.tensor(labels, dtype=torch.int64)[torch.from_numpy(included)],
        "masks": torch.from_numpy(masks),
    }
    return target, included


def image_to_tensor(image: np.ndarray) -> torch.Tensor:
    """Convert a uint8 image `(H, W, 3)` to a contiguous uint8 tensor `(3, H, W)`."""
    # Always a copy: for numpy a flipped axis of one pixel is contiguous, but torch rejects it.
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def _decode_extent(rle: dict[str, Any]) -> tuple[int, int, np.ndarray]:
    """Return first column, first row and pixels, bool `(h, w)`, of the extent of a valid RLE.

    Decoding the extent only costs a fraction of decoding the whole mask.
    """
    height = rle["size"][0]
    runs = run_lengths(rle["counts"])
    ends = runs.cumsum()
    foreground = np.flatnonzero(runs[1::2]) * 2 + 1  # the runs of foreground with a pixel
    if not len(foreground):
        return 0, 0, np.zeros((0, 0), dtype=bool)
    # Runs go down the columns, so only the columns from the first to the last run are decoded.
    first, last = foreground[[0, -1]].tolist()
    begin, end = int(ends[first - 1]), int(ends[last])
    left, right = begin // height, -(-end // height)
    counts = [begin - left * height, *runs[first : last + 1].tolist(), right * height - end]
    size = [height, right - left]
    columns = mask_utils.frPyObjects({"size": size, "counts": counts}, *size)
    _, y, _, h = mask_utils.toBbox(columns).astype(int).tolist()
    return left, y, mask_utils.decode(columns)[y : y + h].view(bool)


def _as_sizes(sizes: int | Sequence[int]) -> tuple[int, ...]:
    """Return sizes as a tuple; detectron2 also takes a single number."""
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)
