"""Names of data sets, and the paths of their files."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from typing import Any

from tensormask.data import shapes
from tensormask.data.classes import shared_labels
from tensormask.data.coco import CocoDataset
from tensormask.data.formats.convert import ensure_converted
from tensormask.data.formats.yolo import SPLITS
from tensormask.utils.errors import UserError, nearest_name
from tensormask.utils.files import expand_home

logger = logging.getLogger(__name__)

# Annotations and images of each name, below `<data root>/coco`, as in detectron2.
_COCO_FILES = {
    "coco_2014_train": ("instances_train2014.json", "train2014"),
    "coco_2014_val": ("instances_val2014.json", "val2014"),
    "coco_2014_minival": ("instances_minival2014.json", "val2014"),
    "coco_2014_valminusminival": ("instances_valminusminival2014.json", "val2014"),
    "coco_2017_train": ("instances_train2017.json", "train2017"),
    "coco_2017_val": ("instances_val2017.json", "val2017"),
    "coco_2017_val_100": ("instances_val2017_100.json", "val2017"),
    "coco_2017_test": ("image_info_test2017.json", "test2017"),
    "coco_2017_test-dev": ("image_info_test-dev2017.json", "test2017"),
}
_SHAPES = {f"shapes_{split}": split for split in shapes.NUM_IMAGES}
# Annotations and images of each name, in the package (data/nuclei/README.md).
_NUCLEI_ROOT = Path(__file__).parent / "nuclei"
_NUCLEI_FILES = {f"nuclei_{split}": (f"{split}.json", split) for split in ("train", "val")}
_JSON_AT = re.compile(r"\.json@", re.IGNORECASE)  # of annotations.json@images
# data.yaml of YOLO, or a split of it, as data.yaml@val
_YAML_AT = re.compile(rf".+\.ya?ml(@(?P<split>{'|'.join(SPLITS)}))?", re.IGNORECASE)
_registered: dict[str, tuple[dict[str, Any], str, str]] = {}

_Key = tuple[str, str, str]  # name, annotations, folder of images
# The data sets in memory, the latest last, with the states of their file and folders.
_loaded: dict[_Key, tuple[CocoDataset, list[Any]]] = {}
_MAX_LOADED = 16
_fixed: ContextVar[dict[_Key, CocoDataset] | None] = ContextVar("fixed_datasets", default=None)
_SMALL_FILE, _SMALL_FOLDER = 1 << 20, 1000  # bytes, entries


def register_coco_instances(
    name: str,
    metadata: Mapping[str, Any],
    json_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
) -> None:
    """Register a data set in COCO's format under a name; its files are read at first use.

    Args:
        name: the name for `DATASETS.TRAIN` and `DATASETS.TEST`; if it is registered already, this
            set replaces the other one.
        metadata: may hold `thing_classes`, the class names in the order of the labels, of which the
            file can lack some; other entries are not used.
        json_file: the annotations.
        image_root: the folder that the annotations' `file_name` is relative to.

    Raises:
        ValueError: the name is one of the library's own.

    Example:
        >>> register_coco_instances("cells_train", {}, "cells/train.json", "cells/images")
    """
    entry = (dict(metadata), expand_home(json_file), expand_home(image_root))
    if name in _built_in_names():
        raise UserError(f"the data set name {name!r} is taken; register yours under another one.")
    if _registered.get(name, entry) != entry:
        logger.info("the data set %s is replaced: %s, images in %s", name, *entry[1:])
    _registered[name] = entry


def get_dataset(name: str, root: str | os.PathLike[str] | None = None) -> CocoDataset:
    """Return the data set of a name, which stays in memory.

    It is read again if its file, or the list of files in a folder of its images, has changed, but
    not within `fixed_datasets`. Data sets that were returned before stay as they are.

    Args:
        name: a registered name, one of COCO's (`coco_2017_val`), `shapes_train`, `shapes_val`,
            `shapes_512_train` or `shapes_512_val` (generated at first use), `nuclei_train` or
            `nuclei_val` (in the package), `path/to/annotations.json@path/to/images`, or a split of
            YOLO's `path/to/data.yaml@val`,
            which is converted beside the file, again when its labels have changed.
        root: the folder of COCO and shapes; default `$TENSORMASK_DATASETS`, else
            `$DETECTRON2_DATASETS`, else `./datasets`.

    Raises:
        ValueError: the name is unknown, or the file has classes that were not registered.
        FileNotFoundError: the annotations or the folder of images do not exist.
    """
    metadata, json_file, image_root = _locate(name, _data_root(root))
    dataset = _load(name, os.path.abspath(json_file), os.path.abspath(image_root))
    expected = list(metadata.get("thing_classes") or dataset.class_names)
    if expected == dataset.class_names:
        return dataset
    labels = [*shared_labels(expected, dataset.class_names).values()]
    if len(labels) < len(dataset.class_names):
        raise UserError(
            f"{name} was registered with the classes {expected}, but {json_file} has "
            f"{dataset.class_names}. Correct thing_classes or leave it out."
        )
    names, category_ids = dataset.class_names, dataset.category_ids
    return dataset.with_labels([names[i] for i in labels], [category_ids[i] for i in labels])


@contextmanager
def fixed_datasets() -> Iterator[None]:
    """Keep every data set as it is at its first use in the block, whatever happens to its files.

    So a run is not affected by annotations that are corrected, or half saved, in the meantime.
    """
    token = _fixed.set(dict(_fixed.get() or {}))
    try:
        yield
    finally:
        _fixed.reset(token)


def is_dataset_name(name: str) -> bool:
    """Return whether `get_dataset` knows the name; the files of the set may be missing."""
    known = name in _registered or name in _built_in_names()
    return known or bool(_JSON_AT.search(name)) or _yaml_split(name) is not None


def with_splits(train: Iterable[str], test: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the names of training and test sets; a `data.yaml` gets the split that it stands for.

    Example:
        >>> with_splits(["a/data.yaml"], ["a/data.yaml", "b/data.yaml@test", "shapes_val"])
        (['a/data.yaml@train'], ['a/data.yaml@val', 'b/data.yaml@test', 'shapes_val'])
    """
    train, test = (
        [f"{name}@{split}" if _yaml_split(name) == "" else name for name in names]
        for names, split in ((train, "train"), (test, "val"))
    )
    return train, test


def _yaml_split(name: str) -> str | None:
    """Return the split that a name ends with, "" for a `data.yaml` alone, None for other names."""
    match = None if name in _registered or _JSON_AT.search(name) else _YAML_AT.fullmatch(name)
    return None if match is None else match["split"] or ""


def _locate(name: str, root: Path) -> tuple[dict[str, Any], str | Path, str | Path]:
    """Return metadata, annotations and folder of images of a name."""
    if name in _SHAPES:
        return {}, *shapes.ensure_shapes(_SHAPES[name], root)
    if name in _NUCLEI_FILES:
        json_name, folder = _NUCLEI_FILES[name]
        return {}, _NUCLEI_ROOT / json_name, _NUCLEI_ROOT / folder
    if (split := _yaml_split(name)) is not None:
        return {}, *_locate_split(name, split)
    json_file: str | Path
    image_root: str | Path
    metadata: dict[str, Any] = {}
    hint = ""
    if name in _registered:
        metadata, json_file, image_root = _registered[name]
    elif name in _COCO_FILES:
        json_name, folder = _COCO_FILES[name]
        json_file, image_root = root / "coco" / "annotations" / json_name, root / "coco" / folder
        hint = (
            f" The data root is {root.absolute()}; set the environment variable "
            "TENSORMASK_DATASETS (or DETECTRON2_DATASETS) to the folder that holds coco/."
        )
    elif separator := _JSON_AT.search(name):
        json_file = expand_home(name[: separator.end() - 1])
        image_root = expand_home(name[separator.end() :])
    else:
        known = [*_registered, *_built_in_names()]
        raise UserError(
            f"unknown data set {name!r}; the nearest known name is {nearest_name(name, known)!r}. "
            f"Use one of {', '.join(known)}, or path/to/annotations.json@path/to/images, "
            "or a data.yaml of YOLO, or a name given to register_coco_instances."
        )
    for path, part in ((json_file, "annotations"), (image_root, "images")):
        if not Path(path).exists():
            raise FileNotFoundError(
                f"the {part} of {name} are not at {Path(path).absolute()}.{hint}"
            )
    return metadata, json_file, image_root


def _locate_split(name: str, split: str) -> tuple[str | Path, str | Path]:
    if not split:
        raise UserError(f"say which split of {name}: {', '.join(f'{name}@{s}' for s in SPLITS)}")
    for known, json_file, image_root in _fixed.get() or ():
        if known == name:  # not converted again during a run
            return json_file, image_root
    yaml_file = Path(expand_home(name.rpartition("@")[0]))
    if not yaml_file.is_file():
        raise FileNotFoundError(f"{yaml_file.absolute()} does not exist")
    return ensure_converted(yaml_file, split.lower())


def _built_in_names() -> list[str]:
    return [*_SHAPES, *_NUCLEI_FILES, *_COCO_FILES]


def _data_root(root: str | os.PathLike[str] | None) -> Path:
    variables = ("TENSORMASK_DATASETS", "DETECTRON2_DATASETS")
    given = [root, *(os.environ.get(variable) for variable in variables), "datasets"]
    return Path(expand_home(next(path for path in given if path)))


def _load(name: str, json_file: str, image_root: str) -> CocoDataset:
    key, fixed = (name, json_file, image_root), _fixed.get()
    if fixed is None:
        return _load_latest(key)
    if key not in fixed:
        fixed[key] = _load_latest(key)
    return fixed[key]


def _load_latest(key: _Key) -> CocoDataset:
    _, json_file, _ = key
    if key in _loaded:
        dataset, states = _loaded.pop(key)
        if states == _states([json_file, *dataset.image_folders]):
            _loaded[key] = dataset, states
            return dataset
        logger.info("%s or its images have changed: it is read again", json_file)
    states = _states([json_file])  # before the file is read: a later change is noticed
    dataset = CocoDataset(*key)
    _loaded[key] = dataset, states + _states(dataset.image_folders)
    for oldest in [*_loaded][:-_MAX_LOADED]:
        del _loaded[oldest]
    return dataset


def _states(paths: Iterable[str]) -> list[Any]:
    return [_state(path) for path in paths]


def _state(path: str) -> Any:
    """Return a value that changes with the content of a file, or the names in a folder.

    Time and size of a small file can stay the same when it is written again at once, and so can
    the time of a folder: the clocks of file systems have steps of milliseconds.
    """
    try:
        status = os.stat(path)
        if os.path.isdir(path):
            with os.scandir(path) as entries:
                names = [entry.name for entry in islice(entries, _SMALL_FOLDER + 1)]
            if len(names) <= _SMALL_FOLDER:
                return sorted(names)
        elif status.st_size <= _SMALL_FILE:
            return hashlib.sha256(Path(path).read_bytes()).digest()
    except OSError:  # missing, or not readable
        return None
    # `cp -p` gives a file the time of another one, but the time of its change is now.
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino
