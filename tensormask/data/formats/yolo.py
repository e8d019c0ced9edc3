"""YOLO's segmentation format: a `data.yaml`, and a text file of normalized polygons per image."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from tensormask.data.formats.source import (
    Source,
    SourceImage,
    images_below,
    split_named,
    split_of,
)
from tensormask.utils.errors import UserError, shorten
from tensormask.utils.files import expand_home, read_text

YAML_SUFFIXES = (".yaml", ".yml")
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_NAME_FILES = ("classes.txt", "obj.names", "labels/classes.txt")


def find_yaml(path: Path) -> Path | None:
    """Return the `data.yaml` of a set: the path itself, or the only file of its kind inside."""
    if path.is_file():
        return path if path.suffix.lower() in YAML_SUFFIXES else None
    named = [path / f"data{suffix}" for suffix in YAML_SUFFIXES]
    found = [p for p in named if p.is_file()] or [
        p for p in sorted(path.iterdir()) if p.suffix.lower() in YAML_SUFFIXES and _is_set(p)
    ]
    return found[0] if len(found) == 1 else None


def find_evidence(path: Path, files: Iterable[Path]) -> Path | None:
    """Return a file that shows that a set is YOLO's: its `data.yaml`, names or labels, or None.

    `files` are the text files, among others, of the folder.
    """
    texts = [file for file in files if file.suffix.lower() == ".txt"]
    labels = (file for file in texts if "labels" in (file.parent.name, file.parent.parent.name))
    return find_yaml(path) or _names_file(path) or next(labels, None)


def read_yolo(path: Path, source: Source, splits: Sequence[str] = tuple(SPLITS)) -> None:
    """Read a `data.yaml`, the folder of one, or a folder with `images` and `labels`.

    The labels of `images/a.jpg` are in `labels/a.txt`, or beside the image. An image without labels
    has no objects. Without a `data.yaml`, the names of the classes are in `classes.txt`, and a
    folder `train` or `val` states a split.

    Args:
        path: the file or the folder.
        source: receives the images.
        splits: of "train", "val" and "test", those to read of a `data.yaml`.

    Raises:
        UserError: the file is not such a file, or there are no names.
    """
    yaml_file = find_yaml(path)
    images: list[tuple[Path, str]] = []
    if yaml_file is not None:
        names, images = read_yaml(yaml_file, splits)
    elif path.is_dir():
        names = _read_names(path, source)
    else:
        raise UserError(f"{path} is neither a data.yaml of YOLO nor a folder")
    if not images and path.is_dir():  # supervision's data.yaml has only names
        images = [(image, split_of(image, path)) for image in images_below(path)]
    source.class_names = [names[number] for number in sorted(names)]
    num_unlabeled = 0
    for image_path, split in images:
        image = source.add_image(image_path, source.where(image_path), split=split)
        if image is None:
            continue
        label_file = _label_file(image_path)
        if label_file is None:
            num_unlabeled += 1
            continue
        try:
            lines = read_text(label_file).splitlines()
        except UserError as error:
            source.issues.add("file_malformed", source.where(label_file), str(error))
            continue
        for number, line in enumerate(lines, 1):
            if line.strip():
                _read_line(source, image, line, names, source.where(label_file, number))
    if num_unlabeled:
        source.notes.append(f"{num_unlabeled} images have no label file, thus no objects.")


def read_yaml(path: Path, splits: Sequence[str]) -> tuple[dict[int, str], list[tuple[Path, str]]]:
    """Return the names of the classes by number, and the images with their splits.

    Nothing is executed or downloaded. Of a split that is left out of the file there are no images.

    Raises:
        UserError: the file is not YOLO's, or names files that do not exist.
    """
    content = _load_yaml(path)
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise UserError(f"{path} has no `names` of classes, a list or number: name")
    by_number: dict[int, str] = {}
    for number, name in names.items():
        is_name = isinstance(name, str | int | float) and not isinstance(name, bool) and name != ""
        if not str(number).isdecimal() or not is_name:
            raise UserError(
                f"{path}: `names` is a list, or number: name; names such as yes or null need quotes"
            )
        by_number[int(number)] = str(name)
    if "kpt_shape" in content:
        raise UserError(f"{path} is a set of keypoints (kpt_shape), which are no masks")
    found = []
    for split in splits:
        values: Any = next((content[key] for key in SPLITS[split] if content.get(key)), [])
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str) or "\0" in value:
                raise UserError(f"{path}: {split} is neither a path nor a list of paths")
            found += [(image, split) for image in _images_at(path, content, value)]
    return by_number, found


def _images_at(yaml_file: Path, content: dict[str, Any], value: str) -> Iterator[Path]:
    """Yield the images of a folder, of a text file that lists them, or the image itself."""
    folder = content.get("path") or ""
    bases = [yaml_file.parent]
    if isinstance(folder, str) and "\0" not in folder:
        bases.insert(0, yaml_file.parent / expand_home(folder))
    # Roboflow writes ../train/images beside the folder `train`.
    candidates = [base / v for base in bases for v in (expand_home(value), value.lstrip("./"))]
    location = next((Path(os.path.normpath(p)) for p in candidates if p.exists()), None)
    if location is None:
        raise UserError(f"{yaml_file}: {shorten(value)} does not exist: {candidates[0]}")
    if location.is_dir():
        yield from images_below(location)
    elif location.suffix.lower() == ".txt":
        for line in read_text(location).splitlines():
            if name := line.strip():
                beside = location.parent / name.removeprefix("./")
                first = [beside, *(base / name for base in bases)]
                yield next((Path(os.path.normpath(p)) for p in first if p.is_file()), beside)
    else:
        yield location


def label_file_of(image: Path) -> Path:
    """Return where YOLO has the labels of an image: of the last folder `images`, in `labels`.

    Example:
        >>> label_file_of(Path("images/train/a.jpg")).as_posix()
        'labels/train/a.txt'
    """
    parts = list(image.parent.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts, f"{image.stem}.txt")


def _label_file(image: Path) -> Path | None:
    candidates = (label_file_of(image), image.with_suffix(".txt"))
    return next((path for path in candidates if path.is_file()), None)


def _read_line(
    source: Source, image: SourceImage, line: str, names: dict[int, str], where: str
) -> None:
    try:
        number, *values = map(float, line.split())
    except ValueError:
        hint = " (decimal commas? use points)" if "," in line else ""
        source.issues.add("shape_malformed", where, f"not numbers{hint}: {shorten(line, 40)}")
        return
    name = names.get(int(number)) if number.is_integer() else None
    if name is None:
        source.issues.add("class_unknown", where, f"{number:g}")
        return
    height, width = image.size
    if any(not abs(value) <= 2 for value in values):
        source.issues.add("shape_malformed", where, "not normalized: coordinates are from 0 to 1")
    elif len(values) == 4:
        x, y, w, h = values[0] * width, values[1] * height, values[2] * width, values[3] * height
        source.add_box(image, name, (x - w / 2, y - h / 2, x + w / 2, y + h / 2), where)
    else:
        # Normalized to a few decimals, coordinates of COCO (2 decimals) are not exact any more, and
        # a tie in rasterizing is decided the other way.
        scaled = [round(value * (width, height)[i % 2], 2) for i, value in enumerate(values)]
        source.add_object(image, name, [scaled], where)


def _read_names(folder: Path, source: Source) -> dict[int, str]:
    names = source.class_names
    if not names:
        found = _names_file(folder)
        if found is None:
            raise UserError(
                f"{folder} has no data.yaml and no classes.txt: give the names of the classes "
                "with --classes"
            )
        names = [line.strip() for line in read_text(found).splitlines() if line.strip()]
    return dict(enumerate(names))


def _names_file(folder: Path) -> Path | None:
    return next((folder / name for name in _NAME_FILES if (folder / name).is_file()), None)


def _is_set(path: Path) -> bool:
    try:
        content = _load_yaml(path)
    except UserError:
        return False
    return "names" in content and any(split_named(str(key)) for key in content)


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not YAML: {shorten(reason)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a data.yaml of YOLO: it holds no keys")
    return content
