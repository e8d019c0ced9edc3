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

from tensormask.data.formats.regions import Polygon, Rle, ellipse, pasted_rle
from tensormask.data.formats.source import Source, SourceImage, files_below, images_below, split_of
from tensormask.utils.errors import UserError, shorten
from tensormask.utils.files import read_text

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
    objects: dict[Any, tuple[Any, list[Polygon | Rle], str]] = {}  # by label and group
    for number, shape in enumerate(shapes):
        at = f"{where}:shapes[{number}]"
        shape = shape if isinstance(shape, dict) else {}
        kind, label = shape.get("shape_type") or "polygon", shape.get("label")
        if kind not in _REGIONS:
            source.issues.add("shape_unsupported", at, shorten(str(kind), 40))
            continue
        try:
            points = [(float(x), float(y)) for x, y in shape.get("points", [])]
            part = _mask(shape, points, image.size) if kind == "mask" else _polygon(kind, points)
        except (TypeError, ValueError, OverflowError) as error:
            source.issues.add("shape_malformed", at, str(error))
            continue
        if isinstance(label, int | float):
            label = str(label)
        group = shape.get("group_id")
        is_part = isinstance(group, int) and isinstance(label, str)
        key = (label, group) if is_part else number
        objects.setdefault(key, (label, [], at))[1].append(part)
    for label, parts, at in objects.values():
        source.add_object(image, label, parts, at)


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
