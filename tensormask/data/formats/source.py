"""What the readers of all formats fill: the images and objects of a data set, and their issues."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from tensormask.data.checks.annotations import is_text
from tensormask.data.checks.issues import IssueKind, IssueLog
from tensormask.data.checks.segmentation import polygon_issue, segmentation_to_rle
from tensormask.data.formats.regions import Polygon, Rle, as_json
from tensormask.data.images import ImageError, image_suffixes, upright_size
from tensormask.utils.errors import UserError, shorten

_LEFT_OUT = "left out"
KINDS = {
    "file_malformed": IssueKind("annotation file that cannot be read", _LEFT_OUT),
    "image_missing": IssueKind("no such file inside the folder", _LEFT_OUT),
    "image_broken": IssueKind("the file cannot be read as an image", _LEFT_OUT),
    "image_size": IssueKind("the image has another size than its annotations state", _LEFT_OUT),
    "image_duplicate": IssueKind("image that is annotated or listed again", "the first is used"),
    "image_unlabeled": IssueKind("image without annotations of its own", _LEFT_OUT),
    "class_unknown": IssueKind("class that has no name", _LEFT_OUT),
    "shape_malformed": IssueKind("shape that is not in the form of the format", _LEFT_OUT),
    "shape_unsupported": IssueKind("shape without an area, such as a point or a line", _LEFT_OUT),
    "shape_outside": IssueKind("shape outside of the image", _LEFT_OUT),
    "shape_beyond": IssueKind("shape that reaches more than a pixel beyond the image", "clipped"),
    "shape_empty": IssueKind("shape without a pixel", _LEFT_OUT),
    "shape_duplicate": IssueKind("shape that its image has twice", "the first is used"),
    "box_only": IssueKind("box without a mask", "only evaluated, not trained on"),
}

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SHORTEST = 0.001  # side of a box in pixels; the file has three decimals
_WHOLE = 0.02  # distance in pixels of a coordinate from a whole number that rounding explains


@dataclass
class SourceObject:
    """An object: its class, and its mask in COCO's form, or its box `[x, y, width, height]`."""

    name: str
    segmentation: list[Polygon] | Rle | None
    box: list[float]


@dataclass
class SourceImage:
    """An image, the split that the data set has it in ("" for none), and its objects."""

    path: Path
    size: tuple[int, int]  # (height, width), upright
    split: str
    objects: list[SourceObject] = field(default_factory=list)


class Source:
    """A data set that a reader fills. What is wrong is left out and counted.

    Args:
        folder: the folder of the data set. Images that its annotations name must be inside.
        class_names: names in the order of the labels, of a user; a reader may find others.
        traced: whether polygons were traced from masks: they run through the centers of the
            outermost pixels, which belong to the object (`cv2.findContours`). Otherwise
            coordinates are continuous, as in COCO: (0, 0) is the corner of the first pixel.

    Attributes:
        images: those that can be used.
        issues: the issues, by location, such as "labels/a.txt:3".
        notes: what else the user should know.
    """

    def __init__(
        self, folder: Path, class_names: Sequence[str] = (), *, traced: bool = False
    ) -> None:
        self.folder = folder
        self.class_names = list(class_names)
        self.traced = traced
        self.images: list[SourceImage] = []
        self.issues = IssueLog(KINDS)
        self.notes: list[str] = []
        self._paths: set[str] = set()
        self._keys: dict[int, set[str]] = {}  # by image, of its objects
        self._num_vertices, self._all_whole = 0, True

    def where(self, path: Path, number: int | str | None = None) -> str:
        """Return the location of an annotation for messages, such as "labels/a.txt:3"."""
        name = os.path.relpath(path, self.folder) if self._is_inside(path) else str(path)
        return name if number is None else f"{name}:{number}"

    def find_image(self, folders: Iterable[Path], name: str, where: str) -> Path | None:
        """Return the file that an annotation names, of the first of the folders that has it.

        Absolute paths, and those of another machine, are searched by their last part. None, and an
        issue, if there is none inside of the data set's folder.
        """
        relative = name.replace("\\", "/")
        is_absolute = relative.startswith("/") or re.match(r"[A-Za-z]:", relative)
        names = [relative.rpartition("/")[2]] if is_absolute else [relative]
        names += [relative.rpartition("/")[2]] * (".." in relative.split("/"))
        for folder in folders:
            for candidate in names if is_text(name) and "\0" not in name else []:
                path = Path(os.path.normpath(folder / candidate))
                if self._is_inside(path) and path.is_file():
                    return path
        self.issues.add("image_missing", where, shorten(name))
        return None

    def add_image(
        self, path: Path, where: str, *, split: str = "", size: Any = None
    ) -> SourceImage | None:
        """Add an image, or return None and count why it is left out.

        Args:
            size: (height, width) that the annotations state, of any type; None states nothing.
        """
        key = os.path.normpath(path.absolute())
        if key in self._paths:
            self.issues.add("image_duplicate", where, path.name)
            return None
        try:
            actual = upright_size(path)
        except ImageError as error:
            self.issues.add(error.kind, where, f"{path.name} {error.reason}")
            return None
        if size is not None and size != actual:
            reason = f"{actual[1]} x {actual[0]} px, not {size[1]} x {size[0]}"
            self.issues.add("image_size", where, reason)
            return None
        self._paths.add(key)
        image = SourceImage(path, actual, split)
        self.images.append(image)
        return image

    def add_object(
        self, image: SourceImage, name: Any, parts: Sequence[Polygon | Rle], where: str
    ) -> None:
        """Add an object of one or several parts, whose union is its mask.

        Args:
            name: its class, of any type.
            parts: polygons, valid or not, and valid RLEs of the image's size.
        """
        (height, width), valid = image.size, []
        masks = [segmentation_to_rle(part, image.size) for part in parts if isinstance(part, dict)]
        for polygon in parts:
            if isinstance(polygon, dict):
                continue
            if reason := polygon_issue(polygon, image.size):
                self.issues.add("shape_malformed", where, reason)
                continue
            (x0, y0), (x1, y1) = (f(polygon[0::2], polygon[1::2]) for f in (_lowest, _highest))
            if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
                self.issues.add("shape_outside", where)
                continue
            if min(x0, y0, width - x1, height - y1) < -1:
                self.issues.add("shape_beyond", where)
            valid.append([float(x) for x in polygon])
            self._num_vertices += len(polygon) // 2
            whole = all(abs(x - round(x)) < _WHOLE for x in polygon)
            self._all_whole &= whole and x1 < width - 0.5 and y1 < height - 0.5
        if not valid and not masks:
            return
        as_mask = bool(masks) or self.traced
        masks += [self._rasterize(polygons, image.size) for polygons in [valid] if polygons]
        code = mask_utils.merge(masks)
        x0, y0, w, h = mask_utils.toBbox(code).tolist()
        if not as_mask:
            xs, ys = (np.concatenate([p[axis::2] for p in valid]) for axis in (0, 1))
            left, right = max(xs.min(), 0), min(xs.max(), width)
            top, bottom = max(ys.min(), 0), min(ys.max(), height)
            if min(right - left, bottom - top) >= _SHORTEST:  # else the pixels are the box
                x0, y0, w, h = left, top, right - left, bottom - top
        mask = as_json(code) if as_mask else valid
        if self._is_new(image, name, mask, code, where):
            box = [float(v) for v in (x0, y0, w, h)]
            image.objects.append(SourceObject(name, mask, box))

    def add_box(self, image: SourceImage, name: Any, corners: Sequence[float], where: str) -> None:
        """Add an object that has only a box, of which (x0, y0, x1, y1) are given in pixels."""
        (height, width), (x0, y0, x1, y1) = image.size, corners
        if not np.isfinite(corners).all() or x1 < x0 or y1 < y0:
            self.issues.add("shape_malformed", where, "not a box")
            return
        if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
            self.issues.add("shape_outside", where)
            return
        if min(x0, y0, width - x1, height - y1) < -1:
            self.issues.add("shape_beyond", where)
        x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
        box = [float(v) for v in (x0, y0, x1 - x0, y1 - y0)]
        if min(box[2:]) < _SHORTEST:
            self.issues.add("shape_empty", where)
        elif self._is_new(image, name, box, None, where):
            self.issues.add("box_only", where)
            image.objects.append(SourceObject(name, None, box))

    def finish(self) -> None:
        """Sort images and classes, such that the result does not depend on the file system.

        Raises:
            UserError: a class has no valid name.
        """
        self.images.sort(key=lambda image: image.path.as_posix())
        used = {found.name for image in self.images for found in image.objects}
        if invalid := [name for name in self.class_names if not is_text(name)]:
            raise UserError(f"{shorten(repr(invalid[0]))} is not a name of a class")
        if repeated := sorted(n for n, num in Counter(self.class_names).items() if num > 1):
            self.notes.append(f"Several classes of one name become one: {', '.join(repeated)}.")
            self.class_names = [*dict.fromkeys(self.class_names)]
        self.class_names += sorted(used - set(self.class_names))
        if self._all_whole and self._num_vertices >= 100 and not self.traced:
            self.notes.append(
                f"All {self._num_vertices} points of the polygons are whole pixels. If they were "
                "traced from masks (cv2.findContours), convert with --traced: without it, each "
                "object loses its outermost pixels."
            )

    def _is_new(
        self, image: SourceImage, name: Any, shape: Any, code: Rle | None, where: str
    ) -> bool:
        if not is_text(name):
            self.issues.add("class_unknown", where, f"a {type(name).__name__}")
            return False
        if code is not None and not mask_utils.area(code):
            self.issues.add("shape_empty", where)
            return False
        keys = self._keys.setdefault(id(image), set())
        key = json.dumps([name, shape])
        if key in keys:
            self.issues.add("shape_duplicate", where)
        is_new = key not in keys
        keys.add(key)
        return is_new

    def _rasterize(self, polygons: list[Polygon], size: tuple[int, int]) -> Rle:
        if not self.traced:
            return segmentation_to_rle(polygons, size)
        mask = np.zeros(size, np.uint8)
        for polygon in polygons:
            cv2.fillPoly(mask, [np.rint(polygon).astype(np.int32).reshape(-1, 1, 2)], 1)
        return mask_utils.encode(np.asfortranarray(mask))

    def _is_inside(self, path: Path) -> bool:
        root, absolute = os.path.abspath(self.folder), os.path.abspath(path)
        return absolute == root or absolute.startswith(os.path.join(root, ""))


def files_below(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """Return the files below a folder with one of the suffixes, sorted.

    Hidden files and folders are ignored. Links to folders are followed, each folder once.
    """
    wanted, found = frozenset(suffixes), list[Path]()
    pending, visited = [folder], set[str]()
    while pending:  # links last: files inside of the folder have their own paths
        for parent, folders, names in os.walk(pending.pop(0)):
            target = os.path.realpath(parent)
            is_new = target not in visited
            visited.add(target)
            folders[:] = sorted(n for n in folders if is_new and not n.startswith("."))
            pending += [Path(parent, n) for n in folders if os.path.islink(Path(parent, n))]
            found += [
                Path(parent, name)
                for name in names
                if is_new and Path(name).suffix.lower() in wanted and not name.startswith(".")
            ]
    return sorted(found)


def images_below(folder: Path) -> list[Path]:
    """Return the files below a folder that have the suffix of an image, sorted."""
    return files_below(folder, image_suffixes())


def split_of(path: Path, folder: Path) -> str:
    """Return "train", "val" or "test" if a folder between `folder` and the file is one, else "".

    Example:
        >>> split_of(Path("set/Valid/images/a.png"), Path("set"))
        'val'
    """
    parts = path.relative_to(folder).parts[:-1]
    return next((_SPLITS[part.lower()] for part in parts if part.lower() in _SPLITS), "")


def split_named(name: str) -> str:
    """Return the split of a name such as "Validation", or ""."""
    return _SPLITS.get(name.lower(), "")


def _lowest(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    return min(xs), min(ys)


def _highest(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    return max(xs), max(ys)
