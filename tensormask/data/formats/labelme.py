"""labelme: a JSON file for each image, with polygons, rectangles, circles and masks."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from tensormask.data.formats.source import (
    Polygon,
    Source,
    SourceImage,
    files_below,
    images_below,
    split_of,
)
from tensormask.utils.errors import UserError, shorten
from tensormask.utils.files import read_text

_NUM_CORNERS = 72  # of the polygon of a circle: 0.1 % less area
_REGIONS = ("polygon", "rectangle", "circle", "mask", "oriented_rectangle")


def is_labelme(path: Path) -> bool:
    """Return whether a file is one of labelme's."""
    try:
        return isinstance(_load(path).get("shapes"), list)
    except (UserError, OSError):
        return False


def read_labelme(path: Path, source: Source) -> None:
    """Read the JSON files below a folder; a folder `train` or `val` states a split.

    Shapes of one label and one `group_id` are the parts of one object. Rectangles and circles are
    masks, as in labelme's own exports.
    """
    for json_file in [path] if path.is_file() else files_below(path, [".json"]):
        where = source.where(json_file)
        try:
            content = _load(json_file)
            shapes = content.get("shapes")
            if not isinstance(shapes, list):
                raise UserError("has no list `shapes`")
            name = content.get("imagePath")
            if not isinstance(name, str) or not name:
                raise UserError("has no imagePath")
        except UserError as error:
            source.issues.add("file_malformed", where, str(error))
            continue
        image_path = source.find_image([json_file.parent], name, where)
        if image_path is None:
            continue
        sides = content.get("imageHeight"), content.get("imageWidth")
        size = sides if all(isinstance(side, int) for side in sides) else None
        image = source.add_image(
            image_path, where, split=split_of(json_file, source.folder), size=size
        )
        if image is not None:
            _read_shapes(source, image, shapes, where)
    if path.is_dir():
        used = {image.path for image in source.images}
        for image_path in images_below(path):
            if image_path not in used and not image_path.with_suffix(".json").exists():
                source.issues.add("image_unlabeled", source.where(image_path))


def _read_shapes(source: Source, image: SourceImage, shapes: list[Any], where: str) -> None:
    groups: dict[tuple[str, int], tuple[list[Polygon], str]] = {}
    for number, shape in enumerate(shapes):
        at = f"{where}:shapes[{number}]"
        shape = shape if isinstance(shape, dict) else {}
        kind, label = shape.get("shape_type") or "polygon", shape.get("label")
        if kind not in _REGIONS:
            source.issues.add("shape_unsupported", at, shorten(str(kind), 40))
            continue
        try:
            points = [(float(x), float(y)) for x, y in shape.get("points", [])]
            rle = _mask(shape, points, image.size) if kind == "mask" else None
            polygon = [] if rle else _polygon(kind, points)
        except (TypeError, ValueError, OverflowError) as error:
            source.issues.add("shape_malformed", at, str(error))
            continue
        if isinstance(label, int | float):
            label = str(label)
        if rle is not None:
            source.add_mask(image, label, rle, at)
            continue
        group = shape.get("group_id")
        if isinstance(group, int) and isinstance(label, str):
            groups.setdefault((label, group), ([], at))[0].append(polygon)
        else:
            source.add_polygons(image, label, [polygon], at)
    for (label, _), (polygons, at) in groups.items():
        source.add_polygons(image, label, polygons, at)


def _polygon(kind: str, points: list[tuple[float, float]]) -> Polygon:
    if kind in ("rectangle", "circle") and len(points) != 2:
        raise UserError(f"a {kind} of {len(points)} points, not 2")
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points
        return [x0, y0, x1, y0, x1, y1, x0, y1]
    if kind == "circle":
        (x, y), (at_x, at_y) = points
        radius = math.hypot(at_x - x, at_y - y)
        return ellipse(x, y, radius, radius)
    return [value for point in points for value in point]


def ellipse(x: float, y: float, radius_x: float, radius_y: float, degrees: float = 0) -> Polygon:
    """Return the polygon of an ellipse around (x, y), rotated clockwise on the image.

    Example:
        >>> [round(v) for v in ellipse(5, 5, 4, 2)[:2]], len(ellipse(5, 5, 4, 2)) // 2
        ([9, 5], 72)
    """
    angles = np.arange(_NUM_CORNERS) * (2 * np.pi / _NUM_CORNERS)
    turn = math.radians(degrees)
    along, across = radius_x * np.cos(angles), radius_y * np.sin(angles)
    xs = x + along * math.cos(turn) - across * math.sin(turn)
    ys = y + along * math.sin(turn) + across * math.cos(turn)
    result: list[float] = np.stack([xs, ys], axis=1).ravel().tolist()
    return result


def _mask(
    shape: dict[str, Any], points: list[tuple[float, float]], size: tuple[int, int]
) -> dict[str, Any]:
    """Return the RLE of a shape `mask`: a PNG, whose corners in the image are the points."""
    (x0, y0), *_ = points
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"])), formats=["PNG"]) as png:
            part = np.asarray(png.convert("L")) > 0
    except Exception as error:  # PIL fails in many ways on broken files
        raise UserError(f"its mask is not a PNG: {shorten(str(error))}") from None
    return pasted_rle(part, round(x0), round(y0), size)


def pasted_rle(part: np.ndarray, left: int, top: int, size: tuple[int, int]) -> dict[str, Any]:
    """Return the RLE of a mask `(h, w)` at a location of an image of `size`, clipped to it."""
    mask = np.zeros(size, np.uint8)
    inside = part[max(0, -top) :, max(0, -left) :]
    target = mask[max(0, top) :, max(0, left) :]
    rows, columns = (min(a, b) for a, b in zip(inside.shape, target.shape, strict=True))
    target[:rows, :columns] = inside[:rows, :columns]
    return mask_utils.encode(np.asfortranarray(mask))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except (UserError, RecursionError) as error:
        raise UserError(shorten(str(error))) from None
    except ValueError as error:
        raise UserError(f"is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError("is not an object of JSON")
    return content
