"""Coverage: which objects of a data set the windows own, and sizes of windows that own more.

What no window owns is never trained on. Only boxes are looked at, at the fixed input size of
evaluation, each image alone; a mask that this size leaves without a pixel is not noticed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensormask.data import CocoDataset
from tensormask.data.statistics import AREA_LIMITS, area_size, mask_area
from tensormask.data.transforms import Augmentation, transform_boxes
from tensormask.modeling.assignment import Assignment, assign
from tensormask.modeling.windows import Windows

Grids = tuple[tuple[int, int], ...]

# Why no window owns an object, in the order in which the reasons are tried.
TOO_LARGE = "larger than the largest window"
NO_FIT = "between the sizes of the windows"
RIM = "at the rim, where the windows that fit are off the grid"
CONTESTED = "all windows that fit are claimed by another object, too"
REASONS = (TOO_LARGE, NO_FIT, RIM, CONTESTED)

_OBJECTS_PER_CHUNK = 2048  # bounds the memory of `assign`: some 2 KB an object, level and size
_COARSEST_LEVEL = 7  # that the pyramid can make
# Sides in strides that the smallest window may be proposed with; the paper's has 11.
_UNITS = range(7, 16, 2)
_SMALL_SHARE = 0.1


@dataclass(frozen=True)
class InputObjects:
    """The objects of a data set as the network gets them, at a fixed size.

    Attributes:
        boxes: per image float32 `(K, 4)`, (x0, y0, x1, y1) in pixels of the input.
        input_sizes: per image (height, width) of the input in pixels.
        coco_sizes: per image the K COCO sizes, "small", "medium" or "large".
    """

    boxes: list[Tensor]
    input_sizes: list[tuple[int, int]]
    coco_sizes: list[list[str]]

    def longer_sides(self) -> np.ndarray:
        """The longer side of each box in pixels, float `(M,)`."""
        boxes = torch.cat([torch.zeros(0, 4), *self.boxes])
        return (boxes[:, 2:] - boxes[:, :2]).amax(1).double().numpy()


@dataclass
class Coverage:
    """How many objects the windows own.

    Attributes:
        windows: `(L, S)` int64, windows that own an object, by level and size.
        objects: `(L, S)` int64, objects that such a window owns; an object may count several times.
        by_size: `{COCO size: (owned, objects)}`.
        reasons: objects that no window owns, by reason.
    """

    windows: np.ndarray
    objects: np.ndarray
    by_size: dict[str, tuple[int, int]]
    reasons: dict[str, int]

    @property
    def num_objects(self) -> int:
        return sum(total for _, total in self.by_size.values())

    @property
    def num_owned(self) -> int:
        return sum(owned for owned, _ in self.by_size.values())

    @property
    def share(self) -> float:
        """The share of the objects that a window owns, 0..1; 1 if there are none."""
        return self.num_owned / self.num_objects if self.num_objects else 1.0

    def as_record(self) -> dict[str, Any]:
        """All of it as a dict for JSON."""
        return {
            "objects": self.num_objects,
            "owned": self.num_owned,
            "by_size": {
                size: {"owned": owned, "objects": total}
                for size, (owned, total) in self.by_size.items()
            },
            "owned_by_level_and_size": self.objects.tolist(),
            "windows_by_level_and_size": self.windows.tolist(),
            "not_owned": self.reasons,
        }


def input_objects(dataset: CocoDataset, transform: Augmentation) -> InputObjects:
    """The objects that can be trained on, without those whose box is empty at the input's size.

    Args:
        transform: one without anything random, such as `build_test_transform` makes.
    """
    rng = np.random.default_rng(0)
    boxes, input_sizes, coco_sizes = [], [], []
    for place, image_id in enumerate(dataset.image_ids):
        image, _ = dataset.record(place)
        annotations = dataset.training_annotations(image_id)
        geometry = transform.draw((image["height"], image["width"]), rng)
        corners = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        corners = transform_boxes(corners, geometry)
        kept = (corners[:, 2:] > corners[:, :2]).all(axis=1)
        boxes.append(torch.from_numpy(corners[kept].astype(np.float32)))
        input_sizes.append(geometry.new_size)
        coco_sizes.append(
            [area_size(mask_area(annotations[row], image)) for row in np.flatnonzero(kept)]
        )
    return InputObjects(boxes, input_sizes, coco_sizes)


def measure_coverage(objects: InputObjects, windows: Windows) -> Coverage:
    """Counts which objects the windows own, and why the others are not owned."""
    shape = (windows.num_levels, windows.num_sizes)
    num_windows, num_objects = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    owned_sizes: Counter[str] = Counter()
    reasons: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
    for grids, places in _chunks(objects, windows):
        boxes = [objects.boxes[place] for place in places]
        owned = assign(boxes, windows, list(grids))
        # Rows of the chunk's objects, one image after the other.
        starts = np.cumsum([0, *(len(b) for b in boxes[:-1])])
        rows = torch.from_numpy(starts)[owned.image] + owned.object
        for level, size, at in owned.groups():
            num_windows[level, size] += at.stop - at.start
            num_objects[level, size] += len(rows[at].unique())
        is_owned = torch.zeros(sum(map(len, boxes)), dtype=torch.bool)
        is_owned[rows] = True
        sizes = [size for place in places for size in objects.coco_sizes[place]]
        owned_sizes.update(size for size, yes in zip(sizes, is_owned.tolist(), strict=True) if yes)
        reasons.update(_reasons(torch.cat(boxes)[~is_owned], windows, grids))
    totals = Counter(size for sizes in objects.coco_sizes for size in sizes)
    by_size = {size: (owned_sizes[size], totals[size]) for size in AREA_LIMITS}
    return Coverage(num_windows, num_objects, by_size, dict(reasons))


def propose_sizes(objects: InputObjects, windows: Windows) -> tuple[Windows, Coverage]:
    """Finds windows to the measure of the objects that own at least as many as the given ones.

    They follow the paper's pattern (`scaled_windows`) with the finest level and the number of sizes
    of those given, which leaves two numbers to find:

    - u, the side of the smallest window in strides: odd, and from 7 to 15. It begins with the first
      that holds the longer side of a tenth of the objects, since small windows make small masks,
      and the smallest one owns all that is smaller. It grows until a count says that no fewer
      objects are owned than with the given windows (see below).
    - the number of levels: the fewest with which the largest window holds the longest side.

    Returns:
        The windows and what they own. The given ones are kept unless others own more objects, or as
        many with fewer levels and masks that are no larger.
    """
    given = measure_coverage(objects, windows)
    sides = objects.longer_sides()
    if not len(sides):
        return windows, given
    small, longest = float(np.quantile(sides, _SMALL_SHARE)), float(sides.max())
    fitting = [u for u in _UNITS if u * windows.strides[0] >= small] or [_UNITS[-1]]
    for units in fitting:
        proposed = scaled_windows(units, windows.num_sizes, windows.strides[0], longest=longest)
        coverage = measure_coverage(objects, proposed)
        cheaper = proposed.num_levels < windows.num_levels and proposed.mask_sizes[0] <= min(
            windows.mask_sizes
        )
        if coverage.num_owned >= given.num_owned + (not cheaper):
            return proposed, coverage
    return windows, given


def scaled_windows(units: int, num_sizes: int, finest_stride: int, *, longest: float) -> Windows:
    """The paper's pattern of windows with a smallest one of `units` strides.

    Sizes of a level are apart by a factor of 2 ** (1 / their number), rounded down to whole strides
    (11 and 15 of them in the paper), and all double from level to level.

    Args:
        num_sizes: window sizes of each level.
        finest_stride: of the finest level, in pixels.
        longest: pixels that the largest window should hold; it decides the number of levels.
    """
    in_strides = [int(units * 2 ** (i / num_sizes)) for i in range(num_sizes)]
    strides = [finest_stride]
    while in_strides[-1] * strides[-1] < longest and strides[-1] < 2**_COARSEST_LEVEL:
        strides.append(2 * strides[-1])
    return Windows(
        strides=tuple(strides),
        sizes=tuple(tuple(n * stride for n in in_strides) for stride in strides),
    )


def _chunks(objects: InputObjects, windows: Windows) -> list[tuple[Grids, list[int]]]:
    """Images that have objects, gathered by the grids of their levels: (grids, their places)."""
    chunks: list[tuple[Grids, list[int]]] = []
    open_chunks: dict[Grids, tuple[list[int], int]] = {}
    for place, (boxes, size) in enumerate(zip(objects.boxes, objects.input_sizes, strict=True)):
        if not len(boxes):
            continue
        grids = tuple(windows.grids(size))
        places, num_objects = open_chunks.pop(grids, ([], 0))
        if places and num_objects + len(boxes) > _OBJECTS_PER_CHUNK:
            chunks.append((grids, places))
            places, num_objects = [], 0
        open_chunks[grids] = ([*places, place], num_objects + len(boxes))
    return chunks + [(grids, places) for grids, (places, _) in open_chunks.items()]


def _reasons(boxes: Tensor, windows: Windows, grids: Grids) -> dict[str, int]:
    """Why no window owns these `(M, 4)` boxes: the rules of `assign` are asked one by one."""
    largest = max(max(sizes) for sizes in windows.sizes)
    too_large = (boxes[:, 2:] - boxes[:, :2]).amax(1) > largest
    # Far from the rim, on grids that go on around the image: whole strides of every level.
    beyond = 4
    shift = beyond * max(windows.strides)
    wide = [
        (height + 2 * shift // stride, width + 2 * shift // stride)
        for (height, width), stride in zip(grids, windows.strides, strict=True)
    ]
    in_the_open = _owned_alone(boxes + shift, windows, wide)
    on_the_grid = _owned_alone(boxes, windows, list(grids))
    return {
        TOO_LARGE: int(too_large.sum()),
        NO_FIT: int((~too_large & ~in_the_open).sum()),
        RIM: int((in_the_open & ~on_the_grid).sum()),
        CONTESTED: int(on_the_grid.sum()),
    }


def _owned_alone(boxes: Tensor, windows: Windows, grids: list[tuple[int, int]]) -> Tensor:
    """Which of the boxes `(M, 4)` a window would own if each were alone in its image, bool."""
    alone = torch.zeros(len(boxes), dtype=torch.bool)
    if len(boxes):
        owned: Assignment = assign([box[None] for box in boxes], windows, grids)
        alone[owned.image] = True
    return alone
