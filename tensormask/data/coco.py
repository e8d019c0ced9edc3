"""`CocoDataset`: a data set in COCO's format, with its images, annotations and labels.

The file is read once and each entry is checked (`checks.annotations`). The valid entries are stored
in one packed buffer that worker processes share.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from tensormask.data.checks.annotations import (
    Annotation,
    ImageEntry,
    check_annotation,
    check_categories,
    check_images,
    is_trainable,
    sort_key,
)
from tensormask.data.checks.diagnosis import diagnose
from tensormask.data.checks.issues import Identity, IssueLog
from tensormask.data.checks.measurements import measure
from tensormask.data.checks.segmentation import segmentation_to_rle
from tensormask.data.images import ImageError, read_image
from tensormask.data.packed import PackedList
from tensormask.utils.errors import UserError
from tensormask.utils.files import expand_home

_JOIN_HINT = (
    "Were files joined without new ids? Before joining, add to `id` and `image_id` of each file a "
    "number larger than all ids of the files before it, also to the `id` of its annotations, and "
    "give categories of one name one id, and of different names different ids."
)


class CocoDataset:
    """The annotations of a COCO file and the folder of their images.

    Args:
        name: name of the set in configs and logs.
        json_file: the annotations.
        image_root: the folder that `file_name` is relative to.

    Attributes:
        name, json_file, image_root: as given.
        image_ids: ids of all images, ascending. The *index* of an image counts in this list.
        category_ids: the COCO id of each label; labels count from 0 in the order of the ids, or in
            that of `with_labels`, where None is a class that the file does not have.
        class_names: the name of each label.
        issues: the issues of the set that are known so far.
        diagnoses: what is wrong with the annotations as a whole; `whole_set` adds that of files.
        sizes: int32 `(N, 2)`, (height, width) of each image in pixels as the annotations state it.
        num_trainable: int32 `(N,)`, the number of objects of each image that can be trained on.
        has_file: bool `(N,)`, whether the image has a file to open.
        image_folders: the folders of the images' files.
        has_annotations: whether the file has any, valid or not; COCO's test sets have none.
        num_annotations: number of valid annotations, crowds included.
        num_crowds: number of crowds among them.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON, not in COCO's format, or has no valid image or category.
    """

    def __init__(
        self, name: str, json_file: str | os.PathLike[str], image_root: str | os.PathLike[str]
    ) -> None:
        json_file = expand_home(json_file)
        self.name = name
        self.json_file = Path(json_file)
        self.image_root = Path(expand_home(image_root))
        self.issues = IssueLog()
        content = _read_json(json_file)
        known_images = check_images(content["images"], self.issues)
        known_categories = check_categories(content["categories"], self.issues)
        images = {i: image for i, image in known_images.items() if image is not None}
        categories = {i: name for i, name in known_categories.items() if name is not None}
        for key, known, valid in (
            ("images", known_images, images),
            ("categories", known_categories, categories),
        ):
            if not valid:
                reason = f"no {key} with an id of their own.\n{_JOIN_HINT}"
                reason = reason if known else f"no valid {key}."
                raise UserError(
                    f"{os.fspath(json_file)} has {reason}\n{self.issues.table()}".strip()
                )
        self.image_ids: list[Identity] = sorted(images, key=sort_key)
        category_ids = sorted(categories, key=sort_key)
        self._set_labels([categories[i] for i in category_ids], category_ids)
        self._index_of = {image_id: index for index, image_id in enumerate(self.image_ids)}

        self.has_annotations = bool(content["annotations"])
        per_image: dict[Identity, list[Annotation]] = {image_id: [] for image_id in images}
        seen: set[Identity] = set()
        for number, entry in enumerate(content["annotations"]):
            annotation = check_annotation(
                entry, number, known_images, known_categories, self.issues
            )
            if annotation is not None:
                if annotation["id"] in seen:
                    self.issues.add("annotation_duplicate_id", annotation["id"])
                seen.add(annotation["id"])
                per_image[annotation["image_id"]].append(annotation)
        num_ambiguous = self.issues.counts["annotation_ambiguous"]
        if 2 * num_ambiguous > len(content["annotations"]):
            raise UserError(
                f"{os.fspath(json_file)}: {num_ambiguous} of {len(content['annotations'])} "
                f"annotations name an id that several images or categories have.\n{_JOIN_HINT}\n"
                f"{self.issues.table()}"
            )

        self.diagnoses = diagnose(measure(content["annotations"], known_images, known_categories))
        records = [(images[image_id], per_image[image_id]) for image_id in self.image_ids]
        if any(diagnosis.name == "areas_wrong" for diagnosis in self.diagnoses):
            for image, annotations in records:
                _set_areas_of_masks(annotations, (image["height"], image["width"]))
        self.sizes = np.array([(i["height"], i["width"]) for i, _ in records], dtype=np.int32)
        self.num_trainable = np.array(
            [sum(is_trainable(a, image) for a in annotations) for image, annotations in records],
            dtype=np.int32,
        )
        self.num_annotations = sum(len(annotations) for _, annotations in records)
        self.num_crowds = sum(a["iscrowd"] for _, annotations in records for a in annotations)
        self._records = PackedList(records)
        self.has_file = self._find_files([image for image, _ in records])

    def __len__(self) -> int:
        return len(self.image_ids)

    def with_labels(
        self, class_names: Sequence[str], category_ids: Sequence[Identity | None]
    ) -> CocoDataset:
        """Return this set with other labels: those of a model, say. All else is shared.

        Args:
            class_names, category_ids: by label; the ids are all of the set's, each once, and None
                for classes that it does not have.
        """
        dataset = copy.copy(self)
        dataset._set_labels(class_names, category_ids)
        return dataset

    def _set_labels(
        self, class_names: Sequence[str], category_ids: Sequence[Identity | None]
    ) -> None:
        self.class_names: list[str] = list(class_names)
        self.category_ids: list[Identity | None] = list(category_ids)
        self._label_of = {category: label for label, category in enumerate(category_ids)}

    def record(self, index: int) -> tuple[ImageEntry, list[Annotation]]:
        """Return `image` and `annotations` of the image with this index in `image_ids`."""
        return self._records[index]

    def image(self, image_id: Identity) -> ImageEntry:
        """Return `id`, `file_name`, `height` and `width` of an image, as the file states them."""
        return self.record(self._index_of[image_id])[0]

    def annotations(self, image_id: Identity) -> list[Annotation]:
        """Return the annotations of an image, crowds included (see `check_annotation`)."""
        return self.record(self._index_of[image_id])[1]

    def training_annotations(self, image_id: Identity) -> list[Annotation]:
        """Return the annotations that can be trained on: with valid box and mask, no crowds."""
        image, annotations = self.record(self._index_of[image_id])
        return [annotation for annotation in annotations if is_trainable(annotation, image)]

    def image_size(self, image_id: Identity) -> tuple[int, int]:
        """Return the (height, width) in pixels that the annotations state."""
        height, width = self.sizes[self._index_of[image_id]].tolist()
        return height, width

    def path(self, image: ImageEntry) -> str:
        """Return the full path of an image's entry."""
        return expand_home(os.path.join(self.image_root, image["file_name"]))

    def label_of(self, annotation: Annotation) -> int:
        """Return the contiguous label, from 0, of an annotation."""
        return self._label_of[annotation["category_id"]]

    def load(self, image_id: Identity) -> tuple[np.ndarray, list[Annotation]]:
        """Read an image, uint8 RGB `(H, W, 3)`, and return it with all of its annotations.

        Raises:
            ImageError: see `load_image`.
        """
        image, annotations = self.record(self._index_of[image_id])
        return self.load_image(image), annotations

    def load_image(self, image: ImageEntry) -> np.ndarray:
        """Read the image of an entry as uint8 RGB `(H, W, 3)`.

        Raises:
            ImageError: the file is missing or outside of the image root, is not an image, or has
                another size than the entry states; its `kind` tells which.
        """
        path = self.path(image)
        if not _is_inside(self.image_root, os.path.dirname(path)):
            raise ImageError("image_missing", path, f"is outside of {self.image_root}")
        rgb = read_image(path)
        (height, width), stated = rgb.shape[:2], (image["height"], image["width"])
        if (height, width) != stated:
            hint = ""
            if (width, height) == stated:
                hint = " (does an EXIF tag rotate it, which the annotations ignore?)"
            raise ImageError(
                "image_size",
                path,
                f"has {width} x {height} pixels (width x height), but the annotations of "
                f"{self.name} state {stated[1]} x {stated[0]}{hint}: correct them or the file",
            )
        return rgb

    def to_coco(self) -> COCO:
        """Return a new pycocotools object of the valid annotations, for scoring."""
        records = list(self._records)
        coco = COCO()
        coco.dataset = {
            "images": [image for image, _ in records],
            "categories": [
                {"id": category, "name": name}
                for category, name in zip(self.category_ids, self.class_names, strict=True)
                if category is not None
            ],
            "annotations": [a for _, annotations in records for a in annotations],
        }
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            coco.createIndex()
        return coco

    def _find_files(self, images: list[ImageEntry]) -> np.ndarray:
        """Return which images have a file in the image root, bool `(N,)`; the rest are issues."""
        has_file = np.zeros(len(images), dtype=bool)
        listings: dict[str, set[str]] = {}
        for index, image in enumerate(images):
            folder, name = os.path.split(self.path(image))
            if not _is_inside(self.image_root, folder):
                self.issues.add("image_missing", image["id"], "outside of the image root")
                continue
            # Listing a folder costs less than checking each of its files. But a file system may
            # accept a name in another spelling than its listing has, so the rest is checked.
            if folder not in listings:
                listings[folder] = _list_folder(folder)
            has_file[index] = name in listings[folder] or os.path.exists(self.path(image))
            if not has_file[index]:
                self.issues.add("image_missing", image["id"])
        self.image_folders = list(listings)
        return has_file


def _read_json(json_file: str | os.PathLike[str]) -> dict[str, list[Any]]:
    """Return the lists `images`, `categories` and `annotations`; the file may lack the last."""
    path = os.fspath(json_file)
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    if not isinstance(content, dict):
        hint = " (results instead of annotations?)" if isinstance(content, list) else ""
        raise UserError(
            f"{path} is not in COCO's format: it holds a {type(content).__name__}{hint}, not an "
            "object with images, annotations and categories."
        )
    content = {"annotations": [], **content}
    for key in ("images", "categories", "annotations"):
        if not isinstance(content.get(key), list):
            raise UserError(
                f"{path} is not in COCO's format: it has no list {key!r}, "
                f"its keys are {', '.join(sorted(map(repr, content)))[:200]}."
            )
    return content


def _set_areas_of_masks(annotations: list[Annotation], size: tuple[int, int]) -> None:
    """Replace `area`, which decides the COCO size of objects, by the number of mask pixels."""
    for annotation in annotations:
        annotation.pop("area", None)
        if annotation["segmentation"]:
            code = segmentation_to_rle(annotation["segmentation"], size)
            annotation["area"] = float(mask_utils.area(code))


def _is_inside(root: Path, folder: str) -> bool:
    """Return whether a folder is the root or below it by its path; links are followed."""
    root_path, folder = os.path.abspath(root), os.path.abspath(folder)
    return folder == root_path or folder.startswith(os.path.join(root_path, ""))


def _list_folder(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:  # missing or not readable
        return set()
