"""Builds the loaders: batches of samples for training and evaluation."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tensormask.config import CfgNode
from tensormask.data.augmentation import build_test_transform, build_train_transform
from tensormask.data.catalog import get_dataset
from tensormask.data.classes import Classes, check_num_classes, log_match, match_dataset
from tensormask.data.coco import CocoDataset
from tensormask.data.prefetch import BatchLoader
from tensormask.data.samplers import BatchSampler, ShareSampler, repeat_factors
from tensormask.data.samples import Mapper, Sample, TestSet, TrainingSet
from tensormask.utils.errors import UserError, shorten

logger = logging.getLogger(__name__)

SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")


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
