"""The synthetic data set `shapes_train` and `shapes_val`: geometric shapes in COCO's format.

The splits have 3,000 and 200 images of 128 x 128 pixels, each with one to five objects of six
classes. Only the outline tells the class: star and crescent are concave and the ring has a hole,
while color, texture, rotation and stretch are independent of the class. The longer side of an
object is log-uniform in 8 to 110 pixels.

Objects overlap. A later object hides the earlier ones, and an annotation describes the visible
part: its mask, with the `bbox` and `area` of that mask. An object is placed only where at least a
quarter of its pixels and at least 16 pixels of each object, itself included, stay visible. So every
visible object is annotated. Completely visible objects without a hole are annotated as polygons,
all others as compressed RLE.

`shapes_512_train` and `shapes_512_val` have 1,000 and 200 images of 512 x 512 pixels, with one to
twelve objects of the same sizes in pixels: small ones, in a small part of an image.

Image i is a function of (split, i) only. Outlines are rounded to 0.01 pixel and rasterized by
pycocotools, and colors use elementary arithmetic, so that all machines generate the same set.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from tensormask.utils.files import expand_home

logger = logging.getLogger(__name__)

CLASS_NAMES = ("disc", "rectangle", "triangle", "star", "ring", "crescent")
NUM_IMAGES = {"train": 3000, "val": 200, "512_train": 1000, "512_val": 200}
IMAGE_SIZE = 128  # of "train" and "val"; that of another split is in its name
MIN_SIDE, MAX_SIDE = 8.0, 110.0
MAX_OBJECTS = {128: 5, 512: 12}  # by the size of the image
MIN_VISIBLE_SHARE = 0.25
MIN_VISIBLE_PIXELS = 16

_SPLIT_SEEDS = {"train": 1, "val": 2}
_PLACEMENT_TRIES = 20
_MIN_COLOR_DISTANCE = 60.0


def ensure_shapes(split: str, root: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Generate a split in `<root>/shapes/<split>/` unless it exists.

    The set is complete or missing, never partial: it is written to a temporary folder, which is
    renamed at the end. If another process was faster, its set is used.

    Args:
        split: a key of `NUM_IMAGES`.
        root: the folder of all data sets.

    Returns:
        The path of the annotations and the folder of the images.
    """
    if split not in NUM_IMAGES:
        raise ValueError(f"shapes has the splits {sorted(NUM_IMAGES)}, not {split!r}.")
    folder = Path(expand_home(root)) / "shapes" / split
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=folder.parent))
        try:
            start = time.perf_counter()
            logger.info("Generating shapes_%s (%d images) in %s", split, NUM_IMAGES[split], folder)
            write_split(split, NUM_IMAGES[split], temporary)
            temporary.chmod(0o755)  # only its owner can read what mkdtemp creates
            os.rename(temporary, folder)
            logger.info("Generated shapes_%s in %.1f s", split, time.perf_counter() - start)
        except OSError:
            if not folder.is_dir():
                raise
            logger.info("Another process has generated %s meanwhile; its set is used.", folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder / "annotations.json", folder / "images"


def write_split(split: str, num_images: int, folder: Path) -> None:
    """Write the first `num_images` of a split: `annotations.json` and `images/` in `folder`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(num_images):
        image, objects = generate_image(split, index)
        height, width = image.shape[:2]
        image_id = index + 1
        file_name = f"{image_id:06d}.png"
        Image.fromarray(image).save(folder / "images" / file_name, compress_level=1)
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for fields in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **fields})
    data = {
        "info": {"description": f"TensorMask's synthetic shapes, {split}", "version": "1.0"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": label + 1, "name": name, "supercategory": "shape"}
            for label, name in enumerate(CLASS_NAMES)
        ],
    }
    (folder / "annotations.json").write_text(json.dumps(data), encoding="utf-8")


def generate_image(split: str, index: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Generate image `index` of a split, counted from 0.

    Returns:
        The image, uint8 RGB `(size, size, 3)`, and COCO annotations without `id` and `image_id`,
        from the first drawn object to the last.

    Example:
        >>> image, annotations = generate_image("val", 0)
        >>> image.shape, [annotation["area"] for annotation in annotations]
        ((128, 128, 3), [865])
    """
    other_size, _, kind = split.rpartition("_")
    size = int(other_size or IMAGE_SIZE)
    seeds = [_SPLIT_SEEDS[kind], index, *([size] if other_size else [])]
    rng = np.random.Generator(np.random.PCG64(seeds))
    base_colors = [rng.uniform(20.0, 235.0, 3)]
    canvas = _textured(rng, base_colors[0], slice(0, size), slice(0, size), size)

    num_objects = int(rng.integers(1, MAX_OBJECTS[size] + 1))
    labels = rng.integers(0, len(CLASS_NAMES), num_objects)
    sides = np.exp(rng.uniform(math.log(MIN_SIDE), math.log(MAX_SIDE), num_objects))
    # Larger objects tend to be drawn first: in a random order they would hide most small ones.
    order = np.argsort(-np.log(sides) + rng.normal(0.0, 0.5, num_objects))

    placed: list[dict[str, Any]] = []
    for label, side in zip(labels[order], sides[order], strict=True):
        outlines = [points * side for points in unit_outlines(rng, CLASS_NAMES[label])]
        placement = _find_position(rng, outlines, placed, size)
        if placement is None:
            continue
        outlines, mask = placement
        color = _distinct_color(rng, base_colors)
        base_colors.append(color)
        rows, columns = _extent(mask)
        texture = _textured(rng, color, rows, columns, size)
        np.copyto(canvas[:, rows, columns], texture, where=mask[rows, columns])
        for other in placed:
            other["visible"] &= ~mask
        placed.append({"label": label, "outlines": outlines, "full": mask, "visible": mask.copy()})

    image = np.clip(_soften(canvas) + 0.5, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(image.transpose(1, 2, 0)), [_annotation(item) for item in placed]


def unit_outlines(rng: np.random.Generator, name: str) -> list[np.ndarray]:
    """Return the outline of a shape, and of its hole if it has one, each `(P, 2)` in (x, y).

    The shape is stretched and rotated at random. Its bounding box has its center at the origin and
    a longer side of 1.
    """
    arc = np.linspace(0.0, 2.0 * math.pi, 48, endpoint=False)
    circle = np.stack([np.cos(arc), np.sin(arc)], axis=1)
    if name == "disc":
        outlines = [circle]
    elif name == "rectangle":
        height = rng.uniform(0.55, 1.0)
        outlines = [np.array([[-1, -height], [1, -height], [1, height], [-1, height]])]
    elif name == "triangle":
        outlines = [np.array([[rng.uniform(-0.4, 0.4), -1.0], [0.95, 0.8], [-0.95, 0.8]])]
    elif name == "star":
        angles = np.arange(10) * (math.pi / 5)
        radii = np.where(np.arange(10) % 2 == 0, 1.0, rng.uniform(0.40, 0.50))
        outlines = [np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]]
    elif name == "ring":
        outlines = [circle, circle * rng.uniform(0.45, 0.62)]
    elif name == "crescent":
        outlines = [_crescent(rng.uniform(0.50, 0.70))]
    else:
        raise ValueError(f"unknown shape {name!r}; the shapes are {CLASS_NAMES}.")

    stretch = np.array([1.0, rng.uniform(0.75, 1.0)])
    angle = rng.uniform(0.0, 2.0 * math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    rotated = []
    for points in outlines:
        x, y = (points * stretch).T
        rotated.append(np.stack([x * cos - y * sin, x * sin + y * cos], axis=1))
    low, high = rotated[0].min(axis=0), rotated[0].max(axis=0)
    return [(points - (low + high) / 2) / (high - low).max() for points in rotated]


def _crescent(shift: float) -> np.ndarray:
    """Return a unit disc without the disc of radius 0.9 whose center is `shift` to the right."""
    radius = 0.9
    x = (1.0 + shift * shift - radius * radius) / (2.0 * shift)  # where the two circles meet
    y = math.sqrt(1.0 - x * x)
    outer = np.linspace(math.atan2(y, x), 2.0 * math.pi - math.atan2(y, x), 32)
    start = math.atan2(y, x - shift)
    inner = np.linspace(2.0 * math.pi - start, start, 32)[1:-1]
    outside = np.stack([np.cos(outer), np.sin(outer)], axis=1)
    inside = np.stack([shift + radius * np.cos(inner), radius * np.sin(inner)], axis=1)
    return np.concatenate([outside, inside])


def _find_position(
    rng: np.random.Generator, outlines: list[np.ndarray], placed: list[dict[str, Any]], size: int
) -> tuple[list[np.ndarray], np.ndarray] | None:
    """Move outlines to a random position; return them and their mask, or None if none fits."""
    half = np.abs(outlines[0]).max(axis=0)
    for _ in range(_PLACEMENT_TRIES):
        center = rng.uniform(half, size - half)
        moved = [np.round(points + center, 2) for points in outlines]
        mask = _rasterize(moved, size)
        fits = _enough_visible(mask, mask)
        if fits and all(_enough_visible(p["visible"] & ~mask, p["full"]) for p in placed):
            return moved, mask
    return None


def _enough_visible(visible: np.ndarray, full: np.ndarray) -> bool:
    num_visible = np.count_nonzero(visible)
    num_needed = max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * int(np.count_nonzero(full)))
    return bool(num_visible >= num_needed)


def _rasterize(outlines: list[np.ndarray], size: int) -> np.ndarray:
    """Return the bool mask `(size, size)` inside the first outline and outside of the others."""
    polygons = [points.ravel().tolist() for points in outlines]
    masks = mask_utils.decode(mask_utils.frPyObjects(polygons, size, size)).astype(bool)
    return masks[:, :, 0] & ~masks[:, :, 1:].any(axis=2)


def _annotation(item: dict[str, Any]) -> dict[str, Any]:
    visible = item["visible"]
    if len(item["outlines"]) == 1 and np.array_equal(visible, item["full"]):
        segmentation: Any = [item["outlines"][0].ravel().round(2).tolist()]
    else:
        rle = mask_utils.encode(np.asfortranarray(visible, dtype=np.uint8))
        segmentation = {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
    rows, columns = _extent(visible)
    return {
        "category_id": int(item["label"]) + 1,
        "segmentation": segmentation,
        "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
        "area": int(np.count_nonzero(visible)),
        "iscrowd": 0,
    }


def _distinct_color(rng: np.random.Generator, used: list[np.ndarray]) -> np.ndarray:
    """Return a random color that differs clearly from those used, or the most distinct of 32."""
    candidates = rng.uniform(20.0, 235.0, (32, 3))
    differences = candidates[:, None] - np.stack(used)
    distances = np.sqrt((differences**2).sum(axis=2)).min(axis=1)
    far_enough = distances >= _MIN_COLOR_DISTANCE
    return candidates[np.argmax(far_enough) if far_enough.any() else np.argmax(distances)]


def _textured(
    rng: np.random.Generator, color: np.ndarray, rows: slice, columns: slice, size: int
) -> np.ndarray:
    """Return a part of a float32 image `(3, size, size)`: a color with noise, shading, stripes."""
    scale = size // IMAGE_SIZE  # cells have the same number of pixels
    field = _value_noise(rng, scale * int(rng.choice([4, 8, 16])), rows, columns, size)
    field *= _uniform(rng, 10.0, 35.0)
    field += _value_noise(rng, scale * 64, rows, columns, size) * _uniform(rng, 4.0, 16.0)
    ramp = np.arange(size, dtype=np.float32) / size - np.float32(0.5)
    shading = ramp[rows, None] * _uniform(rng, -1.0, 1.0) + ramp[columns] * _uniform(rng, -1.0, 1.0)
    field += shading * _uniform(rng, 0.0, 60.0)
    if rng.random() < 0.3:
        # A triangle wave: the last bit of a sine differs between machines.
        phase = shading * _uniform(rng, 4.0, 20.0) + _uniform(rng, 0.0, 1.0)
        field += (np.abs(phase - np.rint(phase)) - np.float32(0.25)) * _uniform(rng, 30.0, 100.0)
    tint = rng.uniform(0.5, 1.0, 3).astype(np.float32)
    return color.astype(np.float32)[:, None, None] + field * tint[:, None, None]


def _value_noise(
    rng: np.random.Generator, cells: int, rows: slice, columns: slice, size: int
) -> np.ndarray:
    """Return a part of smooth noise in -1..1: a random grid of `cells + 1`, interpolated."""
    grid = rng.uniform(-1.0, 1.0, (cells + 1, cells + 1)).astype(np.float32)
    position = np.arange(size, dtype=np.float32) * np.float32(cells / size)
    low = position.astype(np.int64)
    weight = position - low.astype(np.float32)
    y, y_weight = low[rows], weight[rows, None]
    x, x_weight = low[columns], weight[columns]
    interpolated = grid[y] * (1 - y_weight) + grid[y + 1] * y_weight
    return interpolated[:, x] * (1 - x_weight) + interpolated[:, x + 1] * x_weight


def _uniform(rng: np.random.Generator, low: float, high: float) -> np.float32:
    return np.float32(rng.uniform(low, high))


def _extent(mask: np.ndarray) -> tuple[slice, slice]:
    """Return the extent in rows and in columns of a mask `(H, W)` that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _soften(image: np.ndarray) -> np.ndarray:
    """Blur slightly with (1, 2, 1) in both directions: no camera has sharper edges."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = padded[:, :-2] * 0.25 + padded[:, 1:-1] * 0.5 + padded[:, 2:] * 0.25
    return rows[:, :, :-2] * 0.25 + rows[:, :, 1:-1] * 0.5 + rows[:, :, 2:] * 0.25
