"""Data sets in COCO's format: pictures, annotations, contiguous labels, segmentations."""

from __future__ import annotations

import contextlib
import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from .images import read_image
from .segmentation import usable_polygons

Annotation = dict[str, Any]


class CocoDataset:
    """Annotations in COCO's format and the folder of their pictures.

    Attributes:
        name: what the set is called in configs and logs.
        coco: the loaded annotations, as pycocotools' evaluation wants them.
        image_root: the folder that `file_name` is relative to.
        image_ids: ids of all pictures, ascending.
        category_ids: the COCO id of each label; labels count from 0 in the order of the ids.
        class_names: the name of each label.
    """

    def __init__(
        self, name: str, json_file: str | os.PathLike[str], image_root: str | os.PathLike[str]
    ):
        self.name = name
        self.image_root = Path(image_root)
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            self.coco = COCO(os.fspath(json_file))
        self.image_ids: list[int] = sorted(self.coco.imgs)
        self.category_ids: list[int] = sorted(self.coco.cats)
        self.class_names: list[str] = [self.coco.cats[i]["name"] for i in self.category_ids]
        self._label_of = {category: label for label, category in enumerate(self.category_ids)}

    def __len__(self) -> int:
        return len(self.image_ids)

    def image_size(self, image_id: int) -> tuple[int, int]:
        """(height, width) in pixels, as the annotations state it."""
        image = self.coco.imgs[image_id]
        return image["height"], image["width"]

    def file_name(self, image_id: int) -> str:
        """The full path of a picture."""
        return str(self.image_root / self.coco.imgs[image_id]["file_name"])

    def label_of(self, annotation: Annotation) -> int:
        """The contiguous label, from 0, of an annotation."""
        return self._label_of[annotation["category_id"]]

    def annotations(self, image_id: int) -> list[Annotation]:
        """All annotations of a picture as they stand in the file, crowds too."""
        return self.coco.imgToAnns.get(image_id, [])

    def training_annotations(self, image_id: int) -> list[Annotation]:
        """The annotations that can be trained on; `count_untrainable` tells what is left out."""
        return [a for a in self.annotations(image_id) if self._why_untrainable(a) is None]

    def count_untrainable(self) -> Counter[str]:
        """How many annotations training leaves out, by reason."""
        reasons = (
            self._why_untrainable(annotation)
            for image_id in self.image_ids
            for annotation in self.annotations(image_id)
        )
        return Counter(reason for reason in reasons if reason is not None)

    def load(self, image_id: int) -> tuple[np.ndarray, list[Annotation]]:
        """Reads a picture.

        Returns:
            The picture, uint8 RGB `(H, W, 3)`, and all annotations of it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the picture has another size than the annotations state.
        """
        path = self.file_name(image_id)
        image = read_image(path)
        (height, width), (stated_height, stated_width) = image.shape[:2], self.image_size(image_id)
        if (height, width) != (stated_height, stated_width):
            raise ValueError(
                f"{path} is {width} x {height} pixels (width x height), but the annotations of "
                f"{self.name} say {stated_width} x {stated_height}. "
                "Correct the annotations or the file."
            )
        return image, self.annotations(image_id)

    def _why_untrainable(self, annotation: Annotation) -> str | None:
        """Detectron2's rules: no crowd, a box with an area, a polygon of three points or an RLE."""
        if annotation.get("iscrowd", 0):
            return "crowd"
        if annotation.get("category_id") not in self._label_of:
            return "unknown category"
        box = annotation.get("bbox") or ()
        if len(box) != 4 or not (box[2] > 0 and box[3] > 0):
            return "box missing or without area"
        segmentation = annotation.get("segmentation")
        if not segmentation:
            return "no segmentation"
        if isinstance(segmentation, list) and not usable_polygons(segmentation):
            return "no polygon of three points"
        return None
