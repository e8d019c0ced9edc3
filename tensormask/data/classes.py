"""Match the classes of a model with those of data sets and weights, by their names.

A label is an index in a model's list of names. The category ids of a COCO file can number the same
classes in another order, so each data set gets the labels of the model before they meet.
"""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tensormask.config import CfgNode
from tensormask.data.checks.issues import Identity
from tensormask.data.coco import CocoDataset
from tensormask.utils.errors import UserError

logger = logging.getLogger(__name__)

OVERRIDE = "DATASETS.MATCH_CLASSES position"
_NUM_LISTED = 10  # names in a message


class Classes(NamedTuple):
    """The classes of a model, by label.

    Attributes:
        names: empty if they are unknown: then data sets are matched by position.
        category_ids: the COCO ids, or empty.
        source: what has these classes, for messages: a checkpoint or a data set.
    """

    names: Sequence[str] = ()
    category_ids: Sequence[Identity] = ()
    source: str = "the model"


UNKNOWN = Classes()


def matches_by_name(cfg: CfgNode) -> bool:
    """Return whether `DATASETS.MATCH_CLASSES` is "name" and not "position".

    Raises:
        UserError: it is neither.
    """
    choice = cfg.DATASETS.MATCH_CLASSES
    if choice not in ("name", "position"):
        raise UserError(f"DATASETS.MATCH_CLASSES must be name or position, got {choice!r}")
    return choice == "name"


def stored_classes(cfg: CfgNode, stored: Mapping[str, Any], source: str) -> Classes:
    """Return the classes of a weights file, without names if it has none.

    Args:
        stored: as of `checkpoint.files.get_description`.
        source: the name of the file, for messages.

    Raises:
        UserError: `MODEL.TENSOR_MASK.NUM_CLASSES` is not their number.
    """
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
    stored: Classes = UNKNOWN,
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
        stored: the classes of the checkpoint to resume.
        maps_labels: whether the loader gives the model's labels; a user's own has those of the
            first training set.

    Raises:
        UserError: the training set has other classes than the checkpoint, or another number than
            `MODEL.TENSOR_MASK.NUM_CLASSES`; or another order, without `maps_labels`.
    """
    if stored.names and matches_by_name(cfg):
        if not datasets:
            return stored
        matched = match_dataset(cfg, datasets[0], stored, complete=True)
        if matched is not datasets[0] and not maps_labels:
            raise UserError(
                f"{datasets[0].name} has the classes of {stored.source} in another order, and "
                "train_loader has labels of its own: number the categories as before, "
                f"{list_names(stored.names)}"
            )
        return stored._replace(category_ids=present_classes(matched)[1])
    if datasets:
        check_num_classes(cfg, datasets[0].class_names, datasets[0].name)
    for dataset in (*datasets[:1], *test_sets):
        if len(dataset.class_names) == cfg.MODEL.TENSOR_MASK.NUM_CLASSES:
            return Classes(*present_classes(dataset), dataset.name)
    return UNKNOWN


def check_num_classes(cfg: CfgNode, names: Sequence[str], source: str) -> None:
    """Raise a UserError if `MODEL.TENSOR_MASK.NUM_CLASSES` is not the number of the names."""
    expected, given = len(names), cfg.MODEL.TENSOR_MASK.NUM_CLASSES
    if expected != given:
        raise UserError(
            f"{source} has {expected} classes, but MODEL.TENSOR_MASK.NUM_CLASSES is {given}. "
            f"Add the override: MODEL.TENSOR_MASK.NUM_CLASSES {expected}"
        )


def shared_labels(names: Sequence[str], others: Sequence[str]) -> dict[int, int]:
    """Return the label in `others` of each label in `names` whose class both have.

    A name that occurs twice in a list identifies no class, unless the lists are equal.

    Example:
        >>> shared_labels(["cat", "dog", "cow"], ["dog", "ant", "cat"])
        {0: 2, 1: 0}
    """
    if list(names) == list(others):
        return {label: label for label in range(len(names))}
    ours, theirs = _unique_names(names), _unique_names(others)
    return {label: theirs[name] for name, label in ours.items() if name in theirs}


def match_dataset(
    cfg: CfgNode, dataset: CocoDataset, classes: Classes, *, complete: bool = False
) -> CocoDataset:
    """Return a data set with the labels of a model.

    Args:
        cfg: `DATASETS.MATCH_CLASSES` matches classes by name or by position, and
            `MODEL.TENSOR_MASK.NUM_CLASSES` is the number of classes of a model without names.
        dataset: not changed.
        classes: of the model. Without names, the match is by position.
        complete: the data set must have all classes of the model, as in training; otherwise it can
            lack some.

    Returns:
        The data set itself if it has these labels, else `CocoDataset.with_labels`.

    Raises:
        UserError: the data set has classes that the model does not have, or lacks some although
            `complete`; or another number of classes to match by position.
    """
    names = dataset.class_names
    if not (matches_by_name(cfg) and classes.names):
        expected = len(classes.names) or cfg.MODEL.TENSOR_MASK.NUM_CLASSES
        if len(names) != expected:
            raise UserError(_different_numbers(dataset, classes, expected))
        return dataset
    if list(classes.names) == names:
        return dataset
    label_of = shared_labels(classes.names, names)
    if len(label_of) < len(names) or (complete and len(label_of) < len(classes.names)):
        raise UserError(_differences(classes, dataset))
    ids = dict(enumerate(dataset.category_ids))
    category_ids = [ids.get(label_of.get(label, -1)) for label in range(len(classes.names))]
    return dataset.with_labels(classes.names, category_ids)


def present_classes(dataset: CocoDataset) -> tuple[list[str], list[Identity]]:
    """Return names and category ids of the classes that a data set has, by ascending label."""
    pairs = zip(dataset.class_names, dataset.category_ids, strict=True)
    present = [(name, category) for name, category in pairs if category is not None]
    return [name for name, _ in present], [category for _, category in present]


def log_match(dataset: CocoDataset, matched: CocoDataset, classes: Classes) -> None:
    """Log how `match_dataset` has matched the classes of a data set, unless they are the same."""
    if matched is dataset:
        if classes.names and list(classes.names) != dataset.class_names:
            same = sorted(classes.names) == sorted(dataset.class_names)  # most likely a mistake
            logger.log(
                logging.WARNING if same else logging.INFO,
                "%s and %s have %s, %s and %s: they are matched by position",
                *(dataset.name, classes.source),
                "the same classes in different orders" if same else "different class names",
                *(list_names(dataset.class_names), list_names(classes.names)),
            )
        return
    present, _ = present_classes(matched)
    if present != dataset.class_names:
        logger.info(
            "%s and %s have their classes in different orders: labels are matched by name",
            *(dataset.name, classes.source),
        )
    if missing := [name for name in matched.class_names if name not in present]:
        logger.warning(
            "%s lacks %d of the %d classes of %s: %s. It is evaluated on the other %d; AP is their "
            "mean",
            *(dataset.name, len(missing), len(matched.class_names), classes.source),
            *(list_names(missing), len(present)),
        )


def list_names(names: Sequence[str]) -> str:
    """Return the first names as a text for messages, and the number of the others."""
    more = f" and {len(names) - _NUM_LISTED} more" if len(names) > _NUM_LISTED else ""
    return ", ".join(map(_quoted, names[:_NUM_LISTED])) + more


def spelling_hint(names: Sequence[str], others: Sequence[str]) -> str:
    """Name the first pair that differs only in case, spaces, "-", "_" or Unicode's form, or ""."""
    by_key = {_spelling(name): name for name in names}
    for other in others:
        if (name := by_key.get(_spelling(other))) is not None:
            looks_equal = unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", other)
            quote = ascii if looks_equal else _quoted
            return f"{quote(name)} and {quote(other)} differ only in their spelling"
    return ""


def _unique_names(names: Sequence[str]) -> dict[str, int]:
    counts = Counter(names)
    return {name: label for label, name in enumerate(names) if counts[name] == 1}


def _different_numbers(dataset: CocoDataset, classes: Classes, expected: int) -> str:
    """Say why a match by position is not possible, and what to do."""
    numbers = f"{dataset.name} has {len(dataset.class_names)} classes and the model has {expected}"
    if classes.names:
        return f"{numbers}: {OVERRIDE} needs equal numbers, and the same classes in the same order"
    return (
        f"{numbers}: {classes.source} has no class names, so they are matched by position, which "
        "needs equal numbers. Set MODEL.TENSOR_MASK.NUM_CLASSES to the number that the weights "
        "were trained with, and give a data set with the same classes in the same order"
    )


def _differences(classes: Classes, dataset: CocoDataset) -> str:
    """List the names of a model and of a data set that do not match, and what to do."""
    sides = [(classes.source, classes.names), (dataset.name, dataset.class_names)]
    ours, theirs = (dict.fromkeys(names) for _, names in sides)
    unmatched = [[n for n in ours if n not in theirs], [n for n in theirs if n not in ours]]
    lines = [f"{dataset.name} and {classes.source} have different classes."]
    for (source, names), own in zip(sides, unmatched, strict=True):
        only = f"; only there: {list_names(own)}" if 0 < len(own) < len(names) else ""
        lines.append(f"Classes of {source} ({len(names)}): {list_names(names)}{only}.")
    for source, names in sides:
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            lines.append(f"Several classes of {source} have the name {list_names(repeated)}.")
    if similar := spelling_hint(*unmatched):
        lines.append(f"{similar}.")
    lines.append("Correct the names, or the list of categories, in the annotations")
    if len(classes.names) == len(dataset.class_names):
        lines[-1] += f"; or, if the classes are the same in the same order, add {OVERRIDE}."
    else:
        lines[-1] += f" ({OVERRIDE} matches classes by their order, and needs equal numbers)."
    return " ".join(lines)


def _spelling(name: str) -> str:
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name).casefold())


def _quoted(name: str) -> str:
    return repr(name if len(name) <= 40 else f"{name[:37]}...")
