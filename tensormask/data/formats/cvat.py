"""CVAT for images 1.1: an XML file with polygons, ellipses, masks and boxes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from tensormask.data.formats.regions import Polygon, Rle, ellipse, pasted_rle
from tensormask.data.formats.source import Source, SourceImage, files_below, split_named
from tensormask.utils.errors import UserError, shorten
from tensormask.utils.files import read_text

_REGIONS = ("polygon", "ellipse", "mask", "box")
_MAX_PIXELS = 2**28  # of the box of a mask, which is made before it is clipped


def is_cvat(path: Path) -> bool:
    """Return whether a file is one of CVAT's."""
    try:
        return "<annotations" in read_text(path)[:4096]
    except (UserError, OSError):
        return False


def read_cvat(path: Path, source: Source) -> None:
    """Read an XML file, or those in a folder. The images are beside it, or in a folder `images`.

    Shapes of one label and one `group_id` are the parts of one object, as in CVAT's COCO export.
    Boxes have no mask.

    Raises:
        UserError: there is no such file, or none of them can be read.
    """
    files = [path] if path.is_file() else files_below(path, [".xml"])
    files = [file for file in files if is_cvat(file)]
    if not files:
        raise UserError(f"{path} has no XML file of CVAT")
    for xml_file in files:
        try:
            root = parse_xml(xml_file)
            if root.find("track") is not None:
                raise UserError('is "CVAT for video": export "CVAT for images 1.1"')
        except UserError as error:
            source.issues.add("file_malformed", source.where(xml_file), str(error))
            continue
        names = [label.findtext("name") or "" for label in root.iterfind("meta//labels/label")]
        source.class_names += [n for n in names if n and n not in source.class_names]
        folders = [xml_file.parent / "images", xml_file.parent]
        for number, entry in enumerate(root.iterfind("image")):
            name, subset = entry.get("name", ""), entry.get("subset", "")
            where = source.where(xml_file, shorten(name) if name else f"image[{number}]")
            places = [folder / subset for folder in folders] + folders if subset else folders
            image_path = source.find_image(places, name, where)
            if image_path is None:
                continue
            try:
                size = int(entry.get("height", "")), int(entry.get("width", ""))
            except ValueError:
                source.issues.add("image_size", where, "width and height are no numbers")
                continue
            image = source.add_image(image_path, where, split=split_named(subset), size=size)
            if image is not None:
                _read_shapes(source, image, entry, where)


def parse_xml(path: Path) -> ElementTree.Element:
    """Parse an XML file that has no document type, by which entities can fill the memory.

    Raises:
        UserError: it has one, or is not XML.
    """
    text = read_text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise UserError("has a document type or entities, which CVAT does not write")
    try:
        # Of a text, the encoding that its first line states is not used.
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"is not XML: {error}") from None


def _read_shapes(
    source: Source, image: SourceImage, entry: ElementTree.Element, where: str
) -> None:
    objects: dict[Any, tuple[str | None, list[Polygon | Rle], str]] = {}  # by label and group
    for number, shape in enumerate(entry):
        at, label = f"{where}:{shape.tag}[{number}]", shape.get("label")
        if shape.tag not in _REGIONS:
            source.issues.add("shape_unsupported", at, shorten(str(shape.tag), 40))
            continue
        try:
            group = int(shape.get("group_id") or 0)
            rotation = _number(shape, "rotation", "0")
            if shape.tag == "box" and not rotation:
                sides = [_number(shape, key) for key in ("xtl", "ytl", "xbr", "ybr")]
                source.add_box(image, label, sides, at)
                continue
            part = _mask(shape, image.size) if shape.tag == "mask" else _polygon(shape, rotation)
        except (ValueError, OverflowError) as error:
            source.issues.add("shape_malformed", at, shorten(str(error)))
            continue
        if part is None:
            source.issues.add("shape_unsupported", at, "a rotated box")
        else:
            key = (label, group) if group else number
            objects.setdefault(key, (label, [], at))[1].append(part)
    for label, parts, at in objects.values():
        source.add_object(image, label, parts, at)


def _polygon(shape: ElementTree.Element, rotation: float) -> Polygon | None:
    if shape.tag == "box":
        return None
    if shape.tag == "ellipse":
        x, y, radius_x, radius_y = (_number(shape, key) for key in ("cx", "cy", "rx", "ry"))
        return ellipse(x, y, radius_x, radius_y, rotation)
    points = [point.split(",") for point in shape.get("points", "").split(";") if point.strip()]
    if any(len(point) != 2 for point in points):
        raise UserError("points are x,y;x,y;... with decimal points")
    return [float(value) for point in points for value in point]


def _mask(shape: ElementTree.Element, size: tuple[int, int]) -> Rle:
    """Return the RLE of a mask: its runs go along the rows of its box, background first."""
    left, top, width, height = (int(_number(shape, k)) for k in ("left", "top", "width", "height"))
    runs = np.array([int(run) for run in shape.get("rle", "").split(",")], np.int64)
    if min(width, height) < 1 or width * height > _MAX_PIXELS or min(runs) < 0:
        raise UserError("a mask without a size, or with a negative run")
    # In floats: the sum of integers may wrap around to the expected one.
    total = runs.sum(dtype=np.float64)
    if total != width * height:
        raise UserError(f"its runs have {total:g} pixels, not {width * height}")
    values = np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), runs).reshape(height, width)
    return pasted_rle(values, left, top, size)


def _number(shape: ElementTree.Element, key: str, default: str = "") -> float:
    text = shape.get(key, default)
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{key} is {shorten(text, 40)!r}, not a number") from None
    if not math.isfinite(value):
        raise UserError(f"{key} is {text}")
    return value
