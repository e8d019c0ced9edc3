"""`Detections`: what `Predictor` returns for an image, a dict with methods.

Letters: K detections, (H, W) the image, P points of a polygon.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from tensormask.data.arrays import image_to_rgb
from tensormask.data.checks.issues import Identity
from tensormask.data.large_images import LargeImage, open_large_image
from tensormask.evaluation import coco_results
from tensormask.evaluation.cropped import mask_regions
from tensormask.utils.errors import UserError, unknown_name
from tensormask.utils.files import expand_home, write_atomically
from tensormask.visualization.colors import instance_color
from tensormask.visualization.instances import class_name, draw_instances, save_image
from tensormask.visualization.large import draw_boxes, draw_cropped

ClassChoice = str | int | Iterable[str | int]
LARGE_DRAWN_SIDE = 4096  # pixels, of the drawing of a large image
_NUM_LISTED = 6  # classes in a repr


class Detections(dict[str, Any]):
    """The detections of one image: a dict of tensors, sorted by score.

    Keys: `boxes (K, 4)` float xyxy in pixels, `scores (K,)`, `labels (K,)` int64 from 0, `masks
    (K, H, W)` bool if the model has a mask head, and `class_names`, a list of K str. The tensors
    can be changed in place. ``len`` is the number of keys, as of every dict.

    Of a large image (`Predictor.predict_tiled`), `masks` would not fit into memory. The keys are
    `windows (K, 4)` int64, the boxes around the masks, and `window_masks`, in which row k is the
    mask inside of its window, bool `(h, w)`.

    Args:
        fields: the keys above; the names are added.
        size: `(H, W)` of the image in pixels.
        all_class_names: the name of each label of the model.
        category_ids: the COCO category id of each label.
        image: uint8 RGB `(H, W, 3)`, or of a large image what reads it, for `draw`; None saves its
            memory.
    """

    def __init__(
        self,
        fields: dict[str, Any],
        *,
        size: tuple[int, int],
        all_class_names: Sequence[str],
        category_ids: Sequence[Identity],
        image: np.ndarray | LargeImage | None = None,
    ) -> None:
        super().__init__(fields)
        self.size = size
        self.all_class_names = list(all_class_names)
        self.category_ids = list(category_ids)
        self.image = image
        self["class_names"] = [class_name(n, all_class_names) for n in self["labels"].tolist()]

    @property
    def num_detections(self) -> int:
        """K."""
        return len(self["scores"])

    def __repr__(self) -> str:
        num, (height, width) = self.num_detections, self.size
        parts = [f"{num} detection{'s' * (num != 1)}"]
        if num:
            counts = Counter(self["class_names"]).most_common()
            listed = [f"{count} {name}" for name, count in counts[:_NUM_LISTED]]
            if more := len(counts) - _NUM_LISTED:
                listed += [f"{more} more classes"] if more > 0 else []
            parts[0] += f": {', '.join(listed)}"
            low, high = self["scores"].min().item(), self["scores"].max().item()
            parts.append(f"scores {low:.2f}..{high:.2f}")
        return "; ".join([*parts, f"{height} x {width}"])

    __str__ = __repr__

    def select(self, rows: Any) -> "Detections":
        """Return some of the detections: a slice, a bool mask `(K,)`, or one or several indices.

        Example:
            >>> fields = {"boxes": torch.zeros(2, 4), "scores": torch.tensor([0.9, 0.4])}
            >>> fields["labels"] = torch.tensor([1, 0])
            >>> options = {"all_class_names": ["cat", "dog"], "category_ids": [1, 2]}
            >>> Detections(fields, size=(48, 64), **options).select(0)
            1 detection: 1 dog; scores 0.90..0.90; 48 x 64
        """
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows, device=self["scores"].device).reshape(-1)
            rows = rows.long() if rows.dtype != torch.bool else rows
        return Detections(
            {key: value[rows] for key, value in self.items() if key != "class_names"},
            size=self.size,
            all_class_names=self.all_class_names,
            category_ids=self.category_ids,
            image=self.image,
        )

    def filter(
        self,
        *,
        threshold: float | None = None,
        classes: ClassChoice | None = None,
        max_detections: int | None = None,
    ) -> "Detections":
        """Return the detections with a score above `threshold`, of some classes, the best first.

        Args:
            threshold: a score in 0..1.
            classes: names or labels.
            max_detections: how many at most.

        Raises:
            UserError: an unknown class, or an invalid threshold or number.
        """
        check_limits(threshold, max_detections)
        rows = torch.ones_like(self["scores"], dtype=torch.bool)
        if threshold is not None:
            rows &= self["scores"] > threshold
        if classes is not None:
            labels = find_labels(classes, self.all_class_names)
            rows &= torch.isin(self["labels"], self["labels"].new_tensor(labels))
        best = rows.nonzero()[:, 0]
        return self.select(best if max_detections is None else best[:max_detections])

    def to_coco(self, image_id: Identity = 0) -> list[dict[str, Any]]:
        """Return K dicts in COCO's results format: `coco_results`."""
        return coco_results(self, image_id, self.category_ids, self.size)

    def to_supervision(self) -> Any:
        """Return a ``supervision.Detections``, with the names in ``data["class_name"]``.

        Raises:
            ImportError: the package is not installed.
            UserError: the detections are those of a large image.
        """
        if "window_masks" in self:
            raise UserError(
                "to_supervision needs masks of the whole image: use polygons or to_coco"
            )
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision needs a package: pip install supervision") from error
        return supervision.Detections(
            xyxy=_to_numpy(self["boxes"]),
            mask=_to_numpy(self["masks"]) if "masks" in self else None,
            confidence=_to_numpy(self["scores"]),
            class_id=_to_numpy(self["labels"]),
            data={"class_name": np.array(self["class_names"], dtype=str)},
        )

    def polygons(self) -> list[list[np.ndarray]]:
        """Return the outlines of each mask: per detection a list of polygons, `(P, 2)` float xy.

        A polygon runs along the edges of the pixels, in the coordinates of the boxes, so its area
        is the number of pixels inside. A mask in several parts gives one polygon per part, an empty
        mask none. Holes are left out, as in COCO's polygons.

        Raises:
            UserError: the model has no masks.
        """
        return [_outlines(region, x0, y0) for x0, y0, region in self._regions()]

    def label_image(self) -> np.ndarray:
        """Return `(H, W)` uint16: 0 is background, n is row n - 1; the better score is on top.

        Raises:
            UserError: the model has no masks, or there are more than 65,535 detections.
        """
        if self.num_detections > np.iinfo(np.uint16).max:
            raise UserError(
                f"a label image has 16 bits, and there are {self.num_detections} detections: use "
                "to_coco, or filter them"
            )
        labels = np.zeros(self.size, np.uint16)
        order = self["scores"].argsort(stable=True).tolist()
        regions = list(self._regions())
        for row in order:
            x0, y0, region = regions[row]
            part = labels[y0 : y0 + region.shape[0], x0 : x0 + region.shape[1]]
            part[region] = row + 1
        return labels

    def draw(self, image: Any = None, **options: Any) -> np.ndarray:
        """Draw the detections, and return uint8 RGB `(H, W, 3)`, enlarged for small images.

        Args:
            image: a PIL image, an array or a tensor, as of `data.arrays.image_to_rgb`; None takes
                the image that was given to the predictor.
            options: of `visualization.instances.draw_instances`, such as ``magnify=1``; of a large
                image only ``color_by``.

        Of a large image, masks are drawn on a copy whose longer side is at most 4,096 pixels,
        without texts.

        Raises:
            UserError: there is no image.
        """
        rgb = self.image if image is None else image_to_rgb(image)
        if rgb is None:
            raise UserError("these detections have no image: give it, as in draw(image)")
        if isinstance(rgb, LargeImage):
            return self._draw_small(rgb, **options)
        if "window_masks" in self:
            return self._draw_small(open_large_image(rgb), **options)
        return draw_instances(
            rgb,
            self["boxes"],
            self["labels"],
            self.get("masks"),
            self["scores"],
            self.all_class_names,
            **options,
        )

    def save(self, path: str | Path, image: Any = None, **options: Any) -> None:
        """Write the drawing (`draw`) to an image file, or `to_coco` with names to a .json file.

        Raises:
            UserError: another suffix, or there is no image.
        """
        path = Path(expand_home(path))
        if path.suffix.lower() != ".json":
            save_image(path, self.draw(image, **options))
            return
        results = [
            result | {"category_name": name}
            for result, name in zip(self.to_coco(), self["class_names"], strict=True)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(json.dumps(results).encode()))

    def _draw_small(self, image: LargeImage, *, color_by: str = "instance") -> np.ndarray:
        small, factor = image.thumbnail(LARGE_DRAWN_SIDE)
        labels = self["labels"].tolist()
        colors = map(instance_color, labels if color_by == "class" else range(len(labels)))
        if "window_masks" not in self:
            return draw_boxes(small, factor, _to_numpy(self["boxes"]), colors)
        return draw_cropped(small, factor, self._regions(), colors)

    def _regions(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield `(x0, y0, region)` per mask: bool `(h, w)`, outside of which it is empty."""
        if "masks" not in self and "window_masks" not in self:
            raise UserError("these detections have no masks: the model has none (MODEL.MASK_ON)")
        fields = self if "masks" not in self else {"masks": self["masks"].detach().cpu()}
        return ((x0, y0, region.numpy()) for x0, y0, region in mask_regions(fields, self.size))


def check_limits(threshold: float | None, max_detections: int | None) -> None:
    """Raise a `UserError` for an invalid threshold or number of detections; None is valid."""
    if threshold is not None and not 0 <= threshold < 1:
        raise UserError(f"threshold is a score in 0..1, below 1 (30 % is 0.3), got {threshold}")
    if max_detections is not None and max_detections < 1:
        raise UserError(f"max_detections must be 1 or more, got {max_detections}")


def find_labels(classes: ClassChoice, class_names: Sequence[str]) -> list[int]:
    """Return the labels of classes, which are given by their names or by labels from 0.

    Raises:
        UserError: an unknown name, with the nearest one; an invalid label.

    Example:
        >>> find_labels(["dog", 0], ["cat", "dog"])
        [1, 0]
    """
    chosen: list[Any] = [classes]
    if isinstance(classes, Iterable) and not isinstance(classes, str):
        chosen = list(classes)
    if not chosen:
        raise UserError("classes is empty: leave it out for all classes")
    labels: list[int] = []
    for choice in chosen:
        if isinstance(choice, str):
            named = [label for label, name in enumerate(class_names) if name == choice]
            if not named:
                raise UserError(unknown_name("a class of the model", choice, class_names))
            labels += named
        elif isinstance(choice, bool) or choice not in range(len(class_names)):
            highest = len(class_names) - 1
            raise UserError(f"a class is a name or a label in 0..{highest}, got {choice!r}")
        else:
            labels.append(int(choice))
    return labels


def _to_numpy(values: torch.Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _outlines(mask: np.ndarray, x0: int, y0: int) -> list[np.ndarray]:
    """Return the outer outlines of a bool mask along the edges of its pixels, moved by x0, y0."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return []
    y, x = rows[0], columns[0]
    cropped = mask[y : rows[-1] + 1, x : columns[-1] + 1].astype(np.uint8)
    # OpenCV's contours run through pixel centers. In a doubled mask, pixel i is 2i and 2i + 1, and
    # contours turn at 2i on a left or upper edge and at 2i + 1 on others: the edges i and i + 1.
    doubled = cropped.repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    corner = (x0 + x, y0 + y)
    return [_corners((contour[:, 0] + 1) // 2 + corner) for contour in contours]


def _corners(points: np.ndarray) -> np.ndarray:
    """Return a closed polygon `(P, 2)` without repeated points and points within straight lines."""
    points = points[(points != np.roll(points, 1, axis=0)).any(1)].astype(float)
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    return points[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
