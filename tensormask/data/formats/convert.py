"""Convert the annotations of a data set to COCO's format; the images stay where they are."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycocotools import mask as mask_utils

from tensormask.data.checks.segmentation import segmentation_to_rle
from tensormask.data.formats import yolo
from tensormask.data.formats.cvat import is_cvat, read_cvat
from tensormask.data.formats.label_images import find_pairs, read_label_images
from tensormask.data.formats.labelme import is_labelme, read_labelme
from tensormask.data.formats.source import Source, SourceImage, files_below
from tensormask.data.formats.split import stratified_split
from tensormask.data.formats.voc import find_voc, read_voc
from tensormask.data.images import image_suffixes
from tensormask.utils.errors import UserError, unknown_name
from tensormask.utils.files import write_atomically

logger = logging.getLogger(__name__)

READERS: dict[str, Callable[[Path, Source], None]] = {
    "yolo": yolo.read_yolo,
    "voc": read_voc,
    "labelme": read_labelme,
    "cvat": read_cvat,
    "label-images": read_label_images,
}
_MADE_BY = "tensormask convert-data"
_BEGIN, _MAX_INFO = '{"info": ', 1 << 16  # of a file that was written here; characters
_NUM_OPENED = 20  # files of a suffix, to guess the format


@dataclass
class Converted:
    """What was written: per split, the name for `DATASETS.TRAIN` and the numbers."""

    source: Source
    names: dict[str, str] = field(default_factory=dict)
    num_images: dict[str, int] = field(default_factory=dict)
    num_objects: dict[str, Counter[str]] = field(default_factory=dict)  # by class


def guess_format(path: Path) -> str:
    """Return the format of a file or a folder.

    Raises:
        UserError: it is none or several; the message says what was seen.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    seen: dict[str, str] = {}
    folder = path if path.is_dir() else None
    files = [path] if folder is None else files_below(folder, [".json", ".xml", ".txt"])
    if found := yolo.find_evidence(path, files):
        seen["yolo"] = found.name if folder is None else os.path.relpath(found, folder)
    if folder is not None:
        if root := find_voc(folder):
            seen["voc"] = f"{os.path.relpath(root / 'SegmentationObject', folder)}/"
        if pairs := find_pairs(folder)[0]:
            image, labels = (os.path.relpath(p, folder) for p in pairs[0])
            seen["label-images"] = f"{image} with {labels}"
    for name, suffix, matches in (("labelme", ".json", is_labelme), ("cvat", ".xml", is_cvat)):
        candidates = [p for p in files if p.suffix.lower() == suffix][:_NUM_OPENED]
        if match := next((p for p in candidates if matches(p)), None):
            seen[name] = match.name if folder is None else os.path.relpath(match, folder)
    if len(seen) == 1:
        return next(iter(seen))
    choices = f"Give --format: {', '.join(READERS)}."
    if seen:
        several = "; ".join(f"{name} ({what})" for name, what in seen.items())
        raise UserError(f"{path} may be of several formats: {several}. {choices}")
    suffixes = Counter(p.suffix for p in sorted(path.rglob("*")) if p.is_file())
    listing = ", ".join(f"{num} {suffix or 'without'}" for suffix, num in suffixes.most_common(5))
    raise UserError(f"{path} has no known format; its files: {listing or path.name}. {choices}")


def convert(
    path: Path,
    format_name: str = "",
    *,
    output: Path | None = None,
    split: float | None = None,
    seed: int = 0,
    class_names: Sequence[str] = (),
    traced: bool = False,
) -> Converted:
    """Write `annotations_train.json`, ... of each split, or `annotations.json` if there is none.

    Args:
        path: the folder, or the file of a format that has one.
        format_name: a key of `READERS`; "" guesses it.
        output: the folder for the annotations; default beside the data.
        split: the share of the images for training; without it, the splits of the set are kept.
        class_names, traced: see `Source`.

    Raises:
        UserError: an invalid argument, no image can be used, or a file exists already that was not
            written here.
        OSError: a file cannot be read or written.
    """
    format_name = format_name or guess_format(path)
    if format_name not in READERS:
        raise UserError(unknown_name("a format", format_name, READERS))
    if split is not None and not 0 < split < 1:
        raise UserError(f"the share of training images is {split}; give more than 0, less than 1")
    folder = path if path.is_dir() else path.parent
    source = Source(folder, class_names, traced=traced)
    READERS[format_name](path, source)
    source.finish()
    if not source.images:
        raise UserError(f"{path} has no image that can be used\n{source.issues.table()}".strip())
    splits = _by_split(source, split, seed)
    output = folder if output is None else output
    converted = Converted(source)
    targets = {name: output / f"annotations{'_' * bool(name)}{name}.json" for name in splits}
    for target in targets.values():
        if target.exists() and not _is_ours(target):
            raise UserError(
                f"{target} exists, and is not from {_MADE_BY}: give another folder with --output"
            )
    output.mkdir(parents=True, exist_ok=True)
    for name, images in splits.items():
        root = common_folder(images, folder)
        write_coco(source, images, targets[name], root)
        converted.names[name] = f"{targets[name]}@{root}"
        converted.num_images[name] = len(images)
        converted.num_objects[name] = Counter(o.name for image in images for o in image.objects)
    return converted


def ensure_converted(yaml_file: Path, split: str) -> tuple[Path, Path]:
    """Convert a split of YOLO's `data.yaml` beside it, unless this is done and nothing has changed.

    Returns:
        The annotations in COCO's format and the folder of the images.

    Raises:
        UserError: the file is not YOLO's, it has no such split, or no image of it can be used.
        OSError: a file cannot be read or written.
    """
    yaml_file = Path(os.path.abspath(yaml_file))  # of which the state depends
    target = yaml_file.with_name(f"{yaml_file.stem}_{split}.coco.json")
    _, listed = yolo.read_yaml(yaml_file, [split])
    if not listed:
        raise UserError(f"{yaml_file} has no images for the split {split!r}")
    state = _state([yaml_file, *(image for image, _ in listed)])
    if (info := _info(target)).get("state") == state:
        return target, yaml_file.parent / info["image_root"]
    if target.exists() and not info:
        raise UserError(f"{target} exists, and is not from TensorMask: rename one of the files")
    source = Source(yaml_file.parent)
    yolo.read_yolo(yaml_file, source, [split])
    source.finish()
    if not source.images:
        raise UserError(f"no image of {yaml_file} can be used\n{source.issues.table()}")
    root = common_folder(source.images, yaml_file.parent)
    relative = os.path.relpath(root, yaml_file.parent)
    try:
        write_coco(source, source.images, target, root, {"state": state, "image_root": relative})
    except PermissionError:
        raise UserError(
            f"{target} cannot be written: convert the set with tensormask convert-data --output"
        ) from None
    for line in report(source):
        logger.warning("%s: %s", yaml_file, line)
    return target, root


def report(source: Source) -> list[str]:
    """Return the lines about what was left out, and the notes."""
    issues = [f"{len(source.issues)} issues:\n{source.issues.table()}"] * bool(source.issues)
    return issues + source.notes


def write_coco(
    source: Source,
    images: Sequence[SourceImage],
    json_file: Path,
    root: Path,
    info: dict[str, Any] | None = None,
) -> None:
    """Write images as a COCO file whose `file_name` is relative to `root`; ids count from 1."""
    category_ids = {name: number for number, name in enumerate(source.class_names, 1)}
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, 1):
        name = Path(os.path.relpath(image.path, root)).as_posix()
        (height, width) = image.size
        entries.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for found in image.objects:
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": category_ids[found.name],
                "bbox": [round(value, 3) for value in found.box],
                "iscrowd": 0,
            }
            if found.segmentation is None:
                annotation["area"] = found.box[2] * found.box[3]
            else:
                code = segmentation_to_rle(found.segmentation, image.size)
                annotation["area"] = int(mask_utils.area(code))
                annotation["segmentation"] = found.segmentation
            annotations.append(annotation)
    content = {
        "info": {"made_by": _MADE_BY, **(info or {})},
        "images": entries,
        "categories": [{"id": number, "name": name} for name, number in category_ids.items()],
        "annotations": annotations,
    }
    text = json.dumps(content, ensure_ascii=False)
    write_atomically(json_file, lambda file: file.write(text.encode("utf-8")))


def common_folder(images: Iterable[SourceImage], folder: Path) -> Path:
    """Return the folder that all images are in: `folder` if it is one, else the deepest one.

    Raises:
        UserError: there is none, as on two drives of Windows.
    """
    parents = {os.path.abspath(image.path.parent) for image in images}
    try:
        if os.path.commonpath([os.path.abspath(folder), *parents]) == os.path.abspath(folder):
            return folder
        return Path(os.path.commonpath(parents))
    except ValueError:
        raise UserError("the images are on several drives: copy them to one folder") from None


def _by_split(source: Source, split: float | None, seed: int) -> dict[str, list[SourceImage]]:
    images = source.images
    if split is not None:
        given = sorted({image.split for image in images} - {""})
        if given:
            source.notes.append(f"--split replaces the set's own splits: {', '.join(given)}.")
        classes = [{found.name for found in image.objects} for image in images]
        chosen = stratified_split(classes, split, seed)
        for image, is_training in zip(images, chosen, strict=True):
            image.split = "train" if is_training else "val"
    names = [name for name in ("", "train", "val", "test") if name in {i.split for i in images}]
    return {name: [image for image in images if image.split == name] for name in names}


def _state(paths: Iterable[Path]) -> str:
    """Return a hash of the paths, sizes and times of files and of their label files."""
    digest = hashlib.sha256()
    for path in paths:
        files = [path]
        if path.suffix.lower() in image_suffixes():
            files += [yolo.label_file_of(path), path.with_suffix(".txt")]
        for file in files:
            try:
                status = os.stat(file)
                text = f"{file}\0{status.st_size}\0{status.st_mtime_ns}"
            except OSError:
                text = f"{file}\0"
            digest.update(text.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _info(json_file: Path) -> dict[str, Any]:
    """Return what a file that was written here says of itself, or {}."""
    try:
        with open(json_file, encoding="utf-8") as file:
            head = file.read(_MAX_INFO)
        info, _ = json.JSONDecoder().raw_decode(head.removeprefix(_BEGIN))
    except (OSError, ValueError, RecursionError):
        return {}
    ours = isinstance(info, dict) and head.startswith(_BEGIN) and info.get("made_by") == _MADE_BY
    return info if ours else {}


def _is_ours(json_file: Path) -> bool:
    return bool(_info(json_file))
