"""The classes of the model of a run: from its checkpoint, its training set, or its weights."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from tensormask.checkpoint.files import get_description
from tensormask.config import CfgNode
from tensormask.data import CocoDataset
from tensormask.data.classes import (
    UNKNOWN,
    Classes,
    check_num_classes,
    list_names,
    match_dataset,
    matches_by_name,
    present_classes,
)
from tensormask.utils.errors import UserError

logger = logging.getLogger(__name__)


def stored_classes(cfg: CfgNode, content: dict[str, Any], source: str) -> Classes:
    """Return the classes in a checkpoint, without names if it has none.

    Args:
        content: of the file, as `read_checkpoint` returns it.
        source: the name of the file, for messages.

    Raises:
        UserError: `MODEL.TENSOR_MASK.NUM_CLASSES` is not their number.
    """
    stored = get_description(content)
    names = stored.get("class_names", [])
    if names:
        check_num_classes(cfg, names, source)
    elif matches_by_name(cfg):
        logger.info("%s has no class names: they are matched by position", source)
    return Classes(names, stored.get("category_ids", []), source)


def training_classes(
    cfg: CfgNode,
    datasets: Sequence[CocoDataset],
    test_sets: Sequence[CocoDataset],
    checkpoint: Mapping[str, Any] | None = None,
    *,
    maps_labels: bool = True,
) -> Classes:
    """Return the classes of the model of a run.

    A resumed run keeps the order of its checkpoint, if classes are matched by name. A new one has
    the order of the first training set; without any, that of the first test set with as many
    classes as the model.

    Args:
        datasets: those of `DATASETS.TRAIN`.
        test_sets: those of `DATASETS.TEST`.
        checkpoint: of the run to resume.
        maps_labels: whether the loader gives the model's labels; a user's own has those of the
            first training set.

    Raises:
        UserError: the training set has other classes than the checkpoint, or another number than
            `MODEL.TENSOR_MASK.NUM_CLASSES`; or another order, without `maps_labels`.
    """
    if checkpoint is not None:
        stored = stored_classes(cfg, dict(checkpoint), "the checkpoint")
        if stored.names and matches_by_name(cfg):
            if not datasets:
                return stored
            matched = match_dataset(cfg, datasets[0], stored, complete=True)
            if matched is not datasets[0] and not maps_labels:
                raise UserError(
                    f"{datasets[0].name} has the classes of the checkpoint in another order, and "
                    "train_loader has labels of its own: number the categories as before, "
                    f"{list_names(stored.names)}"
                )
            return stored._replace(category_ids=present_classes(matched)[1])
    for dataset in datasets[:1]:
        check_num_classes(cfg, dataset.class_names, dataset.name)
    for dataset in (*datasets[:1], *test_sets):
        if len(dataset.class_names) == cfg.MODEL.TENSOR_MASK.NUM_CLASSES:
            return Classes(*present_classes(dataset), dataset.name)
    return UNKNOWN
