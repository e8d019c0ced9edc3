"""Count which objects of a data set match a window, and propose window sizes that match more.

An object that matches no window is never trained on. Only boxes are used, at the fixed input size
of evaluation, and each image by itself; a mask that has no pixels at this size is not noticed.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensormask.data import CocoDataset
from tensormask.data.augmentation import Augmentation
from tensormask.data.geometry import transform_boxes
from tensormask.data.statistics import AREA_LIMITS, area_size, mask_area
from tensormask.modeling.assigners import Assigner
from tensormask.modeling.assignment import assign
from tensormask.modeling.windows import Windows

Grids = tuple[tuple[int, int], ...]

# Why an object matches no window, in the order of the tests.
TOO_LARGE = "larger than the largest window"
NO_FIT = "between the sizes of the windows"
BORDER = "at the image border, where the windows that fit are off the grid"
AMBIGUOUS = "all windows that fit match several objects"
REASONS = (TOO_LARGE, NO_FIT, BORDER, AMBIGUOUS)

_OBJECTS_PER_CHUNK = 2048  # limits the memory of an assigner: about 2 KB per object, level and size
_COARSEST_LEVEL = 7  # of the feature pyramid
# Sides, in strides, of the smallest proposed window; the paper has 11.
_UNITS = range(7, 16, 2)
_SMALL_SHARE = 0.1


@dataclass(frozen=True)
class InputObjects:
    """The objects of a data set in the network's input, at a fixed size; lists are per image."""

    boxes: list[Tensor]  # float32 (K, 4), (x0, y0, x1, y1) in pixels of the input
    input_sizes: list[tuple[int, int]]  # (height, width) of the input in pixels
    coco_sizes: list[list[str]]  # K times "small", "medium" or "large"

    def longer_sides(self) -> np.ndarray:
        """Return the longer side of each box in pixels, float `(M,)`."""
        boxes = torch.cat([torch.zeros(0, 4), *self.boxes])
        return (boxes[:, 2:] - boxes[:, :2]).amax(1).double().numpy()


@dataclass
class Coverage:
    """How many objects match a window; arrays are `(L, S)` int64, by level and size."""

    windows: np.ndarray  # windows that are matched to an object
    objects: np.ndarray  # objects that match such a window; an object can count several times
    by_size: dict[str, tuple[int, int]]  # (matched, objects), by COCO size
    reasons: dict[str, int]  # number of unmatched objects

    @property
    def num_objects(self) -> int:
        return sum(total for _, total in self.by_size.values())

    @property
    def num_matched(self) -> int:
        return sum(matched for matched, _ in self.by_size.values())

    @property
    def share(self) -> float:
        """The share of matched objects, 0..1; 1 without objects."""
        return self.num_matched / self.num_objects if self.num_objects else 1.0

    @property
    def windows_per_object(self) -> float:
        """The mean number of windows of a matched object; 0 without one."""
        return int(self.windows.sum()) / max(1, self.num_matched)

    def as_record(self) -> dict[str, Any]:
        """Return all numbers as a dict for JSON."""
        return {
            "objects": self.num_objects,
            "matched": self.num_matched,
            "windows_per_matched_object": self.windows_per_object,
            "by_size": {s: {"matched": m, "objects": n} for s, (m, n) in self.by_size.items()},
            "matched_by_level_and_size": self.objects.tolist(),
            "windows_by_level_and_size": self.windows.tolist(),
            "unmatched": self.reasons,
        }


def input_objects(dataset: CocoDataset, transform: Augmentation) -> InputObjects:
    """Return the objects that can be trained on, without boxes that are empty at the input size.

    Args:
        transform: a deterministic one, such as that of `build_test_transform`.
    """
    rng = np.random.default_rng(0)
    boxes, input_sizes, coco_sizes = [], [], []
    for image_id in dataset.image_ids:
        image = dataset.image(image_id)
        annotations = dataset.training_annotations(image_id)
        geometry = transform.draw((image["height"], image["width"]), rng)
        corners = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        corners = transform_boxes(corners, geometry)
        non_empty = (corners[:, 2:] > corners[:, :2]).all(axis=1)
        boxes.append(torch.from_numpy(corners[non_empty].astype(np.float32)))
        input_sizes.append(geometry.output_size)
        left = [annotations[row] for row in np.flatnonzero(non_empty)]
        coco_sizes.append([area_size(mask_area(annotation, image)) for annotation in left])
    return InputObjects(boxes, input_sizes, coco_sizes)


def measure_coverage(
    objects: InputObjects, windows: Windows, assigner: Assigner = assign
) -> Coverage:
    """Count the objects that match a window, and the reasons why others do not.

    Args:
        assigner: of the model; one that needs predictions must also work without.
    """
    shape = (windows.num_levels, windows.num_sizes)
    num_windows, num_objects = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    matched_sizes: Counter[str] = Counter()
    reasons: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
    for grids, indices in _chunks(objects, windows):
        boxes = [objects.boxes[index] for index in indices]
        assignment = assigner(boxes, windows, list(grids))
        # Rows of the chunk's objects, one image after the other.
        starts = np.cumsum([0, *(len(b) for b in boxes[:-1])])
        rows = torch.from_numpy(starts)[assignment.image] + assignment.object
        for level, size, at in assignment.groups():
            num_windows[level, size] += at.stop - at.start
            num_objects[level, size] += len(rows[at].unique())
        matched = torch.zeros(sum(map(len, boxes)), dtype=torch.bool)
        matched[rows] = True
        sizes = [size for index in indices for size in objects.coco_sizes[index]]
        matched_sizes.update(itertools.compress(sizes, matched.tolist()))
        reasons.update(_count_reasons(torch.cat(boxes)[~matched], windows, grids, assigner))
    totals = Counter(size for sizes in objects.coco_sizes for size in sizes)
    by_size = {size: (matched_sizes[size], totals[size]) for size in AREA_LIMITS}
    return Coverage(num_windows, num_objects, by_size, dict(reasons))


def propose_sizes(
    objects: InputObjects, windows: Windows, assigner: Assigner = assign
) -> tuple[Windows, Coverage]:
    """Propose windows that match at least as many objects as the given ones.

    They follow the paper's pattern (`scaled_windows`), with the finest level and the number of
    sizes of the given windows. There are as few levels as contain the longest side. The smallest
    window is 7, 9, ... or 15 strides wide. The search starts with the first one that contains a
    tenth of the objects, since small windows have small masks, and match all smaller objects. It
    ends when enough objects are matched.

    Returns:
        The windows and their coverage. The given windows are returned unless others match more
        objects, or the same number with fewer levels and masks that are not larger.
    """
    given = measure_coverage(objects, windows, assigner)
    sides = objects.longer_sides()
    if not len(sides):
        return windows, given
    small, longest = float(np.quantile(sides, _SMALL_SHARE)), float(sides.max())
    fitting = [u for u in _UNITS if u * windows.strides[0] >= small] or [_UNITS[-1]]
    for units in fitting:
        proposed = scaled_windows(units, windows.num_sizes, windows.strides[0], longest=longest)
        coverage = measure_coverage(objects, proposed, assigner)
        smaller_masks = proposed.mask_sizes[0] <= min(windows.mask_sizes)
        cheaper = smaller_masks and proposed.num_levels < windows.num_levels
        if coverage.num_matched >= given.num_matched + (not cheaper):
            return proposed, coverage
    return windows, given


def scaled_windows(units: int, num_sizes: int, finest_stride: int, *, longest: float) -> Windows:
    """Return the paper's pattern of windows for a smallest window of `units` strides.

    The sizes of a level differ by a factor of 2 ** (1 / num_sizes), rounded down to whole strides
    (11 and 15 in the paper), and double from level to level.

    Args:
        num_sizes: window sizes per level.
        finest_stride: stride of the finest level in pixels.
        longest: side in pixels that the largest window should contain; it determines the number of
            levels.
    """
    in_strides = [int(units * 2 ** (i / num_sizes)) for i in range(num_sizes)]
    strides = [finest_stride]
    while in_strides[-1] * strides[-1] < longest and strides[-1] < 2**_COARSEST_LEVEL:
        strides.append(2 * strides[-1])
    sizes = tuple(tuple(n * stride for n in in_strides) for stride in strides)
    return Windows(strides=tuple(strides), sizes=sizes)


def _chunks(objects: InputObjects, windows: Windows) -> list[tuple[Grids, list[int]]]:
    """Group the images that have objects by the grids of their levels: (grids, image indices)."""
    chunks: dict[tuple[Grids, int], list[int]] = defaultdict(list)
    num_objects: Counter[Grids] = Counter()
    for index, (boxes, size) in enumerate(zip(objects.boxes, objects.input_sizes, strict=True)):
        if len(boxes):
            grids = tuple(windows.grids(size))
            chunks[grids, num_objects[grids] // _OBJECTS_PER_CHUNK].append(index)
            num_objects[grids] += len(boxes)
    return [(grids, indices) for (grids, _), indices in chunks.items()]


def _count_reasons(
    boxes: Tensor, windows: Windows, grids: Grids, assigner: Assigner
) -> dict[str, int]:
    """Count why these boxes `(M, 4)` match no window, by relaxing the rules in turn."""
    largest = max(max(sizes) for sizes in windows.sizes)
    too_large = (boxes[:, 2:] - boxes[:, :2]).amax(1) > largest
    # Far from the border, on grids that are larger on each side by whole strides of every level.
    shift = 4 * max(windows.strides)
    wide = [
        (height + 2 * shift // stride, width + 2 * shift // stride)
        for (height, width), stride in zip(grids, windows.strides, strict=True)
    ]
    without_border = _matched_alone(boxes + shift, windows, wide, assigner)
    on_the_grid = _matched_alone(boxes, windows, list(grids), assigner)
    return {
        TOO_LARGE: int(too_large.sum()),
        NO_FIT: int((~too_large & ~without_border).sum()),
        BORDER: int((without_border & ~on_the_grid).sum()),
        AMBIGUOUS: int(on_the_grid.sum()),
    }


def _matched_alone(
    boxes: Tensor, windows: Windows, grids: list[tuple[int, int]], assigner: Assigner
) -> Tensor:
    """Return which of the boxes `(M, 4)` match a window as the only object in an image, bool."""
    matched = torch.zeros(len(boxes), dtype=torch.bool)
    if len(boxes):
        matched[assigner([box[None] for box in boxes], windows, grids).image] = True
    return matched
