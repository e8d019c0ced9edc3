"""Convert detections to COCO's results format, write them to a file, and read and check them.

Letters: K detections, (H, W) the image, (V, U) a mask in its window.
"""

import heapq
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from torch import Tensor

from tensormask.data.checks.issues import Identity
from tensormask.data.checks.segmentation import check_rle, segmentation_to_rle
from tensormask.evaluation.cropped import mask_regions
from tensormask.evaluation.ground_truth import has_box, is_finite_number
from tensormask.modeling.inference import read_detection
from tensormask.utils.errors import UserError

Detections = Mapping[str, Any]
Result = dict[str, Any]
# Of a result, by IoU type.
REGION_KEYS = {"bbox": "bbox", "segm": "segmentation", "boundary": "segmentation"}

logger = logging.getLogger(__name__)


def coco_results(
    detections: Detections,
    image_id: Identity,
    category_ids: Sequence[Identity | None],
    size: tuple[int, int] | None = None,
) -> list[Result]:
    """Convert one image's detections to COCO's results format, as JSON values.

    Args:
        detections: `boxes (K, 4)` float xyxy in pixels, `scores (K,)`, `labels (K,)` int64 from 0,
            on any device; for masks `masks (K, H, W)` bool, or `windows (K, 4)` and `window_masks`,
            K tensors `(V, U)`, as of `TensorMask.detect`, or `CroppedMasks`.
        category_ids: the COCO category id of each label; None for a class that the data set does
            not have, whose detections are left out.
        size: `(height, width)` of the image in pixels: required with `window_masks`, optional with
            `masks`, which must have this size.

    Returns:
        A dict for each with `image_id`, `category_id`, `bbox` (x, y, width, height), `score`, and,
        if the detections have masks, `segmentation` as `{"size": [H, W], "counts": str}`.

    Raises:
        ValueError: a label outside `category_ids`; NaN or infinity in boxes or scores; masks of
            another size.

    Example:
        >>> boxes, scores = torch.tensor([[1.0, 0.0, 3.0, 2.0]]), torch.tensor([0.5])
        >>> detections = {"boxes": boxes, "scores": scores, "labels": torch.tensor([1])}
        >>> coco_results(detections, image_id=7, category_ids=[17, 18])
        [{'image_id': 7, 'category_id': 18, 'bbox': [1.0, 0.0, 2.0, 2.0], 'score': 0.5}]
    """
    detections = read_detection(detections)
    labels = detections["labels"].tolist()
    if labels and not 0 <= min(labels) <= max(labels) < len(category_ids):
        raise UserError(
            f"image {image_id}: labels from {min(labels)} to {max(labels)} were detected, but the "
            f"data set has {len(category_ids)} categories; set MODEL.TENSOR_MASK.NUM_CLASSES to "
            f"{len(category_ids)}"
        )
    boxes, scores = detections["boxes"].double().cpu(), detections["scores"].tolist()
    if not (boxes.isfinite().all() and all(map(math.isfinite, scores))):
        raise UserError(
            f"image {image_id}: NaN or infinity in the boxes or scores of the detections. Are the "
            "model's weights finite? If the training diverged, lower SOLVER.BASE_LR"
        )
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    results = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for label, box, score in zip(labels, boxes, scores, strict=True)
    ]
    codes = _encoded_masks(detections, size)
    if codes is not None:
        for result, code in zip(results, codes, strict=True):
            result["segmentation"] = code
    return [result for result in results if result["category_id"] is not None]


def detections_of(results: Sequence[Result], category_ids: Sequence[Identity | None]) -> Detections:
    """Convert one image's results of `coco_results` back to detections, as arrays.

    Returns:
        `boxes (K, 4)` xyxy, `scores (K,)`, `labels (K,)` and, if the results have masks, bool
        `masks (K, H, W)`.
    """
    boxes = np.array([result["bbox"] for result in results], dtype=float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    detections: dict[str, np.ndarray] = {
        "boxes": boxes,
        "scores": np.array([result["score"] for result in results]),
        "labels": np.array([category_ids.index(result["category_id"]) for result in results], int),
    }
    codes = [result["segmentation"] for result in results if "segmentation" in result]
    if codes:
        detections["masks"] = np.stack([rle_tools.decode(code) for code in codes]).astype(bool)
    return detections


def encode_mask(mask: Tensor) -> dict[str, Any]:
    """Return COCO's compressed run-length code of a bool `mask (H, W)`, with `counts` as a str."""
    # Runs go down the columns. Only one mask is transposed at a time, on its device.
    columns = mask.bool().t().contiguous().cpu().numpy().view(np.uint8)
    return _as_json(rle_tools.encode(columns.T))


def encode_region(region: Tensor, x0: int, y0: int, size: tuple[int, int]) -> dict[str, Any]:
    """Return the code of a mask that is empty outside of a region, without making the mask.

    Args:
        region: bool `(h, w)`, completely inside the image.
        x0, y0: the region's top left corner in the image, in pixels.
        size: `(height, width)` of the image.
    """
    height, width = size
    region_height, region_width = region.shape
    # Runs go down the columns. A row of background below them ends every run in its own column.
    columns = np.zeros(1 + region_width * (region_height + 1), dtype=bool)
    padded = columns[1:].reshape(region_width, region_height + 1)
    padded[:, :-1] = region.t().contiguous().cpu().numpy()
    edges = np.flatnonzero(columns[1:] != columns[:-1])  # start, end, start, end, ...
    column, row = np.divmod(edges, region_height + 1)
    position = (x0 + column) * height + y0 + row  # in the image
    # If the region is as high as the image, a run can continue at the top of the next column.
    continues = position[1:-1:2] == position[2::2]
    keep = np.ones(len(position), dtype=bool)
    keep[1:-1:2] &= ~continues
    keep[2::2] &= ~continues
    position = position[keep]
    if len(position) == 0 or position[-1] < height * width:
        position = np.append(position, height * width)
    counts = np.diff(position, prepend=0)
    return _as_json(rle_tools.frPyObjects({"size": list(size), "counts": counts}, height, width))


class ResultsWriter:
    """Context manager that writes results to a JSON list, one per line, without keeping them.

    The file has a temporary name until the block ends. After an error in the block the temporary
    file is deleted, and an older file at `path` is unchanged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_results = 0
        self._temporary = path.with_name(f".{path.name}.tmp")

    def __enter__(self) -> "ResultsWriter":
        self._file = open(self._temporary, "w", encoding="utf-8")
        self._file.write("[")
        return self

    def add(self, results: Iterable[Result]) -> None:
        for result in results:
            self.add_text(json.dumps(result))

    def add_text(self, result: str) -> None:
        """Write a result that is already JSON."""
        self._file.write(",\n" if self.num_results else "\n")
        self._file.write(result)
        self.num_results += 1

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        with self._file:
            self._file.write("\n]\n")
        if error is None:
            self._temporary.replace(self.path)
        else:
            self._temporary.unlink()


def read_results(path: Path) -> Iterator[Result]:
    """Yield the results of a file that `ResultsWriter` has written."""
    return map(json.loads, _read_texts(path))


def _read_texts(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.startswith("{"):
                yield line.rstrip(",\n")


def merge_results(parts: Sequence[Path], path: Path, image_ids: Sequence[Identity]) -> None:
    """Merge the files of several processes into the file that one process would have written.

    Only one result at a time is in memory.

    Args:
        parts: files by `ResultsWriter`, each ordered as `image_ids`.
        image_ids: all images, in the order of a single process; some can be without results.
    """
    order = {image_id: index for index, image_id in enumerate(image_ids)}

    def position(text: str) -> int:
        return order[json.loads(text)["image_id"]]

    with ResultsWriter(path) as writer:
        for text in heapq.merge(*map(_read_texts, parts), key=position):
            writer.add_text(text)


def checked_results(
    results: Sequence[Mapping[str, Any]], coco_gt: COCO, iou_types: Sequence[str]
) -> list[Result]:
    """Check results from any source, and convert them so that pycocotools can read them safely.

    pycocotools reads out of bounds for some invalid RLEs. Results of categories that `coco_gt` does
    not have never count; their number is logged.

    Raises:
        ValueError: a result of an image that `coco_gt` does not have, or without the region that
            an IoU type needs; a box or a score that is not finite; an invalid RLE.
    """
    for index, result in enumerate(results):
        missing = [key for key in ("image_id", "category_id", "score") if key not in result]
        if missing:
            raise UserError(f"result {index} has no {', '.join(missing)}")
    unknown = {result["image_id"] for result in results} - coco_gt.imgs.keys()
    if unknown:
        raise UserError(
            f"the results are of another data set: this one has no images with the ids "
            f"{sorted(unknown, key=str)[:5]}"
        )
    regions = {REGION_KEYS[iou_type]: iou_type for iou_type in iou_types}
    for region, iou_type in regions.items():
        if any(region not in result for result in results):
            raise UserError(f"scoring {iou_type!r} needs a {region!r} in every result")
    categories = {result["category_id"] for result in results} - coco_gt.cats.keys()
    if categories:
        logger.warning(
            "%d of %d results do not count: the ground truth has no categories with the ids %s",
            sum(result["category_id"] in categories for result in results),
            len(results),
            sorted(categories, key=str)[:5],
        )
    checked = []
    for index, result in enumerate(results):
        image = coco_gt.imgs[result["image_id"]]
        name = f"result {index}, of image {result['image_id']}"
        if not is_finite_number(result["score"]):
            raise UserError(f"{name}: the score must be a finite number, got {result['score']!r}")
        if "bbox" in regions and not has_box(result):
            raise UserError(
                f"{name}: the bbox must be four finite numbers, x, y, width and height in pixels, "
                f"got {result['bbox']!r}"
            )
        checked.append(dict(result))
        if "segmentation" in regions:
            size = (image["height"], image["width"])
            try:
                check_rle(result["segmentation"], size)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
            checked[-1]["segmentation"] = segmentation_to_rle(result["segmentation"], size)
    return checked


def _encoded_masks(
    detections: Detections, size: tuple[int, int] | None
) -> Iterator[dict[str, Any]] | None:
    """Yield the code of each mask; None for detections without masks."""
    if "masks" in detections:
        masks = detections["masks"]
        if size is not None and masks.shape[1:] != size:
            raise ValueError(f"masks of shape {tuple(masks.shape)} for an image of size {size}")
        return map(encode_mask, masks)
    if "window_masks" not in detections:
        return None
    if size is None:
        raise ValueError("window_masks need the size of the image")
    regions = mask_regions(detections, size)
    return (encode_region(region, x0, y0, size) for x0, y0, region in regions)


def _as_json(code: dict[str, Any]) -> dict[str, Any]:
    return {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}
