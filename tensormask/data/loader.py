"""Batches for training and evaluation.

All randomness of training is a function of (seed, position): `position` counts the pictures shown
since the first iteration. So a batch does not depend on the number of workers, and a resumed run
continues with the batches that it would have had.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .catalog import get_dataset
from .coco import CocoDataset
from .transforms import (
    Augmentation,
    build_test_transform,
    build_train_transform,
    image_to_tensor,
    transform_annotations,
    transform_image,
)

logger = logging.getLogger(__name__)

Sample = dict[str, Any]
# Families of random streams of one seed: the order of an epoch, the augmentation of a sample.
_ORDER, _AUGMENTATION = 0, 1


def build_train_loader(cfg: Any, start_iteration: int = 0) -> Iterator[list[Sample]]:
    """Training batches from `DATASETS.TRAIN` without end, from number `start_iteration` on.

    Each batch is a list of `SOLVER.IMS_PER_BATCH` samples (see `TrainingSet`) and depends on
    `SEED` and its number alone.

    Raises:
        ValueError: the seed is negative (draw one first), there is nothing to train on, or the
            classes of the sets differ from each other or from `MODEL.TENSOR_MASK.NUM_CLASSES`.
    """
    if cfg.SEED < 0:
        raise ValueError(f"SEED is {cfg.SEED}; the loader needs a drawn seed, 0 or more.")
    datasets = [get_dataset(name) for name in cfg.DATASETS.TRAIN]
    if not datasets:
        raise ValueError(
            "DATASETS.TRAIN is empty; name a set, as in DATASETS.TRAIN \"('shapes_train',)\"."
        )
    for dataset in datasets:
        check_num_classes(cfg, dataset)
        if dataset.class_names != datasets[0].class_names:
            raise ValueError(
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
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        seed=cfg.SEED,
        start=start_iteration,
    )
    return iter(_data_loader(cfg, training_set, batch_sampler=sampler))


def build_test_loader(cfg: Any, dataset: CocoDataset) -> DataLoader:
    """All pictures of a set in the order of `image_ids`, in lists of one sample without target."""
    check_num_classes(cfg, dataset)
    return _data_loader(cfg, TestSet(dataset, build_test_transform(cfg)), batch_size=1)


def check_num_classes(cfg: Any, dataset: CocoDataset) -> None:
    """Raises ValueError if the model of a config has another number of classes than a data set."""
    expected, given = len(dataset.class_names), cfg.MODEL.TENSOR_MASK.NUM_CLASSES
    if expected != given:
        raise ValueError(
            f"{dataset.name} has {expected} classes, but MODEL.TENSOR_MASK.NUM_CLASSES is {given}. "
            f"Add the override: MODEL.TENSOR_MASK.NUM_CLASSES {expected}"
        )


class TrainingSet(Dataset):
    """Augmented samples of one or more data sets.

    Indexed by (position, picture): `picture` counts through the sets one after the other,
    `position` seeds the augmentation. A sample is a dict of

        image: uint8 tensor (3, H, W), RGB
        target: boxes (K, 4) float32, (x0, y0, x1, y1) in pixels; labels (K,) int64 from 0; masks
            (K, H, W) bool
        image_id: int
        file_name: the full path
        height, width: the original picture's, in pixels
    """

    def __init__(
        self,
        datasets: Sequence[CocoDataset],
        augmentation: Augmentation,
        *,
        seed: int,
        filter_empty: bool = True,
    ) -> None:
        self.augmentation = augmentation
        self.seed = seed
        self.pictures: list[tuple[CocoDataset, int]] = []
        for dataset in datasets:
            image_ids = dataset.image_ids
            if filter_empty:
                image_ids = [i for i in image_ids if dataset.training_annotations(i)]
            self.pictures.extend((dataset, image_id) for image_id in image_ids)
            _log_contents(dataset, len(image_ids))
        if not self.pictures:
            raise ValueError(
                f"there is nothing to train on in {', '.join(d.name for d in datasets)}: "
                "no picture has an object that is no crowd, with a box and a mask."
            )
        self._said_gone = False

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        position, picture = key
        dataset, image_id = self.pictures[picture]
        image, _ = dataset.load(image_id)
        annotations = dataset.training_annotations(image_id)
        geometry = self.augmentation.draw(image.shape[:2], _rng(self.seed, _AUGMENTATION, position))
        labels = [dataset.label_of(annotation) for annotation in annotations]
        sample = _sample(dataset, image_id, image, transform_image(image, geometry))
        sample["target"] = transform_annotations(annotations, labels, geometry)
        self._say_gone(sample, len(annotations) - len(sample["target"]["labels"]))
        return sample

    def aspect_groups(self) -> list[int]:
        """The group of each picture: 0 if it is wider than high, else 1."""
        sizes = (dataset.image_size(image_id) for dataset, image_id in self.pictures)
        return [0 if width > height else 1 for height, width in sizes]

    def _say_gone(self, sample: Sample, num_gone: int) -> None:
        """Says once in each process that objects were too small for the training size."""
        if num_gone and not self._said_gone:
            self._said_gone = True
            logger.warning(
                "%d objects of %s are left out: box or mask is empty at size %s (height, width). "
                "Further ones are left out without a line.",
                num_gone,
                sample["file_name"],
                tuple(sample["image"].shape[1:]),
            )


class TestSet(Dataset):
    """Pictures of a data set at the test size; samples as in `TrainingSet`, without `target`."""

    __test__ = False  # the name makes pytest take it for a class of tests

    def __init__(self, dataset: CocoDataset, augmentation: Augmentation) -> None:
        self.dataset = dataset
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        image_id = self.dataset.image_ids[index]
        image, _ = self.dataset.load(image_id)
        geometry = self.augmentation.draw(image.shape[:2], _rng(0, _AUGMENTATION, index))
        return _sample(self.dataset, image_id, image, transform_image(image, geometry))


class BatchSampler:
    """Endless batches of (position, picture), each from one group of pictures.

    Every epoch shows each picture once, in an order drawn from (seed, epoch). A group's pictures
    are taken in that order, and a batch appears when its last picture has come up; what is left of
    a group at the end of an epoch begins its next batch. Where the sequence stands at batch
    `start` follows from the groups' sizes by arithmetic, so that beginning late costs an epoch's
    order at most.
    """

    def __init__(
        self, groups: Sequence[int], *, batch_size: int, seed: int, start: int = 0
    ) -> None:
        if len(groups) == 0 or batch_size < 1 or start < 0:
            raise ValueError(
                f"cannot batch {len(groups)} pictures by {batch_size} beginning with batch {start}."
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
        return [[(position, picture) for position, picture in batch] for batch in batches]

    def _stream(self, epoch: int, group: int) -> np.ndarray:
        """Rows (position, picture) of a group in the order of an epoch."""
        num_pictures = len(self.groups)
        order = _rng(self.seed, _ORDER, epoch).permutation(num_pictures)
        places = np.flatnonzero(self.groups[order] == group)
        return np.stack([epoch * num_pictures + places, order[places]], axis=1)

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


def _sample(dataset: CocoDataset, image_id: int, original: np.ndarray, image: np.ndarray) -> Sample:
    return {
        "image": image_to_tensor(image),
        "image_id": image_id,
        "file_name": dataset.file_name(image_id),
        "height": original.shape[0],
        "width": original.shape[1],
    }


def _data_loader(cfg: Any, dataset: Dataset, **batching: Any) -> DataLoader:
    num_workers = cfg.DATALOADER.NUM_WORKERS
    return DataLoader(
        dataset,
        **batching,
        num_workers=num_workers,
        collate_fn=list,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        # Its own generator: the default takes a number from torch's global one, and later draws
        # would depend on that.
        generator=torch.Generator(),
    )


def _log_contents(dataset: CocoDataset, num_kept: int) -> None:
    left_out = dataset.count_untrainable()
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
    logger.info(
        "%s: %d of %d pictures are trained on; annotations left out: %s.",
        dataset.name,
        num_kept,
        len(dataset),
        reasons or "none",
    )
