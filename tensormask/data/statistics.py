"""What is in a data set: its images and objects in numbers, and the issues that only files show.

Nothing here needs a model; which windows own the objects is the matter of `evaluation.coverage`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils
from torch.utils.data import DataLoader, Dataset

from tensormask.data.checks.annotations import Annotation, ImageEntry
from tensormask.data.checks.issues import Identity
from tensormask.data.checks.segmentation import segmentation_to_rle
from tensormask.data.coco import CocoDataset
from tensormask.data.images import ImageError

# COCO's sizes: the area of a mask in pixels of the original image, below each of these.
AREA_LIMITS = {"small": 32.0**2, "medium": 96.0**2, "large": float("inf")}
_IMAGES_PER_TASK = 8


@dataclass
class Statistics:
    """A data set in numbers. Objects are the annotations that can be trained on.

    Attributes:
        images: how many there are; how many of them have no object.
        annotations: all that are kept, `crowds` and `objects` among them.
        sizes: `{"height": [smallest, median, largest], "width": ...}` of the images in pixels.
        objects_per_image: [median, largest].
        by_class: objects by class name and COCO size, in the order of the labels; a name that
            stands for several classes holds those of all of them.
        repeated_names: names that stand for several classes, and how many.
        repeated_files: files that several images are in, and how many.
    """

    images: int
    images_without_objects: int
    annotations: int
    crowds: int
    objects: int
    sizes: dict[str, list[float]]
    objects_per_image: list[float]
    by_class: dict[str, dict[str, int]] = field(default_factory=dict)
    repeated_names: dict[str, int] = field(default_factory=dict)
    repeated_files: dict[str, int] = field(default_factory=dict)

    @property
    def by_size(self) -> dict[str, int]:
        """Objects by COCO size."""
        return {
            size: sum(counts[size] for counts in self.by_class.values()) for size in AREA_LIMITS
        }

    @property
    def classes_without_objects(self) -> list[str]:
        return [name for name, counts in self.by_class.items() if not any(counts.values())]

    def as_record(self) -> dict[str, Any]:
        """All of it as a dict for JSON."""
        return asdict(self) | {"by_size": self.by_size}


def count_contents(dataset: CocoDataset) -> Statistics:
    """Counts what is in a data set; no image is opened."""
    by_class = {name: dict.fromkeys(AREA_LIMITS, 0) for name in dataset.class_names}
    files: Counter[str] = Counter()
    for place, image_id in enumerate(dataset.image_ids):
        image, _ = dataset.record(place)
        files[image["file_name"]] += 1
        for annotation in dataset.training_annotations(image_id):
            name = dataset.class_names[dataset.label_of(annotation)]
            by_class[name][area_size(mask_area(annotation, image))] += 1
    per_image = dataset.num_trainable
    return Statistics(
        images=len(dataset),
        images_without_objects=int(np.count_nonzero(per_image == 0)),
        annotations=dataset.num_annotations,
        crowds=dataset.num_crowds,
        objects=int(per_image.sum()),
        sizes={
            side: [float(bound(lengths)) for bound in (np.min, np.median, np.max)]
            for side, lengths in zip(("height", "width"), dataset.sizes.T, strict=True)
        },
        objects_per_image=[float(np.median(per_image)), float(per_image.max())],
        by_class=by_class,
        repeated_names=_repeated(Counter(dataset.class_names)),
        repeated_files=_repeated(files),
    )


def mask_area(annotation: Annotation, image: ImageEntry) -> float:
    """The area in pixels by which COCO's evaluation sorts an object: as stated, or the mask's."""
    if "area" in annotation:
        return float(annotation["area"])
    size = (image["height"], image["width"])
    return float(mask_utils.area(segmentation_to_rle(annotation["segmentation"], size)))


def area_size(area: float) -> str:
    """ "small", "medium" or "large", as COCO's evaluation calls an area in pixels."""
    return next(size for size, limit in AREA_LIMITS.items() if area < limit)


class FileChecks(Dataset):
    """Opens the image at a place and rasterises its masks; gives `(kind, id)` of what is wrong.

    Images that are known to be missing are not looked for again.
    """

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> list[tuple[str, Identity]]:
        image, annotations = self.dataset.record(place)
        found: list[tuple[str, Identity]] = []
        if self.dataset.has_file[place]:
            try:
                self.dataset.load_image(image)
            except ImageError as error:
                found.append((error.kind, image["id"]))
        size = (image["height"], image["width"])
        for annotation in annotations:
            polygons = annotation["segmentation"]
            # An RLE without a pixel has been found when the file was read.
            if isinstance(polygons, list) and not has_pixels(polygons, size):
                found.append(("mask_empty", annotation["id"]))
        return found


def has_pixels(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> bool:
    """Whether polygons cover any pixel of an image of (height, width)."""
    return bool(mask_utils.area(segmentation_to_rle(polygons, size)))


def check_files(dataset: CocoDataset, num_workers: int = 0) -> Iterator[int]:
    """Opens all images and rasterises all masks; what is wrong is added to `dataset.issues`.

    Args:
        num_workers: processes that do it; 0 for this one.

    Yields:
        How many images have been looked at since the last time.
    """
    loader = DataLoader(
        FileChecks(dataset),
        batch_size=_IMAGES_PER_TASK,
        num_workers=num_workers,
        collate_fn=list,
    )
    for batch in loader:
        for kind, identity in (issue for found in batch for issue in found):
            # A set is read once and kept, and may be checked again.
            dataset.issues.add_new(kind, identity)
        yield len(batch)


def _repeated(counts: Counter[str]) -> dict[str, int]:
    return {what: count for what, count in counts.items() if count > 1}
