"""Draws objects and windows into images.

Images are uint8 RGB arrays `(H, W, 3)`, in and out; what is given is never changed.
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

DRAWN_SIDE = 512  # pixels: images much smaller than this are magnified to be drawn on
MASK_OPACITY = 0.45
DIMMED = 0.45  # of the brightness of an image that windows are drawn on
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
    """A copy of `image` with K objects: a tinted mask with an outline, a box, a name and a score.

    Each object has its own colour, so that touching ones can be told apart. A text that would cover
    another one is left out, and beyond 40 objects all of them are.

    Args:
        image: `(H, W, 3)` uint8 RGB.
        boxes: `(K, 4)` xyxy in pixels of `image`, array or tensor; so are the next three.
        labels: `(K,)` integers from 0.
        masks: `(K, H, W)` bool, or None to draw boxes only.
        scores: `(K,)` in 0..1.
        class_names: name by label; "class 3" stands for a label without one.
        draw_boxes: whether boxes are outlined; they always are where there are no masks.
        magnify: whole factor by which the image is enlarged first; None chooses one that gives
            small images room for text (4 for 128 pixels, 1 from 342 on).

    Returns:
        `(magnify * H, magnify * W, 3)` uint8 RGB.

    Raises:
        ValueError: an image that is not uint8 `(H, W, 3)`, or shapes that do not fit each other.
    """
    check_image(image)
    height, width = image.shape[:2]
    labels = _to_numpy(labels).astype(int).reshape(-1)
    boxes = _to_numpy(boxes).astype(float).reshape(-1, 4)
    scores = None if scores is None else _to_numpy(scores).reshape(-1)
    masks = None if masks is None else _to_numpy(masks).astype(bool, copy=False)
    num_objects = len(labels)
    if masks is not None and masks.shape != (num_objects, height, width):
        raise UserError(
            f"masks of shape {masks.shape} do not fit {num_objects} labels and an image of "
            f"{height} x {width}; expected {(num_objects, height, width)}"
        )
    if len(boxes) != num_objects or (scores is not None and len(scores) != num_objects):
        raise UserError(
            f"{num_objects} labels, {len(boxes)} boxes and "
            f"{'no' if scores is None else len(scores)} scores do not fit each other"
        )

    factor = magnification(height, width) if magnify is None else magnify
    canvas = enlarge(image, factor)
    if masks is not None:
        # Large ones first, or they would hide the small ones that they overlap.
        for index in np.argsort(-masks.sum((1, 2)), kind="stable"):
            _draw_mask(canvas, masks[index], factor, instance_colour(index))
    corners = _to_pixels(boxes, factor)
    if draw_boxes or masks is None:
        for index, (x0, y0, x1, y1) in enumerate(corners.tolist()):
            cv2.rectangle(canvas, (x0, y0), (x1 - 1, y1 - 1), instance_colour(index), 1)
    if num_objects <= MAX_LABELS:
        taken: list[Rectangle] = []
        for index, corner in enumerate(corners.tolist()):
            text = class_name(labels[index], class_names)
            if scores is not None:
                text += f" {scores[index]:.0%}"
            _draw_label(canvas, text, corner, instance_colour(index), taken)
    return canvas


def draw_windows(
    image: np.ndarray,
    boxes: Any,
    windows: Any,
    owned_objects: Any,
    *,
    magnify: int | None = None,
) -> np.ndarray:
    """A dark copy of `image` with windows that own objects, and the objects that none owns.

    A window is a thin square in the colour that `draw_instances` gives to its object, with a dot in
    its centre; the object itself is a filled box of that colour. An object without a window is a
    white box that is crossed out.

    Args:
        image: `(H, W, 3)` uint8 RGB.
        boxes: `(K, 4)` xyxy of the objects in pixels of `image`, array or tensor; so are the next.
        windows: `(F, 4)` xyxy of the windows; they may reach out of the image.
        owned_objects: `(F,)` row in `boxes` of the object that each window owns.
        magnify: as of `draw_instances`.

    Returns:
        `(magnify * H, magnify * W, 3)` uint8 RGB.

    Raises:
        ValueError: an image that is not uint8 `(H, W, 3)`, or a window without its object.
    """
    check_image(image)
    factor = magnification(*image.shape[:2]) if magnify is None else magnify
    boxes = _to_pixels(boxes, factor)
    windows = _to_pixels(windows, factor)
    owners = _to_numpy(owned_objects).astype(int).reshape(-1)
    if len(owners) != len(windows) or not set(owners.tolist()) <= set(range(len(boxes))):
        raise UserError(
            f"{len(windows)} windows own the objects {owners.tolist()} of {len(boxes)} boxes; "
            "expected a row of the boxes for each window"
        )
    canvas = (enlarge(image, factor) * DIMMED).astype(np.uint8)
    # Large objects first, or they would hide the small ones.
    sides = boxes[:, 2:] - boxes[:, :2]
    for index in np.argsort(-sides.prod(1), kind="stable"):
        x0, y0, x1, y1 = boxes[index].tolist()
        if index in owners:
            region = canvas[max(y0, 0) : y1, max(x0, 0) : x1]
            tint = np.array(instance_colour(index)) * MASK_OPACITY
            region[:] = (region * (1 - MASK_OPACITY) + tint).round().astype(np.uint8)
        else:
            cv2.rectangle(canvas, (x0, y0), (x1 - 1, y1 - 1), WHITE, OUTLINE_WIDTH)
            cv2.line(canvas, (x0, y0), (x1 - 1, y1 - 1), WHITE, 1, cv2.LINE_AA)
            cv2.line(canvas, (x0, y1 - 1), (x1 - 1, y0), WHITE, 1, cv2.LINE_AA)
    for owner, (x0, y0, x1, y1) in zip(owners.tolist(), windows.tolist(), strict=True):
        colour = instance_colour(owner)
        cv2.rectangle(canvas, (x0, y0), (x1 - 1, y1 - 1), colour, 1)
        cv2.circle(canvas, ((x0 + x1) // 2, (y0 + y1) // 2), OUTLINE_WIDTH, colour, cv2.FILLED)
    return canvas


def class_name(label: int, class_names: Sequence[str] | None) -> str:
    """The name of `label`, or "class 3" for the label 3 where there is no name."""
    if class_names is not None and 0 <= label < len(class_names):
        return class_names[label]
    return f"class {label}"


def instance_colour(index: int) -> tuple[int, int, int]:
    """RGB colour of the object number `index`: hues a golden ratio apart, neighbours far apart."""
    hue = (0.6 + index * GOLDEN_RATIO) % 1
    saturation = (0.9, 0.65)[index % 2]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, 1.0))
    return red, green, blue


def magnification(height: int, width: int) -> int:
    """The whole factor that brings the longer side closest to 512 pixels, at least 1."""
    return max(1, round(DRAWN_SIDE / max(height, width)))


def save_image(path: str | Path, rgb: np.ndarray) -> None:
    """Writes `rgb (H, W, 3)` uint8 to `path` in the format of its suffix; makes the folder.

    Raises:
        ValueError: an image of another form, or a suffix that OpenCV has no encoder for.
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
    """`stem`, or `stem_2`, `stem_3`, ... if it is in `taken`, to which the result is added.

    It is cut to 200 bytes: file systems take 255, with a suffix.
    """
    stem = stem.encode("utf-8", "replace")[:200].decode("utf-8", "ignore")
    unique, number = stem, 1
    while unique in taken:
        number += 1
        unique = f"{stem}_{number}"
    taken.add(unique)
    return unique


def _to_numpy(values: Any) -> np.ndarray:
    """Array of a tensor on any device, or of anything that numpy takes."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def _to_pixels(boxes: Any, factor: int) -> np.ndarray:
    """Boxes `(K, 4)` on an image that is `factor` times as large, in whole pixels."""
    scaled = _to_numpy(boxes).astype(float).reshape(-1, 4) * factor
    return np.clip(np.nan_to_num(scaled, posinf=0, neginf=0), -1e6, 1e6).round().astype(int)


def _draw_mask(
    canvas: np.ndarray, mask: np.ndarray, factor: int, colour: tuple[int, int, int]
) -> None:
    """Tints `mask`, given before magnification, in `canvas`, and draws its inner rim."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return
    y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    inside = enlarge(mask[y0:y1, x0:x1].astype(np.uint8), factor)
    region = canvas[y0 * factor : y1 * factor, x0 * factor : x1 * factor]
    # The rim is inside the mask, so those of touching objects lie beside each other.
    core = cv2.erode(
        inside,
        np.ones((3, 3), np.uint8),
        iterations=OUTLINE_WIDTH,
        borderType=cv2.BORDER_CONSTANT,
        borderValue=0,
    )
    inside, core = inside.astype(bool), core.astype(bool)
    tinted = region[core] * (1 - MASK_OPACITY) + np.array(colour) * MASK_OPACITY
    region[inside & ~core] = colour
    region[core] = tinted.round().astype(np.uint8)


def _draw_label(
    canvas: np.ndarray,
    text: str,
    box: Sequence[int],
    colour: tuple[int, int, int],
    taken: list[Rectangle],
) -> None:
    """Writes `text` at the first free place by `box`: above it, below it, inside, or nowhere."""
    (text_width, text_height), baseline = cv2.getTextSize(text, FONT, FONT_SCALE, 1)
    width = text_width + 2 * FONT_MARGIN
    height = text_height + baseline + FONT_MARGIN
    x0, y0, _, y1 = box
    for y in (y0 - height, y1, y0):
        x = max(0, min(x0, canvas.shape[1] - width))
        y = max(0, min(y, canvas.shape[0] - height))
        place = (x, y, x + width, y + height)
        if not any(_overlap(place, other) for other in taken):
            break
    else:
        return
    taken.append(place)
    cv2.rectangle(canvas, place[:2], (place[2] - 1, place[3] - 1), DARK, cv2.FILLED)
    cv2.rectangle(canvas, place[:2], (x + FONT_MARGIN - 2, place[3] - 1), colour, cv2.FILLED)
    write(canvas, text, x + FONT_MARGIN, y + text_height + FONT_MARGIN - 1, WHITE)


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
