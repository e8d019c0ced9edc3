"""Label images: for each image another one, in which each object has a number.

cellpose (`a_cp_masks.png`), StarDist (folders `images` and `masks`) and ImageJ write them as TIFF
or PNG of 16 bits.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from tensormask.data.formats.regions import number_image_to_rles
from tensormask.data.formats.source import Source, images_below, split_of
from tensormask.utils.errors import UserError, shorten

LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
_ENDINGS = (
    *("_cp_masks", "_masks", "_mask", "_labels", "_label", "_seg", "_instances", "_gt"),
    *("-masks", "-mask", "-labels", "-label"),
)
_LABEL_FOLDERS = ("masks", "mask", "labels", "label", "gt", "ground_truth", "annotations")
_IMAGE_FOLDERS = ("images", "image", "imgs", "img", "raw", "")
_IMAGE_ENDINGS = ("", "_img", "_image", "_raw")


def find_pairs(folder: Path) -> tuple[list[tuple[Path, Path]], list[Path], list[Path]]:
    """Return pairs of (image, label image) below a folder, label images alone, and images alone.

    The label image of `a.png` is `a_masks.png` beside it (also `_cp_masks`, `_mask`, `_label`,
    `_labels`, `_seg`, ...), or has its name, with or without such an ending, in a folder `masks`,
    `labels`, ... beside its folder, `images` or the like.
    """
    by_key: dict[tuple[Path, str], list[Path]] = {}  # by folder and stem
    files = images_below(folder)
    for path in files:
        by_key.setdefault((path.parent, path.stem), []).append(path)
    pairs, labels = [], set()
    for path in files:
        if path.suffix.lower() not in LABEL_SUFFIXES:
            continue
        in_labels = path.parent.name.lower() in _LABEL_FOLDERS
        ending = next((e for e in _ENDINGS if path.stem.lower().endswith(e)), "")
        if not ending and not in_labels:
            continue
        stems = [path.stem[: len(path.stem) - len(ending)]] + [path.stem] * in_labels
        places = [path.parent]
        if in_labels:
            names = [p for p in sorted(path.parent.parent.glob("*")) if p.is_dir()]
            places = [p for p in names if p.name.lower() in _IMAGE_FOLDERS] + [path.parent.parent]
        found = [
            image
            for place in places
            for stem in stems
            for ending in _IMAGE_ENDINGS
            for image in by_key.get((place, stem + ending), ())
            if image != path
        ]
        if found:
            pairs.append((found[0], path))
        labels.add(path)
    paired = {path for pair in pairs for path in pair}
    alone = [path for path in files if path not in paired]
    return pairs, [p for p in alone if p in labels], [p for p in alone if p not in labels]


def read_label_images(path: Path, source: Source) -> None:
    """Read the pairs of images below a folder; a folder `train` or `val` states a split.

    All objects are of one class, `source.class_names` or "object".

    Raises:
        UserError: there are no pairs, or more than one name.
    """
    names = source.class_names or ["object"]
    if len(names) > 1:
        raise UserError("label images have one class: give one name with --classes")
    source.class_names = names
    pairs, labels, rest = find_pairs(path) if path.is_dir() else ([], [], [])
    if not pairs:
        raise UserError(
            f"{path} has no pairs of images: the objects of a.png are numbered in a_masks.png "
            "beside it, or in masks/a.png beside images/a.png"
        )
    for image_path, label_path in pairs:
        where = source.where(label_path)
        try:
            numbers = read_numbers(label_path)
        except UserError as error:
            source.issues.add("file_malformed", where, str(error))
            continue
        size = (numbers.shape[0], numbers.shape[1])
        image = source.add_image(
            image_path, where, split=split_of(image_path, source.folder), size=size
        )
        if image is None:
            continue
        if numbers.min() < 0:
            source.issues.add("shape_malformed", where, "negative numbers, taken for background")
            numbers = numbers.clip(min=0)
        for number, rle in number_image_to_rles(numbers):
            source.add_object(image, names[0], [rle], f"{where}:{number}")
    for label_path in labels:
        source.issues.add("image_missing", source.where(label_path), "no image for these labels")
    for image_path in rest:
        source.issues.add("image_unlabeled", source.where(image_path))


def read_numbers(path: Path) -> np.ndarray:
    """Read an image whose values are numbers: int64 `(H, W)`, of a palette the indices.

    Raises:
        UserError: it cannot be read, or has colors, several pages, or values that are not whole.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=["PNG", "TIFF", "BMP", "GIF"]) as image:
                if (num_pages := getattr(image, "n_frames", 1)) > 1:
                    raise UserError(f"has {num_pages} pages, not one")
                if image.mode not in ("1", "L", "P", "I", "F") and image.mode[:2] != "I;":
                    raise UserError(f"has colors ({image.mode}), not one number a pixel")
                values = np.asarray(image)
    except UserError:
        raise
    except Exception as error:  # PIL fails in many ways on broken files
        raise UserError(f"cannot be read: {shorten(str(error))}") from None
    numbers = values.astype(np.int64)
    if values.dtype.kind == "f" and not np.array_equal(numbers, values):
        raise UserError("has values that are not whole numbers")
    return numbers
