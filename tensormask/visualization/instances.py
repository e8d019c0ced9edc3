"""Draw objects (masks, boxes, labels) and windows on images, and save images.

Images are uint8 RGB arrays `(H, W, 3)`, in and out; inputs are not changed. Not `supervision`'s
annotators: they draw small images without magnification, labels over objects and, in crowded
images, over other labels, and two classes of one object twice.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from tensormask.utils.errors import UserError
from tensormask.utils.files import expand_home
from tensormask.visualization.colors import Color, instance_color
from tensormask.visualization.grid import WHITE, check_image, enlarge
from tensormask.visualization.labels import draw_labels
from tensormask.visualization.overlap import group_duplicates, mask_extents
from tensormask.visualization.text import line_width, relative_size

DRAWN_SIDE = 512  # pixels: much smaller images are magnified first
MASK_OPACITY = 0.45
DIMMED = 0.45  # brightness of an image below windows, relative to the original
OUTLINE_WIDTH, BOX_WIDTH = 2, 1  # pixels up to 640 pixels; wider in larger images


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
    color_by: Literal["instance", "class"] = "instance",
    colors: Any | None = None,
) -> np.ndarray:
    """Draw K objects on a copy of `image`: a tinted, outlined mask, a box, a name and a score.

    Lines and texts grow with images of more than 640 pixels. A label covers no other label and at
    most 40 % of each box; it is omitted where there is no such position, and the labels of low
    scores first. Crowded images, where labels would fill a quarter of the image, have none.
    Detections of different classes that claim one object (IoU of boxes and of masks >= 0.8) are
    drawn once, the best of them, with one label of all classes.

    Args:
        image: `(H, W, 3)` uint8 RGB.
        boxes: `(K, 4)` xyxy in pixels of `image`; an array or a tensor, like the next three. A box
            that is not finite or empty is not drawn, and the mask's extent has its label.
        labels: `(K,)` integers from 0.
        masks: `(K, H, W)` bool, or None to draw boxes only.
        scores: `(K,)` in 0..1.
        class_names: name by label; a label 3 without a name is shown as "class 3". The name of an
            only class is omitted.
        draw_boxes: draw the boxes; without masks they are always drawn.
        magnify: whole factor by which the image is enlarged first; None selects one that makes
            small images large enough for text (4 for 128 pixels, 1 from 342 pixels).
        color_by: a color per row, or per label; 80 colors repeat.
        colors: `(K, 3)` RGB in 0..255 by row, instead of `color_by`.

    Returns:
        `(magnify * H, magnify * W, 3)` uint8 RGB.

    Raises:
        ValueError: an image that is not uint8 `(H, W, 3)`, inconsistent shapes, or an unknown
            `color_by`.

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
    scores = None if scores is None else _to_numpy(scores).astype(float).reshape(-1)
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
    color_of = _colors(labels, color_by, colors)

    factor = magnification(height, width) if magnify is None else magnify
    canvas = enlarge(image, factor)
    scale = relative_size(max(canvas.shape[:2]))
    extents = None if masks is None else mask_extents(masks)
    has_box = np.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    frames = np.where(has_box[:, None], boxes, 0 if extents is None else extents)
    corners = _to_pixels(frames, factor)
    sizes = (corners[:, 2:] - corners[:, :2]).prod(1)
    order = np.argsort(-(sizes if scores is None else scores), kind="stable").tolist()
    groups = group_duplicates(order, labels, frames, masks, extents)
    drawn = sorted(group[0] for group in groups)

    if masks is not None and extents is not None:
        # Large masks first: they would hide small ones that they overlap.
        areas = {row: _area(masks[row], extents[row]) for row in drawn}
        for row in sorted(drawn, key=lambda row: -areas[row]):
            width = line_width(OUTLINE_WIDTH, scale)
            x0, y0, x1, y1 = extents[row]
            draw_region(canvas, masks[row, y0:y1, x0:x1], (x0, y0), color_of[row], width, factor)
    for row in drawn:
        if has_box[row] and (draw_boxes or masks is None):
            draw_rectangle(canvas, corners[row], color_of[row], line_width(BOX_WIDTH, scale))
    if class_names is not None and len(class_names) == 1:
        names = [""] * num_objects
    else:
        names = [class_name(label, class_names) for label in labels]
    percent = [""] * num_objects if scores is None else [f"{score:.0%}" for score in scores]
    row_texts = [" ".join(filter(None, parts)) for parts in zip(names, percent, strict=True)]
    texts = {group[0]: " / ".join(row_texts[row] for row in group) for group in groups}
    first = [row for row, text in texts.items() if text and sizes[row] > 0]
    draw_labels(
        canvas,
        [texts[row] for row in first],
        corners[first],
        [color_of[row] for row in first],
        scale,
    )
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
    canvas = cv2.convertScaleAbs(enlarge(image, factor), alpha=DIMMED)
    scale = relative_size(max(canvas.shape[:2]))
    thin, thick = line_width(BOX_WIDTH, scale), line_width(OUTLINE_WIDTH, scale)
    # Large objects first: they would hide small ones.
    sides = boxes[:, 2:] - boxes[:, :2]
    for index in np.argsort(-sides.prod(1), kind="stable").tolist():
        x0, y0, x1, y1 = boxes[index].tolist()
        if index in matched:
            region = canvas[max(y0, 0) : y1, max(x0, 0) : x1]
            region[:] = _tint(region, instance_color(index))
        else:
            draw_rectangle(canvas, boxes[index], WHITE, thick)
            cv2.line(canvas, (x0, y0), (x1 - 1, y1 - 1), WHITE, thin, cv2.LINE_AA)
            cv2.line(canvas, (x0, y1 - 1), (x1 - 1, y0), WHITE, thin, cv2.LINE_AA)
    for index, window in zip(matched.tolist(), windows, strict=True):
        color, (x0, y0, x1, y1) = instance_color(index), window.tolist()
        draw_rectangle(canvas, window, color, thin)
        cv2.circle(canvas, ((x0 + x1) // 2, (y0 + y1) // 2), thick, color, cv2.FILLED)
    return canvas


def class_name(label: int, class_names: Sequence[str] | None) -> str:
    """Return the name of `label`, or "class 3" for a label 3 without a name."""
    if class_names is not None and 0 <= label < len(class_names):
        return class_names[label]
    return f"class {label}"


def magnification(height: int, width: int) -> int:
    """Return the whole factor, at least 1, that makes the longer side closest to 512 pixels."""
    return max(1, round(DRAWN_SIDE / max(height, width)))


def save_image(path: str | Path, rgb: np.ndarray) -> None:
    """Write `rgb (H, W, 3)` uint8 to `path` in the format of its suffix, and create the folder.

    Raises:
        ValueError: an image that is not uint8 `(H, W, 3)`, or a suffix that OpenCV cannot write.
    """
    check_image(rgb)
    path = Path(expand_home(path))
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


def _colors(labels: np.ndarray, color_by: str, colors: Any | None) -> list[Color]:
    """Return the color of each row: the given ones, or those of the rows or labels."""
    if color_by not in ("instance", "class"):
        raise UserError(f"color_by is {color_by!r}; expected 'instance' or 'class'")
    if colors is None:
        return [*map(instance_color, labels if color_by == "class" else range(len(labels)))]
    given = _to_numpy(colors).astype(int)
    if given.size != 3 * len(labels):
        raise ValueError(f"colors of shape {given.shape}; expected {(len(labels), 3)}, RGB by row")
    return [(red, green, blue) for red, green, blue in given.reshape(-1, 3).tolist()]


def draw_region(
    canvas: np.ndarray,
    mask: np.ndarray,
    corner: tuple[int, int],
    color: Color,
    width: int,
    factor: int = 1,
) -> None:
    """Tint a mask in `canvas`, and draw its outline inside of it.

    Args:
        canvas: `(H, W, 3)` uint8 RGB, which is changed.
        mask: bool `(h, w)`, before magnification.
        corner: x and y of the mask, before magnification.
        width: of the outline in pixels.
        factor: by which the canvas is magnified.
    """
    inside = enlarge(mask.view(np.uint8), factor)
    if not inside.size:
        return
    # Outlines are inside the masks: those of touching objects are next to each other.
    padded = cv2.copyMakeBorder(inside, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1]
    x, y = corner[0] * factor, corner[1] * factor
    region = canvas[y : y + inside.shape[0], x : x + inside.shape[1]]
    cv2.copyTo(_tint(region, color), inside, region)
    region[inside.astype(bool) & (depth <= width)] = color


def _area(mask: np.ndarray, extent: np.ndarray) -> int:
    x0, y0, x1, y1 = extent
    return int(np.count_nonzero(mask[y0:y1, x0:x1]))


def _tint(region: np.ndarray, color: Color) -> np.ndarray:
    """Return a copy of `region` that is blended with `color`."""
    levels = np.arange(256)[None, :, None] * (1 - MASK_OPACITY) + np.array(color) * MASK_OPACITY
    return cv2.LUT(region, levels.round().astype(np.uint8)) if region.size else region


def draw_rectangle(canvas: np.ndarray, corners: np.ndarray, color: Color, width: int) -> None:
    """Draw lines of `width` pixels inside of a box, int xyxy."""
    x0, y0, x1, y1 = corners.tolist()
    for step in range(max(1, min(width, (x1 - x0) // 2, (y1 - y0) // 2))):
        start, end = (x0 + step, y0 + step), (x1 - 1 - step, y1 - 1 - step)
        cv2.rectangle(canvas, start, end, color, 1)
