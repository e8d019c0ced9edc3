"""Measures annotations as they are in the file, for the diagnoses of the set as a whole.

Nothing is assumed of the entries: whatever is not of the expected form is measured as NaN.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from tensormask.data.checks.annotations import ImageEntry, as_id, check_segmentation, find_id
from tensormask.data.checks.issues import Identity

FEW = 2  # a cause shows in this many annotations at least
SAMPLE_SIZE = 2000  # annotations: a share of them is known to about 1 %


@dataclass(frozen=True)
class References:
    """What the sampled annotations have in one of their keys, `image_id` or `category_id`.

    Attributes:
        ids: the values, None where it is no id.
        known: the ids of the file.
        names: what else names an entry: the files' names, the names of categories.
    """

    ids: list[Identity | None]
    known: Collection[Identity]
    names: Collection[str]


@dataclass(frozen=True)
class Measurements:
    """K sampled annotations; lengths in pixels, and NaN where the file has no valid value.

    Attributes:
        boxes: float64 `(K, 4)`, `bbox` as it is in the file, if it is four finite numbers.
        extents: float64 `(K, 4)`, the `(x0, y0, x1, y1)` of the mask.
        mask_areas: float64 `(K,)`, pixels of the mask.
        areas: float64 `(K,)`, `area` as it is in the file.
        crowds: bool `(K,)`, whether `iscrowd` is 1.
        sizes: float64 `(K, 2)`, (height, width) that the file states of the image.
        rle_sizes: float64 `(K, 2)`, the size of a run-length code.
        forms: `(K,)`, of the segmentation, see `segmentation_form`.
        images, categories: what `image_id` and `category_id` refer to.
    """

    boxes: np.ndarray
    extents: np.ndarray
    mask_areas: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray
    sizes: np.ndarray
    rle_sizes: np.ndarray
    forms: np.ndarray
    images: References
    categories: References

    def __len__(self) -> int:
        return len(self.boxes)


def measure(
    entries: Sequence[Any],
    images: Mapping[Identity, ImageEntry | None],
    categories: Mapping[Identity, str | None],
) -> Measurements:
    """Measure a random sample of the entries of `annotations`, the same in each call.

    Args:
        entries: of any type.
        images, categories: results of `check_images` and `check_categories`.
    """
    chosen = np.arange(len(entries))
    if len(entries) > SAMPLE_SIZE:
        # Not every n-th one: files can alternate.
        chosen = np.sort(np.random.default_rng(0).choice(chosen, SAMPLE_SIZE, replace=False))
    sample = [entries[i] if isinstance(entries[i], dict) else {} for i in chosen.tolist()]
    image_refs = References(
        [as_id(entry.get("image_id")) for entry in sample], images, _file_names(images)
    )
    category_refs = References(
        [as_id(entry.get("category_id")) for entry in sample],
        categories,
        {name for name in categories.values() if name is not None},
    )
    sizes, extents, mask_areas = [], [], []
    for entry, identity in zip(sample, image_refs.ids, strict=True):
        named = find_id(identity, images)[0]
        image = images.get(named) if named is not None else None
        size = None if image is None else (image["height"], image["width"])
        sizes.append(size or (math.nan, math.nan))
        extent, area = _measure_mask(entry.get("segmentation"), size)
        extents.append(extent)
        mask_areas.append(area)
    return Measurements(
        boxes=_array([_numbers(entry.get("bbox"), 4) for entry in sample], 4),
        extents=_array(extents, 4),
        mask_areas=np.array(mask_areas, dtype=np.float64),
        areas=_array([_numbers([entry.get("area")], 1) for entry in sample], 1)[:, 0],
        crowds=np.array([entry.get("iscrowd", 0) in (1,) for entry in sample], dtype=bool),
        sizes=_array(sizes, 2),
        rle_sizes=_array([_rle_size(entry.get("segmentation")) for entry in sample], 2),
        forms=np.array([segmentation_form(entry.get("segmentation")) for entry in sample], "U16"),
        images=image_refs,
        categories=category_refs,
    )


def segmentation_form(segmentation: Any) -> str:
    """Return the form of a segmentation by its first part.

    "polygons", "rle" and "missing" are COCO's; the others are "flat" (one polygon that is not in a
    list), "points" (a list of pairs), "nested" (a list too many), "objects" and "text" (JSON
    objects and strings), and "other".

    Example:
        >>> segmentation_form([[1, 1, 5, 1, 5, 5]]), segmentation_form([1, 1, 5, 1, 5, 5])
        ('polygons', 'flat')
    """
    if segmentation is None or segmentation in ([], "", {}):
        return "missing"
    if isinstance(segmentation, dict):
        return "rle" if {"size", "counts"} <= segmentation.keys() else "objects"
    if isinstance(segmentation, str):
        return "text"
    if not isinstance(segmentation, list):
        return "other"
    first = segmentation[0]
    if _is_real(first):
        return "flat"
    if not isinstance(first, list) or not first:
        is_object = isinstance(first, dict)
        return "objects" if is_object else "text" if isinstance(first, str) else "other"
    if isinstance(first[0], list):
        return "nested"
    pairs = len(segmentation) > 2 and all(isinstance(p, list) and len(p) == 2 for p in segmentation)
    return "points" if pairs else "polygons" if _is_real(first[0]) else "other"


def most(condition: np.ndarray, among: np.ndarray | None = None) -> bool:
    """Return whether a condition `(K,)` holds for more than half, and for `FEW` or more."""
    total = len(condition) if among is None else np.count_nonzero(among)
    count = np.count_nonzero(condition)
    return bool(count >= FEW and count > total / 2)


def many(condition: np.ndarray, among: np.ndarray | None = None) -> bool:
    """Return whether a condition `(K,)` holds for most, or for one of the files that were joined.

    That is for a fifth, and for four or more.
    """
    total = len(condition) if among is None else np.count_nonzero(among)
    count = np.count_nonzero(condition)
    return most(condition, among) or bool(count >= 2 * FEW and count >= total / 5)


def count_of(condition: np.ndarray) -> str:
    """Return the text "3 of 5 annotations"."""
    return f"{np.count_nonzero(condition)} of {len(condition)} annotations"


def _measure_mask(segmentation: Any, size: tuple[int, int] | None) -> tuple[list[float], float]:
    """Return extent and area; the area of polygons by the shoelace formula."""
    valid = check_segmentation(segmentation, size)[0] if size else None
    if valid is None:
        return [math.nan] * 4, math.nan
    if isinstance(valid, dict):
        x, y, width, height = mask_utils.toBbox(valid).tolist()
        return [x, y, x + width, y + height], float(mask_utils.area(valid))
    area = 0.0
    for polygon in valid:
        xs, ys = np.asarray(polygon, dtype=np.float64).reshape(-1, 2).T
        area += abs(float(xs @ np.roll(ys, -1) - ys @ np.roll(xs, -1))) / 2
    points = np.concatenate([np.asarray(polygon, dtype=np.float64) for polygon in valid])
    points = points.reshape(-1, 2)
    return [*points.min(axis=0).tolist(), *points.max(axis=0).tolist()], area


def _file_names(images: Mapping[Identity, ImageEntry | None]) -> set[str]:
    """Return the names of files, and also those without folders, and without suffix."""
    names = [image["file_name"] for image in images.values() if image is not None]
    bases = [os.path.basename(name) for name in names]
    return {*names, *bases, *(os.path.splitext(base)[0] for base in bases)}


def _rle_size(segmentation: Any) -> list[float]:
    return _numbers(segmentation.get("size") if isinstance(segmentation, dict) else None, 2)


def _numbers(values: Any, count: int) -> list[float]:
    """Return a list of so many finite numbers, or of NaN if the values are not."""
    if not isinstance(values, list) or len(values) != count or not all(map(_is_real, values)):
        return [math.nan] * count
    return [float(value) for value in values]


def _is_real(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 1e15  # false for NaN, too; larger ones overflow when multiplied
    )


def _array(rows: Sequence[Sequence[float]], num_columns: int) -> np.ndarray:
    return np.array(rows, dtype=np.float64).reshape(-1, num_columns)
