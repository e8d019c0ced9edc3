"""Detect objects with an exported ONNX file, without PyTorch: NumPy and onnxruntime are enough.

```python
from tensormask.export.runtime import OnnxPredictor

predictor = OnnxPredictor("model.onnx", threshold=0.5)
image = np.asarray(PIL.Image.open("image.jpg").convert("RGB"))  # uint8 (H, W, 3)
detections = predictor(image)
detections["masks"]  # bool (K, H, W)
```

Letters: K detections, (H, W) an image, (V, U) a mask.
"""

import json
from collections.abc import Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from tensormask.utils.errors import UserError
from tensormask.utils.extras import require

Size = tuple[int, int]
_PRECISION = 22  # bits of the weights of a resize, as in Pillow


class Letterbox(NamedTuple):
    """An image in the input of a model: resized, and padded at right and bottom."""

    pixels: np.ndarray  # uint8 (height, width, 3)
    size: Size  # (height, width) of the resized image
    old_size: Size  # (H, W) of the image


class OnnxPredictor:
    """Detect the objects in images with a file of `tensormask export`.

    Several threads can use one predictor.

    Args:
        path: of the ONNX file.
        threshold: scores are above it; None for that of the file, MODEL.TENSOR_MASK.
            SCORE_THRESH_TEST of its config.
        providers: of onnxruntime; None for all that are installed.
        session_options: of onnxruntime, as for the number of threads.

    Attributes:
        class_names: the name of each label.
        category_ids: the COCO category id of each label.
        score_threshold: the threshold with the best F1 in the model's last evaluation, or None.
        input_size: (height, width) of the input in pixels.
        batch_size: number of images of a call of the graph; 0 for any.

    Raises:
        UserError: onnxruntime is not installed, or the file is not of `tensormask export`.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        threshold: float | None = None,
        providers: Sequence[str] | None = None,
        session_options: Any = None,
    ) -> None:
        onnxruntime = require("onnxruntime", extra="export")
        self.session = onnxruntime.InferenceSession(
            str(path), session_options, providers or onnxruntime.get_available_providers()
        )
        stored = self.session.get_modelmeta().custom_metadata_map
        if "input_size" not in stored:
            raise UserError(f"{path} is not a file of tensormask export: it lacks its description")
        described = {name: json.loads(text) for name, text in stored.items()}
        self.class_names: list[str] = described["class_names"]
        self.category_ids: list[Any] = described["category_ids"]
        self.score_threshold: float | None = described["score_threshold"]
        self.input_size: Size = tuple(described["input_size"])
        self.resize: tuple[int, int] = described["min_size"], described["max_size"]
        self.padding_color: list[int] = described["padding_color"]
        first = self.session.get_inputs()[0].shape[0]
        self.batch_size = first if isinstance(first, int) else 0
        self.threshold = threshold

    def __call__(
        self, images: np.ndarray | Sequence[np.ndarray], *, threshold: float | None = None
    ) -> Any:
        """Detect the objects in an image, or in each of a list of images.

        Args:
            images: uint8 (H, W, 3), RGB, of any size; or a list of them.
            threshold: of this call.

        Returns:
            for an image, sorted by score: ``boxes`` (K, 4) float32 ``(x0, y0, x1, y1)`` in pixels
            of the image, ``scores`` (K,) float32, ``labels`` (K,) int64 from 0, ``class_names``,
            a list of K, and ``masks`` (K, H, W) bool if the model has a mask head. For a list a
            list of these.

        Raises:
            UserError: an image has another shape or dtype.
        """
        if isinstance(images, np.ndarray):
            return self([images], threshold=threshold)[0]
        threshold = self.threshold if threshold is None else threshold
        step = self.batch_size or max(1, len(images))
        found = []
        for start in range(0, len(images), step):
            boxes = [self.letterbox(image) for image in images[start : start + step]]
            pixels = [box.pixels for box in boxes]
            pixels += pixels[-1:] * (self.batch_size - len(boxes))
            outputs = self.run(np.stack(pixels))
            for n, box in enumerate(boxes):
                found.append(
                    self._detections({k: v[n] for k, v in outputs.items()}, box, threshold)
                )
        return found

    def letterbox(self, image: np.ndarray) -> Letterbox:
        """Resize and pad an image to `input_size`."""
        return letterbox(image, self.input_size, *self.resize, self.padding_color)

    def run(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Return the outputs of the graph for uint8 images (N, height, width, 3) of `input_size`.

        ``boxes`` (N, K, 4), ``scores`` and ``labels`` (N, K), ``num_detections`` (N,), and of a
        model with a mask head ``masks`` (N, K, V, U) and ``mask_boxes`` (N, K, 4), in pixels of the
        input. Rows from ``num_detections`` on have score 0 and label -1.
        """
        names = [output.name for output in self.session.get_outputs()]
        images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        return dict(zip(names, self.session.run(names, {"images": images}), strict=True))

    def _detections(
        self, outputs: dict[str, np.ndarray], box: Letterbox, threshold: float | None
    ) -> dict[str, Any]:
        (height, width), (old_height, old_width) = box.size, box.old_size
        scale = np.array([old_width / width, old_height / height] * 2, np.float32)
        limit = np.array([old_width, old_height] * 2, np.float32)
        boxes = np.minimum(outputs["boxes"] * scale, limit)
        rows = np.arange(len(boxes)) < outputs["num_detections"]
        rows &= (boxes[:, 2:] > boxes[:, :2]).all(1)  # some are in the padding
        if threshold is not None:
            rows &= outputs["scores"] > threshold
        labels = outputs["labels"][rows]
        found: dict[str, Any] = {
            "boxes": boxes[rows],
            "scores": outputs["scores"][rows],
            "labels": labels,
            "class_names": [self.class_names[label] for label in labels],
        }
        if "masks" in outputs:
            places = outputs["mask_boxes"][rows] * scale
            found["masks"] = paste_masks(outputs["masks"][rows], places, box.old_size)
        return found


def letterbox(
    image: np.ndarray, size: Size, min_size: int, max_size: int, padding_color: Sequence[int]
) -> Letterbox:
    """Resize an image as before the evaluation of a model, and pad it to a fixed size.

    As `Predictor` does, the shorter side becomes ``min_size`` pixels, or the longer one
    ``max_size`` if that is less; with ``min_size`` 0 the image keeps its size. An image that does
    not fit then becomes the largest one with its aspect that fits. The pixels equal those of
    Pillow's bilinear filter.

    Args:
        image: uint8 (H, W, 3).
        size: (height, width) of the result.
        padding_color: of the pixels at right and bottom.

    Raises:
        UserError: the image has another shape or dtype.
    """
    if not (isinstance(image, np.ndarray) and image.dtype == np.uint8):
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f"an image must be a uint8 array (H, W, 3), RGB, got {kind}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UserError(f"an image must be (H, W, 3), RGB, got shape {image.shape}")
    old_size = height, width = image.shape[:2]
    scale = min_size / min(old_size) if min_size else 1.0
    sides = scale * height, scale * width
    if min_size and max(sides) > max_size:
        shrink = max_size / max(sides)
        sides = sides[0] * shrink, sides[1] * shrink
    new_size = _rounded(*sides)
    if new_size[0] > size[0] or new_size[1] > size[1]:
        scale = min(size[0] / height, size[1] / width)
        new_size = _rounded(scale * height, scale * width)
    pixels = np.empty((*size, 3), np.uint8)
    pixels[:] = padding_color
    pixels[: new_size[0], : new_size[1]] = resize(image, new_size)
    return Letterbox(pixels, new_size, old_size)


def resize(image: np.ndarray, size: Size) -> np.ndarray:
    """Resize a uint8 image (H, W, 3) to (height, width): the pixels of Pillow's bilinear filter."""
    if image.shape[1] != size[1]:
        image = _resize_rows(image.swapaxes(0, 1), size[1]).swapaxes(0, 1)
    return _resize_rows(image, size[0]) if image.shape[0] != size[0] else image


def _resize_rows(image: np.ndarray, length: int) -> np.ndarray:
    """Resize the first axis. Weights and sums are the integers of Pillow."""
    scale = len(image) / length
    reach = max(scale, 1.0)  # a smaller image is a mean of all pixels
    center = (np.arange(length) + 0.5) * scale
    first = np.maximum((center - reach + 0.5).astype(int), 0)
    end = np.minimum((center + reach + 0.5).astype(int), len(image))
    row = first[:, None] + np.arange((end - first).max())
    weight = np.maximum(1 - np.abs((row - center[:, None] + 0.5) * (1 / reach)), 0)
    weight[row >= end[:, None]] = 0
    weight /= weight.cumsum(1)[:, -1:]  # in sequence, as in Pillow
    weights = (0.5 + weight * (1 << _PRECISION)).astype(np.int32)
    row = np.minimum(row, len(image) - 1)
    total = np.full((length, *image.shape[1:]), 1 << (_PRECISION - 1), np.int32)
    for tap in range(row.shape[1]):
        total += image[row[:, tap]] * weights[:, tap, None, None]
    return np.clip(total >> _PRECISION, 0, 255).astype(np.uint8)


def paste_masks(masks: np.ndarray, boxes: np.ndarray, size: Size) -> np.ndarray:
    """Paste masks into images, as `tensormask.layers.paste_masks`.

    Args:
        masks: probabilities (K, V, U); they count as 0 outside.
        boxes: of the masks, ``(x0, y0, x1, y1)`` in pixels (K, 4), also beyond the image.
        size: (H, W) of the image.

    Returns:
        bool (K, H, W), True where the probability is >= 0.5 at the center of the pixel.
    """
    pasted = np.zeros((len(masks), *size), bool)
    for image, mask, box in zip(pasted, masks, boxes, strict=True):
        inside = mask >= 0.5
        # Beyond the neighbors of these mask pixels, all values are below 0.5.
        slices, weights = [], []
        for axis in (0, 1):
            lines = np.flatnonzero(inside.any(1 - axis))
            if not len(lines):
                break
            low, high = max(lines[0] - 1, 0), min(lines[-1] + 2, mask.shape[axis])
            corner = float(box[1 - axis])
            unit = (float(box[3 - axis]) - corner) / mask.shape[axis]
            first = max(int(np.floor(corner + low * unit)) - 1, 0)
            end = min(int(np.ceil(corner + high * unit)) + 1, size[axis])
            center = (np.arange(first, max(first, end)) + 0.5 - corner) / unit - 0.5
            distance = np.abs(center[:, None] - np.arange(low, high))
            weights.append(np.maximum(1 - distance, 0).astype(np.float32))
            slices.append((slice(low, high), slice(first, max(first, end))))
        if len(slices) == 2:
            (rows, ys), (columns, xs) = slices
            image[ys, xs] = weights[0] @ mask[rows, columns] @ weights[1].T >= 0.5
    return pasted


def _rounded(height: float, width: float) -> Size:
    return max(1, int(height + 0.5)), max(1, int(width + 0.5))
