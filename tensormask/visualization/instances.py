"""Draw objects (masks, boxes, labels) and windows on images, and save images.

Images are uint8 RGB arrays `(H, W, 3)`, in and out; inputs are not changed.
"""

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tensormask.utils.errors import UserError
from tensormask.visualization.grid import (
    DARK,
    FONT,
    FONT_MARGIN,
    FONT_SCALE,
    WHITE,
    check_image,
    enlarge,
    write,
)

DRAWN_SIDE = 512  # pixels: much smaller images are magnified first
MASK_OPACITY = 0.45
DIMMED = 0.45  # brightness of an image below windows, relative to the original
OUTLINE_WIDTH = 2
MAX_LABELS = 40
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

Rectangle = tuple[int, int, int, int]


def draw_instances(
    image: np.ndarray,
    boxes: Any,
    labels: Any,
    masks: Any | None,
    scores: Any | None = None,
    class_names: Sequence[str] | None = None,
    *,
    draw_boxes: bool = True,
    magnify: int | None = None,
) -> np.ndarray:
    """Draw K objects on a copy of `image`: a tinted, outlined mask, a box, a name and a score.

    Each object has its own color. A text that would cover another one is omitted; with more than 40
    objects, all texts are omitted.

    Args:
        image: `(H, W, 3)` uint8 RGB.
        boxes: `(K, 4)` xyxy in pixels of `image`; an array or a tensor, like the next three.
        labels: `(K,)` integers from 0.
        masks: `(K, H, W)` bool, or None to draw boxes only.
        scores: `(K,)` in 0..1.
        class_names: name by label; a label 3 without a name is shown as "class 3".
        draw_boxes: draw the boxes; without masks they are always drawn.
        magnify: whole factor by which the image is enlarged first; None selects one that makes
            small images large enough for text (4 for 128 pixels, 1 from 342 pixels).

    Returns:
        `(magnify * H, magnify * W, 3)` uint8 RGB.

    Raises:
        ValueError: an image that is not uint8 `(H, W, 3)`, or inconsistent shapes.

    Example:
        >>> image = np.zeros((80, 100, 3), np.uint8)
        >>> drawn = draw_instances(image, [[10, 20, 50, 60]], [0], None, [0.9], ["cell"])
        >>> drawn.shape  # magnified
        (400, 500, 3)
    """
    check_image(image)
    height, width = image.shape[:2]
    labels = _to_numpy(labels).astype(int).reshape(-1)
    boxes = _to_numpy(boxes).astype(float).reshape(-1, 4)
    scores = None if scores is None else _to_numpy(scores).reshape(-1)
    masks = None if masks is None else _to_numpy(masks).astype(bool, copy=False)
    num_objects = len(labels)
    if masks is not None and masks.shape != (num_objects, height, width):
        raise ValueError(
            f"masks of shape {masks.shape} do not fit {num_objects} labels and an image of "
            f"{height} x {width} pixels; expected {(num_objects, height, width)}"
        )
    if len(boxes) != num_objects or (scores is not None and len(scores) != num_objects):
        raise ValueError(
            f"{num_objects} labels, {len(boxes)} boxes and "
            f"{'no' if scores is None else len(scores)} scores: give as many of each"
        )

    factor = magnification(height, width) if magnify is None else magnify
    canvas = enlarge(image, factor)
    if masks is not None:
        # Large masks first: they would hide small ones that they overlap.
        for index in np.argsort(-masks.sum((1, 2)), kind="stable"):
            _draw_mask(canvas, masks[index], factor, instance_color(index))
    corners = _to_pixels(boxes, factor)
    if draw_boxes or masks is None:
        for index, (x0, y0, x1, y1) in enumerate(corners.tolist()):
            cv2.rectangle(canvas, (x0, y0), (x1 - 1, y1 - 1), instance_color(index), 1)
    if num_objects <= MAX_LABELS:
        taken: list[Rectangle] = []
        for index, corner in enumerate(corners.tolist()):
            text = class_name(labels[index], class_names)
            if scores is not None:
                text += f" {scores[index]:.0%}"
            _draw_label(canvas, text, corner, instance_color(index), taken)
    return canvas


def draw_windows(
    image: np.ndarray, boxes: Any, windows: Any, matched_objects: Any, *, magnify: int | None = None
) -> np.ndarray:
    """Draw windows and the objects that they match on a dark copy of `image`.

    A window is a thin square in the color of its object in `draw_instances`, with a dot in its
    center; the object is a filled box of that color. An object without a window is a white box
    that is crossed out. The size and type of the result are those of `draw_instances`.

    Args:
        image, boxes, magnify: as of `draw_instances`.
        windows: `(F, 4)` xyxy of the windows; they may extend beyond the image.
        matched_objects: `(F,)` row in `boxes` of the object of each window.

    Raises:
        ValueError: an image that is not uint8 `(H, W, 3)`, or a window without its object.
    """
    check_image(image)
    factor = magnification(*image.shape[:2]) if magnify is None else magnify
    boxes, windows = _to_pixels(boxes, factor), _to_pixels(windows, factor)
    matched = _to_numpy(matched_objects).astype(int).reshape(-1)
    if len(matched) != len(windows) or not set(matched.tolist()) <= set(range(len(boxes))):
        raise ValueError(
            f"{len(windows)} windows have the objects {matched.tolist()} of {len(boxes)} boxes; "
            "expected a row of the boxes for each window"
        )
    canvas = (enlarge(image, factor) * DIMMED).astype(np.uint8)
    # Large objects first: they would hide small ones.
    sides = boxes[:, 2:] - boxes[:, :2]
    for index in np.argsort(-sides.prod(1), kind="stable"):
        x0, y0, x1, y1 = boxes[index].tolist()
        if index in matched:
            region = canvas[max(y0, 0) : y1, max(x0, 0) : x1]
            tint = np.array(instance_color(index)) * MASK_OPACITY
            region[:] = (region * (1 - MASK_OPACITY) + tint).round().astype(np.uint8)
        else:
            cv2.rectangle(canvas, (x0, y0), (x1 - 1, y1 - 1), WHITE, OUTLINE_WIDTH)
            cv2.line(canvas, (x0, y0), (x1 - 1, y1 - 1), WHITE, 1, cv2.LINE_AA)
            cv2.line(canvas, (x0, y1 - 1), (x1 - 1, y0), WHITE, 1, cv2.LINE_AA)
    for index, (x0, y0, x1, y1) in zip(matched.tolist(), windows.tolist(), strict=True):
        color = instance_color(index)
        cv2.rectangle(canvas, (x0, y0), (x1 - 1, y1 - 1), color, 1)
        cv2.circle(canvas, ((x0 + x1) // 2, (y0 + y1) // 2), OUTLINE_WIDTH, color, cv2.FILLED)
    return canvas


def class_name(label: int, class_names: Sequence[str] | None) -> str:
    """Return the name of `label`, or "class 3" for a label 3 without a name."""
    if class_names is not None and 0 <= label < len(class_names):
        return class_names[label]
    return f"class {label}"


def instance_color(index: int) -> tuple[int, int, int]:
    """Return the RGB color of object `index`; successive hues differ by the golden ratio."""
    hue, saturation = (0.6 + index * GOLDEN_RATIO) % 1, (0.9, 0.65)[index % 2]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, 1.0))
    return red, green, blue


def magnification(height: int, width: int) -> int:
    """Return the whole factor, at least 1, that makes the longer side closest to 512 pixels."""
    return max(1, round(DRAWN_SIDE / max(height, width)))


def save_image(path: str | Path, rgb: np.ndarray) -> None:
    """Write `rgb (H, W, 3)` uint8 to `path` in the format of its suffix, and create the folder.

    Raises:
        ValueError: an image that is not uint8 `(H, W, 3)`, or a suffix that OpenCV cannot write.
    """
    check_image(rgb)
    path = Path(path)
    try:
        encoded, data = cv2.imencode(path.suffix, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    except cv2.error:
        encoded = False
    if not encoded:
        raise UserError(f"{path}: cannot write images as {path.suffix!r}; try .png or .jpg")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.tobytes())  # cv2.imwrite loses non-ASCII names on Windows


def unique_stem(stem: str, taken: set[str]) -> str:
    """Return `stem`, or `stem_2`, `stem_3`, ... if it is in `taken`, and add the result to `taken`.

    The stem is cut to 200 bytes: file systems allow 255, with a suffix.
    """
    stem = stem.encode("utf-8", "replace")[:200].decode("utf-8", "ignore")
    unique, number = stem, 1
    while unique in taken:
        number += 1
        unique = f"{stem}_{number}"
    taken.add(unique)
    return unique


def _to_numpy(values: Any) -> np.ndarray:
    """Convert a tensor on any device, or anything that NumPy accepts, to an array."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def _to_pixels(boxes: Any, factor: int) -> np.ndarray:
    """Scale boxes `(K, 4)` by `factor`, and round them to whole pixels."""
    scaled = _to_numpy(boxes).astype(float).reshape(-1, 4) * factor
    return np.clip(np.nan_to_num(scaled, posinf=0, neginf=0), -1e6, 1e6).round().astype(int)


def _draw_mask(
    canvas: np.ndarray, mask: np.ndarray, factor: int, color: tuple[int, int, int]
) -> None:
    """Tint `mask`, given before magnification, in `canvas`, and draw its outline inside of it."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return
    y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    inside = enlarge(mask[y0:y1, x0:x1].astype(np.uint8), factor)
    region = canvas[y0 * factor : y1 * factor, x0 * factor : x1 * factor]
    # Outlines are inside the masks: those of touching objects are next to each other.
    core = cv2.erode(
        inside,
        np.ones((3, 3), np.uint8),
        iterations=OUTLINE_WIDTH,
        borderType=cv2.BORDER_CONSTANT,
        borderValue=0,
    )
    inside, core = inside.astype(bool), core.astype(bool)
    tinted = region[core] * (1 - MASK_OPACITY) + np.array(color) * MASK_OPACITY
    region[inside ^ core] = color
    region[core] = tinted.round().astype(np.uint8)


def _draw_label(
    canvas: np.ndarray,
    text: str,
    box: Sequence[int],
    color: tuple[int, int, int],
    taken: list[Rectangle],
) -> None:
    """Write `text` above, below or inside `box`, wherever it covers no other text; else omit it."""
    (text_width, text_height), baseline = cv2.getTextSize(text, FONT, FONT_SCALE, 1)
    width, height = text_width + 2 * FONT_MARGIN, text_height + baseline + FONT_MARGIN
    x0, y0, _, y1 = box
    for y in (y0 - height, y1, y0):
        x = max(0, min(x0, canvas.shape[1] - width))
        y = max(0, min(y, canvas.shape[0] - height))
        label = (x, y, x + width, y + height)
        if not any(_overlap(label, other) for other in taken):
            break
    else:
        return
    taken.append(label)
    cv2.rectangle(canvas, label[:2], (label[2] - 1, label[3] - 1), DARK, cv2.FILLED)
    cv2.rectangle(canvas, label[:2], (x + FONT_MARGIN - 2, label[3] - 1), color, cv2.FILLED)
    write(canvas, text, x + FONT_MARGIN, y + text_height + FONT_MARGIN - 1, WHITE)


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
