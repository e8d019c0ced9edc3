"""Statistics of a data set, and the checks that open its image files.

Nothing here needs a model. `evaluation.coverage` counts the objects that the windows match.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils
from torch.utils.data import Dataset

from tensormask.data.checks.annotations import Annotation, ImageEntry
from tensormask.data.checks.issues import Identity
from tensormask.data.checks.segmentation import segmentation_to_rle
from tensormask.data.coco import CocoDataset
from tensormask.data.images import ImageError
from tensormask.data.prefetch import BatchLoader

# COCO's object sizes: the mask's area in pixels of the original image is below the limit.
AREA_LIMITS = {"small": 32.0**2, "medium": 96.0**2, "large": float("inf")}
_IMAGES_PER_TASK = 8


@dataclass
class Statistics:
    """Counts of a data set. Objects are the annotations that can be trained on.

    Attributes:
        images: number of images.
        images_without_objects: number of images without an object.
        annotations: number of valid annotations, `crowds` and `objects` included.
        crowds: number of crowds.
        objects: number of objects.
        sizes: `{"height": [smallest, median, largest], "width": ...}` of the images in pixels.
        objects_per_image: [median, largest].
        by_class: objects by class name and COCO size, in the order of the labels; classes of the
            same name are counted together.
        repeated_names: the number of classes by name, for names of several classes.
        repeated_files: the number of images by file, for files of several images.
    """

    images: int
    images_without_objects: int
    annotations: int
    crowds: int
    objects: int
    sizes: dict[str, list[float]]
    objects_per_image: list[float]
    by_class: dict[str, dict[str, int]]
    repeated_names: dict[str, int]
    repeated_files: dict[str, int]

    @property
    def by_size(self) -> dict[str, int]:
        """Number of objects by COCO size."""
        return {
            size: sum(counts[size] for counts in self.by_class.values()) for size in AREA_LIMITS
        }

    @property
    def classes_without_objects(self) -> list[str]:
        return [name for name, counts in self.by_class.items() if not any(counts.values())]

    def as_record(self) -> dict[str, Any]:
        """Return all fields and `by_size` as a dict for JSON."""
        return asdict(self) | {"by_size": self.by_size}


def count_contents(dataset: CocoDataset) -> Statistics:
    """Count images and objects of a data set without opening an image."""
    by_class = {name: dict.fromkeys(AREA_LIMITS, 0) for name in dataset.class_names}
    files: Counter[str] = Counter()
    for image_id in dataset.image_ids:
        image = dataset.image(image_id)
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
    """Return an object's area in pixels, which decides its COCO size: stated, or the mask's."""
    if "area" in annotation:
        return float(annotation["area"])
    size = (image["height"], image["width"])
    return float(mask_utils.area(segmentation_to_rle(annotation["segmentation"], size)))


def area_size(area: float) -> str:
    """Return COCO's size of an area in pixels: "small", "medium" or "large".

    Example:
        >>> area_size(500.0), area_size(5000.0)
        ('small', 'medium')
    """
    return next(size for size, limit in AREA_LIMITS.items() if area < limit)


class FileChecks(Dataset):
    """Open the image of an index and rasterize its masks; return the issues as `(kind, id)`.

    Images that are known to be missing are skipped.
    """

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> list[tuple[str, Identity]]:
        image, annotations = self.dataset.record(index)
        issues: list[tuple[str, Identity]] = []
        if self.dataset.has_file[index]:
            try:
                self.dataset.load_image(image)
            except ImageError as error:
                issues.append((error.kind, image["id"]))
        size = (image["height"], image["width"])
        for annotation in annotations:
            mask = annotation["segmentation"]
            # An empty RLE was reported when the file was read.
            if isinstance(mask, list) and not mask_utils.area(segmentation_to_rle(mask, size)):
                issues.append(("mask_empty", annotation["id"]))
        return issues


def check_files(dataset: CocoDataset, num_workers: int = 0) -> Iterator[int]:
    """Open all images and rasterize all masks, and add the issues to `dataset.issues`.

    Yields the number of images checked since the last time. 0 workers work in this process.
    """
    indices = [*range(len(dataset))]
    tasks = [indices[i : i + _IMAGES_PER_TASK] for i in range(0, len(dataset), _IMAGES_PER_TASK)]
    for batch in BatchLoader(FileChecks(dataset), tasks, num_workers=num_workers):
        for kind, identity in (issue for issues in batch for issue in issues):
            # `get_dataset` caches a set, so it may be checked again.
            dataset.issues.add_new(kind, identity)
        yield len(batch)


def _repeated(counts: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count > 1}
