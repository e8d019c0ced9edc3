"""Builds the loaders: batches of samples for training and evaluation."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tensormask.config import CfgNode
from tensormask.data.augmentation import (
    Augmentation,
    build_test_transform,
    build_train_transform,
)
from tensormask.data.catalog import get_dataset
from tensormask.data.checks.annotations import Annotation, ImageEntry, is_trainable
from tensormask.data.checks.issues import Identity
from tensormask.data.classes import Classes, check_num_classes, log_match, match_dataset
from tensormask.data.coco import CocoDataset
from tensormask.data.geometry import transform_image
from tensormask.data.images import ImageError
from tensormask.data.mixing import copy_paste
from tensormask.data.photometric import draw_distortion
from tensormask.data.prefetch import BatchLoader
from tensormask.data.samplers import (
    AUGMENTATION,
    MAPPER,
    REPLACEMENT,
    BatchSampler,
    ShareSampler,
    random_stream,
    repeat_factors,
)
from tensormask.data.transforms import image_to_tensor, transform_annotations
from tensormask.utils.errors import UserError, shorten

logger = logging.getLogger(__name__)

Sample = dict[str, Any]
Mapper = Callable[[Sample, np.random.Generator], Sample]
SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")
_MAX_REPLACEMENTS = 100  # of an image that cannot be read, before the sample is given up


def build_train_loader(
    cfg: CfgNode,
    start_iteration: int = 0,
    *,
    rank: int = 0,
    world_size: int = 1,
    mapper: Mapper | None = None,
    classes: Classes | None = None,
) -> Iterator[list[Sample]]:
    """Yield training batches from `DATASETS.TRAIN` endlessly, starting at `start_iteration`.

    A batch is a list of `SOLVER.IMS_PER_BATCH` samples. It depends only on `SEED`, its iteration,
    the files and `mapper` (see `TrainingSet`). Process `rank` of `world_size` gets an equal share
    of each of the `SOLVER.ACCUMULATE_STEPS` parts, so all processes together have the batch of one.

    `classes` are those of the model, which give the labels (`match_dataset`); None takes those of
    the first set.

    Raises:
        ValueError: the batch does not divide into these shares, the seed is negative, no image can
            be trained on, the classes of the sets differ from each other or from
            `MODEL.TENSOR_MASK.NUM_CLASSES`, or a set has issues and `DATASETS.STRICT` is on.
    """
    batch_size, num_parts = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE_STEPS
    for key, number in (("IMS_PER_BATCH", batch_size), ("ACCUMULATE_STEPS", num_parts)):
        if number < 1:
            raise UserError(f"SOLVER.{key} is {number}; it must be 1 or more.")
    num_shares = world_size * num_parts
    if batch_size % num_shares:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {batch_size} images over all processes, not a multiple of "
            f"{world_size} processes x {num_parts} (SOLVER.ACCUMULATE_STEPS): set it to "
            f"{math.ceil(batch_size / num_shares) * num_shares}."
        )
    if cfg.SEED < 0:
        raise UserError(f"SEED is {cfg.SEED}; the loader needs a seed of 0 or more.")
    datasets = [get_dataset(name) for name in cfg.DATASETS.TRAIN]
    if not datasets:
        raise UserError(
            "DATASETS.TRAIN is empty; name a set, as in DATASETS.TRAIN \"('shapes_train',)\"."
        )
    classes = classes or Classes(datasets[0].class_names, source=datasets[0].name)
    for number, dataset in enumerate(datasets):
        datasets[number] = match_dataset(cfg, dataset, classes, complete=True)
        log_match(dataset, datasets[number], classes)
        check_dataset(cfg, datasets[number])
    filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    augmentation = build_train_transform(cfg)
    training_set = TrainingSet(
        datasets, augmentation, seed=cfg.SEED, filter_empty=filter_empty, mapper=mapper
    )
    grouped = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    groups = training_set.aspect_groups() if grouped else [0] * len(training_set)
    sampler = BatchSampler(
        groups,
        batch_size=batch_size,
        seed=cfg.SEED,
        start=start_iteration,
        repeats=_repeats(cfg, training_set),
    )
    # A share of each accumulated part, because the loss of a part is normalized over all processes.
    size = batch_size // num_shares
    starts = range(rank * size, batch_size, world_size * size)
    return iter(_build_loader(cfg, training_set, ShareSampler(sampler, starts, size)))


def build_test_loader(
    cfg: CfgNode, dataset: CocoDataset, *, rank: int = 0, world_size: int = 1
) -> BatchLoader:
    """Load all images of a set in the order of `image_ids`, in lists of one sample (see `TestSet`).

    Process `rank` of `world_size` loads every `world_size`-th image, starting at image `rank`.

    Raises:
        ValueError: see `check_dataset`.
    """
    check_dataset(cfg, dataset)
    test_set = TestSet(dataset, build_test_transform(cfg))
    indices = range(rank, len(test_set), world_size)
    return _build_loader(cfg, test_set, [[index] for index in indices])


def repeat(loader: Iterable[list[Sample]]) -> Iterator[list[Sample]]:
    """Iterate over a loader again and again."""
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise UserError("train_loader has no batch, or ends and cannot be iterated again")


def check_batch(batch: Any) -> None:
    """Raise UserError for a batch of a user's own loader or mapper that is no list of samples.

    Also for a sample without an image: too many consecutive files are unreadable.
    """
    for sample in batch if isinstance(batch, list) and batch else [()]:
        if isinstance(sample, dict) and sample.get("issues") and sample.get("image", ()) is None:
            raise UserError(
                f"{len(sample['issues'])} consecutive images cannot be read; the last one is "
                f"{sample['issues'][-1]} (data set, issue, image id). "
                "Check that the folder of images exists and is readable"
            )
        if not isinstance(sample, dict) or not {"image", "target"} <= sample.keys():
            raise UserError(
                "a batch must be a list of dicts with image and target: return the sample from a "
                "mapper, and give collate_fn=list to a DataLoader whose data set returns such "
                f"dicts; got {shorten(repr(batch))}"
            )


def check_dataset(cfg: CfgNode, dataset: CocoDataset) -> None:
    """Raise ValueError if a set does not fit the config.

    That is: it has another number of classes, none of its annotations is valid, or it has issues
    (as far as they are known) and `DATASETS.STRICT` is on.
    """
    check_num_classes(cfg, dataset.class_names, dataset.name)
    if cfg.DATASETS.STRICT:
        dataset.issues.check_strict(dataset.name)
    if dataset.has_annotations and not dataset.num_annotations:
        raise UserError(
            "\n".join([f"{dataset.name}: no annotation is valid.", *map(str, dataset.diagnoses)])
            + f"\n{dataset.issues.table()}\n"
            "Correct them, or remove all annotations from a set for testing, such as test-dev."
        )


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


def _repeats(cfg: CfgNode, training_set: TrainingSet) -> np.ndarray | None:
    """Return how often each image is shown in an epoch, or None for once."""
    options = cfg.DATALOADER
    if options.SAMPLER_TRAIN not in SAMPLERS:
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN is {options.SAMPLER_TRAIN!r}; it is one of {SAMPLERS}."
        )
    if options.REPEAT_THRESHOLD < 0:
        raise UserError(
            f"DATALOADER.REPEAT_THRESHOLD is {options.REPEAT_THRESHOLD}; it is a share of the "
            "images, 0 or more."
        )
    if options.SAMPLER_TRAIN == "TrainingSampler":
        return None
    repeats = repeat_factors(
        training_set.classes(), options.REPEAT_THRESHOLD, sqrt=options.REPEAT_SQRT
    )
    logger.info(
        "%d of %d images are repeated for their rare classes, up to %.1f times an epoch",
        *(np.count_nonzero(repeats > 1), len(repeats), repeats.max()),
    )
    return repeats


def _describe(dataset: CocoDataset, image: ImageEntry) -> Sample:
    return {
        "dataset": dataset.name,
        "image_id": image["id"],
        "file_name": dataset.path(image),
        "height": image["height"],
        "width": image["width"],
    }


def _build_loader(cfg: CfgNode, dataset: Dataset, batches: Iterable[list[Any]]) -> BatchLoader:
    num_workers, timeout = cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.TIMEOUT
    for key, number in (("NUM_WORKERS", num_workers), ("TIMEOUT", timeout)):
        if number < 0:
            raise UserError(f"DATALOADER.{key} is {number}; it must be 0 or more.")
    return BatchLoader(
        dataset,
        batches,
        num_workers=num_workers,
        timeout=timeout,
        pin_memory=torch.cuda.is_available() and cfg.MODEL.DEVICE != "cpu",
    )
