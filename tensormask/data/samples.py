"""`TrainingSet` and `TestSet`: samples of data sets, read and transformed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tensormask.data.augmentation import Augmentation
from tensormask.data.checks.annotations import Annotation, ImageEntry, is_trainable
from tensormask.data.checks.issues import Identity
from tensormask.data.coco import CocoDataset
from tensormask.data.geometry import transform_image
from tensormask.data.images import ImageError
from tensormask.data.mixing import copy_paste
from tensormask.data.photometric import draw_distortion
from tensormask.data.samplers import AUGMENTATION, MAPPER, REPLACEMENT, random_stream
from tensormask.data.transforms import image_to_tensor, transform_annotations
from tensormask.utils.errors import UserError

logger = logging.getLogger(__name__)

Sample = dict[str, Any]
Mapper = Callable[[Sample, np.random.Generator], Sample]
_MAX_REPLACEMENTS = 100  # of an image that cannot be read, before the sample is given up


class TrainingSet(Dataset):
    """Augmented samples of one or more data sets.

    The key is (position, index): `index` counts through all images of the sets, and `position`
    seeds the augmentation and the choice of a replacement for an image that cannot be read. A
    sample is a dict of

        image: uint8 tensor (3, H, W), RGB; None if 100 replacements cannot be read either
        target: boxes (K, 4) float32, (x0, y0, x1, y1) in pixels; labels (K,) int64 from 0; masks
            (K, H, W) bool
        dataset: name of the set
        image_id: id in the COCO file
        file_name: full path
        height, width: size of the original image in pixels
        issues: list of (name of the set, kind, id) of the issues of this sample

    `mapper(sample, rng)` changes a sample, unless its image is None, and returns it. `rng` is
    seeded by `position`. Worker processes that are not forked import the function, so it cannot be
    a lambda there.
    """

    def __init__(
        self,
        datasets: Sequence[CocoDataset],
        augmentation: Augmentation,
        *,
        seed: int,
        filter_empty: bool = True,
        mapper: Mapper | None = None,
    ) -> None:
        self.datasets = list(datasets)
        self.augmentation = augmentation
        self.seed = seed
        self.mapper = mapper
        indices_per_set = []
        for dataset in self.datasets:
            used = dataset.has_file & ((dataset.num_trainable > 0) | (not filter_empty))
            indices_per_set.append(np.flatnonzero(used))
            message = "%s: %d of %d images are trained on; objects: %d, crowds: %d"
            num_objects = dataset.num_trainable[used].sum()
            numbers = (np.count_nonzero(used), len(dataset), num_objects, dataset.num_crowds)
            logger.info(message, dataset.name, *numbers)
        # Arrays, not lists of objects: workers share them without copying (see `packed`).
        self._set_of = np.repeat(np.arange(len(self.datasets)), list(map(len, indices_per_set)))
        self._index_in_set = np.concatenate(indices_per_set)
        if not any(dataset.num_trainable[dataset.has_file].any() for dataset in self.datasets):
            issues = "\n".join(dataset.issues.table() for dataset in self.datasets)
            raise UserError(
                f"no image of {', '.join(d.name for d in datasets)} can be trained on: none has a "
                f"file and an object with valid box and mask that is not a crowd.\n{issues}"
            )

    def __len__(self) -> int:
        return len(self._index_in_set)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        position, index = key
        issues: list[tuple[str, str, Identity]] = []
        rng = random_stream(self.seed, REPLACEMENT, position)
        for attempt in (index, *rng.integers(len(self), size=_MAX_REPLACEMENTS)):
            loaded = self._load(attempt, issues)
            if loaded is not None:
                break
        else:
            return {"image": None, "issues": issues}
        rng = random_stream(self.seed, AUGMENTATION, position)
        dataset, image, annotations, rgb = loaded
        rgb, target, too_small = self._augment(dataset, annotations, rgb, rng)
        too_small_ids = [annotations[i]["id"] for i in np.flatnonzero(too_small)]
        if rng.random() < self.augmentation.copy_paste:
            other = self._load(int(rng.integers(len(self))), issues)
            if other is not None:
                source, source_target, _ = self._augment(other[0], other[2], other[3], rng)
                rgb, target = copy_paste(rgb, target, source, source_target, rng)
        sample = {
            **_describe(dataset, image),
            "image": image_to_tensor(rgb),
            "target": target,
            "issues": issues + [(dataset.name, "object_too_small", i) for i in too_small_ids],
        }
        if self.mapper is None:
            return sample
        return self.mapper(sample, random_stream(self.seed, MAPPER, position))

    def _load(
        self, index: int, issues: list[tuple[str, str, Identity]]
    ) -> tuple[CocoDataset, ImageEntry, list[Annotation], np.ndarray] | None:
        """Return an image with its set, entry and objects, or add to `issues` and return None."""
        dataset = self.datasets[self._set_of[index]]
        image, annotations = dataset.record(self._index_in_set[index])
        try:
            rgb = dataset.load_image(image)
        except ImageError as error:
            issues.append((dataset.name, error.kind, image["id"]))
            return None
        return dataset, image, [a for a in annotations if is_trainable(a, image)], rgb

    def _augment(
        self,
        dataset: CocoDataset,
        annotations: list[Annotation],
        rgb: np.ndarray,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, dict[str, torch.Tensor], np.ndarray]:
        """Return the augmented image, its target, and which objects are empty at this size."""
        augmentation = self.augmentation
        geometry = augmentation.draw(rgb.shape[:2], rng)
        recolor = None
        if augmentation.photometric:
            recolor = draw_distortion(augmentation.photometric, rng)
        labels = [dataset.label_of(annotation) for annotation in annotations]
        target, too_small = transform_annotations(annotations, labels, geometry)
        return transform_image(rgb, geometry, recolor), target, too_small

    def classes(self) -> list[set[int]]:
        """Return the labels of the objects of each image."""
        labels = []
        for dataset_index, index in zip(self._set_of, self._index_in_set, strict=True):
            dataset = self.datasets[dataset_index]
            image, annotations = dataset.record(index)
            labels.append({dataset.label_of(a) for a in annotations if is_trainable(a, image)})
        return labels

    def aspect_groups(self) -> list[int]:
        """Return the group of each image: 0 if it is wider than high, else 1."""
        sizes = np.concatenate([dataset.sizes for dataset in self.datasets])
        first = np.cumsum([0, *(len(dataset) for dataset in self.datasets)])[self._set_of]
        height, width = sizes[first + self._index_in_set].T
        return np.where(width > height, 0, 1).tolist()


class TestSet(Dataset):
    """Images of a data set at the test size; samples as in `TrainingSet`, without `target`.

    An image that cannot be read has None for its `image`.
    """

    __test__ = False  # for pytest: the name begins like that of a class of tests

    def __init__(self, dataset: CocoDataset, augmentation: Augmentation) -> None:
        self.dataset = dataset
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        image, _ = self.dataset.record(index)
        sample = {**_describe(self.dataset, image), "image": None, "issues": []}
        try:
            rgb = self.dataset.load_image(image)
        except ImageError as error:
            sample["issues"].append((self.dataset.name, error.kind, image["id"]))
            return sample
        geometry = self.augmentation.draw(rgb.shape[:2], random_stream(0, AUGMENTATION, index))
        return {**sample, "image": image_to_tensor(transform_image(rgb, geometry))}


def _describe(dataset: CocoDataset, image: ImageEntry) -> Sample:
    return {
        "dataset": dataset.name,
        "image_id": image["id"],
        "file_name": dataset.path(image),
        "height": image["height"],
        "width": image["width"],
    }
