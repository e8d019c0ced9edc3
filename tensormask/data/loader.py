"""Batches for training and evaluation.

All randomness of training is a function of (seed, position): `position` counts the images shown
since the first iteration. So a batch does not depend on the number of workers, and a resumed run
continues with the batches that it would have had.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tensormask.data.catalog import get_dataset
from tensormask.data.checks.annotations import Annotation, ImageEntry, is_trainable
from tensormask.data.checks.issues import Identity
from tensormask.data.coco import CocoDataset
from tensormask.data.images import ImageError
from tensormask.data.transforms import (
    Augmentation,
    build_test_transform,
    build_train_transform,
    image_to_tensor,
    transform_annotations,
    transform_image,
)
from tensormask.data.workers import outlive_signals
from tensormask.utils.errors import UserError

logger = logging.getLogger(__name__)

Sample = dict[str, Any]
# Families of random streams of one seed: the order of an epoch, the augmentation of a sample, and
# the images that stand in for one that cannot be read.
_ORDER, _AUGMENTATION, _REPLACEMENT = 0, 1, 2
# So many draws of images that cannot be read are no accident.
_MAX_REPLACEMENTS = 100


def build_train_loader(
    cfg: Any, start_iteration: int = 0, *, rank: int = 0, world_size: int = 1
) -> Iterator[list[Sample]]:
    """Training batches from `DATASETS.TRAIN` without end, from number `start_iteration` on.

    Each batch is a list of `SOLVER.IMS_PER_BATCH` samples (see `TrainingSet`) and depends on
    `SEED`, its number and the files alone. Process `rank` of `world_size` gets an equal share of
    it, from each of `SOLVER.ACCUMULATE_STEPS` parts: together they have what one would have.

    Raises:
        ValueError: the batch does not divide into these shares, the seed is negative (draw one
            first), there is nothing to train on, the classes of the sets differ from each other or
            from `MODEL.TENSOR_MASK.NUM_CLASSES`, or a set has issues and `DATASETS.STRICT` is on.
    """
    batch_size, num_parts = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE_STEPS
    if num_parts < 1:
        raise UserError(f"SOLVER.ACCUMULATE_STEPS is {num_parts}; it must be 1 or more.")
    num_shares = world_size * num_parts
    if batch_size % num_shares:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {batch_size} images over all processes, which does not "
            f"divide by {world_size} processes x {num_parts} (SOLVER.ACCUMULATE_STEPS): set it to "
            f"{math.ceil(batch_size / num_shares) * num_shares}."
        )
    if cfg.SEED < 0:
        raise UserError(f"SEED is {cfg.SEED}; the loader needs a drawn seed, 0 or more.")
    datasets = [get_dataset(name) for name in cfg.DATASETS.TRAIN]
    if not datasets:
        raise UserError(
            "DATASETS.TRAIN is empty; name a set, as in DATASETS.TRAIN \"('shapes_train',)\"."
        )
    for dataset in datasets:
        check_dataset(cfg, dataset)
        if dataset.class_names != datasets[0].class_names:
            raise UserError(
                f"{datasets[0].name} and {dataset.name} have different classes, "
                f"{datasets[0].class_names} and {dataset.class_names}; "
                "sets that are trained on together need the same."
            )
    training_set = TrainingSet(
        datasets,
        build_train_transform(cfg),
        seed=cfg.SEED,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
    )
    grouped = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    sampler = BatchSampler(
        training_set.aspect_groups() if grouped else [0] * len(training_set),
        batch_size=batch_size,
        seed=cfg.SEED,
        start=start_iteration,
    )
    # Of each part in which a batch is accumulated a share: a part's loss is over what is in it.
    size = batch_size // num_shares
    firsts = range(rank * size, batch_size, world_size * size)
    own = ([key for i in firsts for key in batch[i : i + size]] for batch in sampler)
    return iter(_data_loader(cfg, training_set, batch_sampler=own))


def build_test_loader(
    cfg: Any, dataset: CocoDataset, *, rank: int = 0, world_size: int = 1
) -> DataLoader:
    """All images of a set in the order of `image_ids`, in lists of one sample (see `TestSet`).

    Of several processes, `world_size`, each takes the images from its `rank` on in steps of their
    number: each image comes once.

    Raises:
        ValueError: as of `check_dataset`.
    """
    check_dataset(cfg, dataset)
    test_set = TestSet(dataset, build_test_transform(cfg))
    places = range(rank, len(test_set), world_size)
    return _data_loader(cfg, test_set, batch_size=1, sampler=places)


def check_dataset(cfg: Any, dataset: CocoDataset) -> None:
    """Raises ValueError if a set does not have the config's number of classes, or has issues.

    Issues are an error with `DATASETS.STRICT` only, those that are known before an image is
    opened; or if no annotation is whole.
    """
    expected, given = len(dataset.class_names), cfg.MODEL.TENSOR_MASK.NUM_CLASSES
    if expected != given:
        raise UserError(
            f"{dataset.name} has {expected} classes, but MODEL.TENSOR_MASK.NUM_CLASSES is {given}. "
            f"Add the override: MODEL.TENSOR_MASK.NUM_CLASSES {expected}"
        )
    if cfg.DATASETS.STRICT:
        dataset.issues.check_strict(dataset.name)
    if dataset.has_annotations and not dataset.num_annotations:
        raise UserError(
            f"{dataset.name}: no annotation can be used.\n{dataset.issues.table()}\n"
            "A set for testing only, such as test-dev, has none at all."
        )


class TrainingSet(Dataset):
    """Augmented samples of one or more data sets.

    Indexed by (position, index): `index` counts through the sets one after the other,
    `position` seeds the augmentation, and the draw of another image for one that cannot be read.
    A sample is a dict of

        image: uint8 tensor (3, H, W), RGB; None where a hundred draws cannot be read
        target: boxes (K, 4) float32, (x0, y0, x1, y1) in pixels; labels (K,) int64 from 0; masks
            (K, H, W) bool
        dataset: name of the set
        image_id: the file's
        file_name: the full path
        height, width: the original image's, in pixels
        issues: list of (name of the set, kind, id) of what was found on the way
    """

    def __init__(
        self,
        datasets: Sequence[CocoDataset],
        augmentation: Augmentation,
        *,
        seed: int,
        filter_empty: bool = True,
    ) -> None:
        self.datasets = list(datasets)
        self.augmentation = augmentation
        self.seed = seed
        kept_per_set = []
        for dataset in self.datasets:
            kept = dataset.has_file & ((dataset.num_trainable > 0) | (not filter_empty))
            kept_per_set.append(np.flatnonzero(kept))
            _log_contents(dataset, kept)
        # Arrays, not lists of objects: workers share them without copying (see `packed`).
        self._set_of = np.repeat(np.arange(len(self.datasets)), [len(k) for k in kept_per_set])
        self._place_of = np.concatenate(kept_per_set)
        if not any(dataset.num_trainable[dataset.has_file].any() for dataset in self.datasets):
            issues = "\n".join(dataset.issues.table() for dataset in self.datasets)
            raise UserError(
                f"there is nothing to train on in {', '.join(d.name for d in datasets)}: "
                f"no image has an object that is no crowd, with a box and a mask.\n{issues}"
            )

    def __len__(self) -> int:
        return len(self._place_of)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        position, index = key
        issues: list[tuple[str, str, Identity]] = []
        for candidate in self._candidates(index, position):
            dataset = self.datasets[self._set_of[candidate]]
            image, annotations = dataset.record(self._place_of[candidate])
            try:
                rgb = dataset.load_image(image)
            except ImageError as error:
                issues.append((dataset.name, error.kind, image["id"]))
                continue
            return self._sample(dataset, image, annotations, rgb, position, issues)
        return {"image": None, "issues": issues}

    def _candidates(self, index: int, position: int) -> Iterator[int]:
        """The image, and then those that are drawn in its place."""
        yield index
        yield from _rng(self.seed, _REPLACEMENT, position).integers(
            len(self), size=_MAX_REPLACEMENTS
        )

    def aspect_groups(self) -> list[int]:
        """The group of each image: 0 if it is wider than high, else 1."""
        sizes = np.concatenate([dataset.sizes for dataset in self.datasets])
        first = np.cumsum([0, *(len(dataset) for dataset in self.datasets)])[self._set_of]
        height, width = sizes[first + self._place_of].T
        return np.where(width > height, 0, 1).tolist()

    def _sample(
        self,
        dataset: CocoDataset,
        image: ImageEntry,
        annotations: list[Annotation],
        rgb: np.ndarray,
        position: int,
        issues: list[tuple[str, str, Identity]],
    ) -> Sample:
        geometry = self.augmentation.draw(rgb.shape[:2], _rng(self.seed, _AUGMENTATION, position))
        annotations = [a for a in annotations if is_trainable(a, image)]
        labels = [dataset.label_of(annotation) for annotation in annotations]
        target, kept = transform_annotations(annotations, labels, geometry)
        gone = [a["id"] for a, is_kept in zip(annotations, kept, strict=True) if not is_kept]
        return {
            **_describe(dataset, image),
            "image": image_to_tensor(transform_image(rgb, geometry)),
            "target": target,
            "issues": issues + [(dataset.name, "object_too_small", identity) for identity in gone],
        }


class TestSet(Dataset):
    """Images of a data set at the test size; samples as in `TrainingSet`, without `target`.

    An image that cannot be read has None for its `image`.
    """

    __test__ = False  # the name makes pytest take it for a class of tests

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
        geometry = self.augmentation.draw(rgb.shape[:2], _rng(0, _AUGMENTATION, index))
        return {**sample, "image": image_to_tensor(transform_image(rgb, geometry))}


class BatchSampler:
    """Endless batches of (position, index), each from one group of images.

    Every epoch shows each image once, in an order drawn from (seed, epoch). A group's images
    are taken in that order, and a batch appears when its last image has come up; what is left of
    a group at the end of an epoch begins its next batch. Where the sequence stands at batch
    `start` follows from the groups' sizes by arithmetic, so that beginning late costs an epoch's
    order at most.
    """

    def __init__(
        self, groups: Sequence[int], *, batch_size: int, seed: int, start: int = 0
    ) -> None:
        if len(groups) == 0 or batch_size < 1 or start < 0:
            raise UserError(
                f"cannot batch {len(groups)} images by {batch_size} beginning with batch {start}."
            )
        self.groups = np.asarray(groups)
        self.batch_size = batch_size
        self.seed = seed
        self.start = start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # At the start of this epoch at most `start` batches have appeared: groups only hold
        # batches back.
        epoch = self.start * self.batch_size // len(self.groups)
        skip = self.start - self._num_batches_before(epoch)
        while True:
            batches = self._epoch_batches(epoch)
            yield from batches[skip:]
            skip = max(0, skip - len(batches))
            epoch += 1

    def _num_batches_before(self, epoch: int) -> int:
        sizes = np.unique(self.groups, return_counts=True)[1]
        return sum(epoch * int(size) // self.batch_size for size in sizes)

    def _epoch_batches(self, epoch: int) -> list[list[tuple[int, int]]]:
        """The batches that are filled in an epoch, in the order in which they are."""
        batches = []
        for group in np.unique(self.groups):
            stream = np.concatenate([self._left_over(epoch, group), self._stream(epoch, group)])
            whole = len(stream) // self.batch_size * self.batch_size
            batches.extend(stream[:whole].reshape(-1, self.batch_size, 2).tolist())
        batches.sort(key=lambda batch: batch[-1][0])
        return [[(position, index) for position, index in batch] for batch in batches]

    def _stream(self, epoch: int, group: int) -> np.ndarray:
        """Rows (position, index) of a group in the order of an epoch."""
        num_images = len(self.groups)
        order = _rng(self.seed, _ORDER, epoch).permutation(num_images)
        places = np.flatnonzero(self.groups[order] == group)
        return np.stack([epoch * num_images + places, order[places]], axis=1)

    def _left_over(self, epoch: int, group: int) -> np.ndarray:
        """The rows of a group from before an epoch that no batch before it has taken."""
        size = np.count_nonzero(self.groups == group)
        missing = epoch * size % self.batch_size
        parts: list[np.ndarray] = [np.empty((0, 2), dtype=np.int64)]
        while missing > 0:
            epoch -= 1
            parts.append(self._stream(epoch, group)[-missing:])
            missing -= len(parts[-1])
        return np.concatenate(parts[::-1])


def _rng(seed: int, family: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, family, number]))


def _describe(dataset: CocoDataset, image: ImageEntry) -> Sample:
    return {
        "dataset": dataset.name,
        "image_id": image["id"],
        "file_name": dataset.path(image),
        "height": image["height"],
        "width": image["width"],
    }


def _data_loader(cfg: Any, dataset: Dataset, **batching: Any) -> DataLoader:
    num_workers = cfg.DATALOADER.NUM_WORKERS
    return DataLoader(
        dataset,
        **batching,
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=outlive_signals,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available() and cfg.MODEL.DEVICE != "cpu",
        # Its own generator: the default takes a number from torch's global one, and later draws
        # would depend on that.
        generator=torch.Generator(),
    )


def _log_contents(dataset: CocoDataset, kept: np.ndarray) -> None:
    logger.info(
        "%s: %d of %d images are trained on; objects: %d, crowds: %d",
        dataset.name,
        np.count_nonzero(kept),
        len(dataset),
        dataset.num_trainable[kept].sum(),
        dataset.num_crowds,
    )
