"""Checks the entries of a file in COCO's format, one at a time, and keeps what is sound of each.

What cannot be used is replaced by None or left out, and counted: the kinds are in `issues`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pycocotools import mask as mask_utils

from tensormask.data.checks.issues import Identity, IssueLog
from tensormask.data.checks.segmentation import (
    check_rle,
    has_size,
    polygon_issue,
    segmentation_to_rle,
)

Annotation = dict[str, Any]
ImageEntry = dict[str, Any]

# A box and the extent of its mask disagree beyond this many pixels and this share of the box.
_TOLERATED_PIXELS, _TOLERATED_SHARE = 2.0, 0.05
_TOLERATED_BEYOND = 1.0  # pixels that a box may reach out of the image by rounding
# Images are hardly larger than what PIL reads: masks of the stated size are made before they are
# opened.
_MAX_SIDE, _MAX_PIXELS = 2**17, 2**28
_MAX_LENGTH = 2**40  # what is longer is no number of pixels
_MAX_AREA = 1e10  # COCO's evaluation ignores what is larger


def as_id(value: Any) -> Identity | None:
    """An id of the file as an integer or a string; None for anything else. 7.0 is 7."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    usable = isinstance(value, int) and not isinstance(value, bool)
    return value if usable or is_text(value) else None


def is_text(value: Any) -> bool:
    """Whether a value is a string that can be written: JSON may hold none, or half characters."""
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def sort_key(identity: Identity) -> tuple[bool, Identity]:
    """Sorts numbers before strings."""
    return isinstance(identity, str), identity


def check_images(entries: list[Any], issues: IssueLog) -> dict[Identity, ImageEntry]:
    """The sound entries of `images` by id, with `id`, `file_name`, `height` and `width` only."""
    images: dict[Identity, ImageEntry] = {}
    for number, entry in enumerate(entries):
        entry = entry if isinstance(entry, dict) else {}
        identity, file_name = as_id(entry.get("id")), entry.get("file_name")
        # What as_id takes for an id it takes for a length, strings apart.
        height, width = as_id(entry.get("height")), as_id(entry.get("width"))
        usable_name = is_text(file_name) and file_name.strip("/.") and "\0" not in file_name
        usable_size = all(isinstance(s, int) and 0 < s <= _MAX_SIDE for s in (height, width))
        usable_size = usable_size and height * width <= _MAX_PIXELS
        if identity is None or not usable_name or not usable_size:
            issues.add("image_malformed", _name(identity, f"images[{number}]"))
        elif identity in images:
            issues.add("image_duplicate_id", identity)
        else:
            images[identity] = {
                "id": identity,
                "file_name": file_name,
                "height": height,
                "width": width,
            }
    return images


def check_categories(entries: list[Any], issues: IssueLog) -> dict[Identity, str]:
    """The names of the sound entries of `categories` by id."""
    categories: dict[Identity, str] = {}
    for number, entry in enumerate(entries):
        entry = entry if isinstance(entry, dict) else {}
        identity, name = as_id(entry.get("id")), entry.get("name")
        if identity is None or not is_text(name):
            issues.add("category_malformed", _name(identity, f"categories[{number}]"))
        elif identity in categories:
            issues.add("category_duplicate_id", identity)
        else:
            categories[identity] = name
    return categories


def check_annotation(
    annotation: Any,
    number: int,
    images: Mapping[Identity, ImageEntry],
    categories: Mapping[Identity, str],
    issues: IssueLog,
) -> Annotation | None:
    """What is sound of an entry of `annotations`.

    Args:
        number: its place in the file, which names it where it has no id.

    Returns:
        A dict of `id`, `image_id`, `category_id`, `iscrowd` (0 or 1), `bbox` (four finite floats
        x, y, width, height in pixels, or None), `segmentation` (usable polygons, a compressed RLE
        that adds up, or None) and, where the file has it, `area`. None if the image or the
        category is not known.
    """
    place = f"annotations[{number}]"
    if not isinstance(annotation, dict):
        issues.add("annotation_malformed", place)
        return None
    identity = _name(as_id(annotation.get("id")), place)
    image_id, category_id = (as_id(annotation.get(key)) for key in ("image_id", "category_id"))
    if image_id not in images:
        issues.add("annotation_unknown_image", identity)
        return None
    if category_id not in categories:
        issues.add("annotation_unknown_category", identity)
        return None
    size = images[image_id]["height"], images[image_id]["width"]
    box, box_issues = check_box(annotation.get("bbox"), size)
    segmentation, mask_issues = check_segmentation(annotation.get("segmentation"), size)
    found = box_issues + mask_issues
    if box and segmentation and not found and not _agree(box, segmentation, size):
        found = ["box_mask_disagree"]
    is_crowd, area = annotation.get("iscrowd", 0), annotation.get("area")
    if is_crowd not in (0, 1):  # True is 1
        found, is_crowd = [*found, "iscrowd_malformed"], 0
    has_area = _is_number(area) and 0 <= area <= _MAX_AREA  # not NaN, either
    if area is not None and not has_area:
        found = [*found, "area_malformed"]
    for kind in found:
        issues.add(kind, identity)
    checked = {
        "id": identity,
        "image_id": image_id,
        "category_id": category_id,
        "iscrowd": int(is_crowd),
        "bbox": box,
        "segmentation": segmentation,
    }
    if has_area:
        checked["area"] = area
    return checked


def check_box(box: Any, size: tuple[int, int]) -> tuple[list[float] | None, list[str]]:
    """A box (x, y, width, height) in pixels as four finite floats, or None; and its issues.

    Args:
        size: (height, width) of the image.
    """
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return None, ["box_malformed"]
    if not all(map(math.isfinite, box)):
        return None, ["box_not_finite"]
    x, y, width, height = box = [float(value) for value in box]
    if width < 0 or height < 0:
        return None, ["box_negative"]
    if width == 0 or height == 0:
        return box, ["box_empty"]
    if not _has_area_inside(box, size):
        return box, ["box_outside"]
    reach = max(-x, -y, x + width - size[1], y + height - size[0])
    return box, ["box_beyond"] if reach > _TOLERATED_BEYOND else []


def check_segmentation(
    segmentation: Any, size: tuple[int, int]
) -> tuple[list[list[float]] | dict[str, Any] | None, list[str]]:
    """The usable polygons of a segmentation, or its RLE compressed, or None; and its issues.

    Args:
        size: (height, width) of the image in pixels.
    """
    if isinstance(segmentation, dict):
        return _check_rle(segmentation, size)
    if not segmentation:
        return None, ["mask_missing"]
    if not isinstance(segmentation, list):
        return None, ["mask_malformed"]
    found = [polygon_issue(polygon, size) for polygon in segmentation]
    usable = [polygon for polygon, issue in zip(segmentation, found, strict=True) if issue is None]
    return usable or None, sorted({issue for issue in found if issue is not None})


def is_trainable(annotation: Annotation, image: ImageEntry) -> bool:
    """Whether a checked annotation is no crowd, has a box inside the image, and a mask."""
    box = annotation["bbox"]
    return bool(
        not annotation["iscrowd"]
        and _may_have_pixels(annotation["segmentation"])
        and box
        and min(box[2:]) > 0
        and _has_area_inside(box, (image["height"], image["width"]))
    )


def _check_rle(
    rle: dict[str, Any], size: tuple[int, int]
) -> tuple[dict[str, Any] | None, list[str]]:
    if "size" not in rle or "counts" not in rle:
        return None, ["mask_malformed"]
    if not has_size(rle, size):
        return None, ["mask_size"]
    try:
        runs = check_rle(rle, size)
    except ValueError:
        return None, ["mask_counts"]
    # Scored all the same: who evaluates with pycocotools alone counts it as missed, too.
    return segmentation_to_rle(rle, size), [] if runs[1::2].any() else ["mask_empty"]


def _agree(box: list[float], segmentation: Any, size: tuple[int, int]) -> bool:
    """Whether the box is the extent of the mask, within the tolerance and the image."""
    if isinstance(segmentation, list):
        extent = (
            min(min(polygon[0::2]) for polygon in segmentation),
            min(min(polygon[1::2]) for polygon in segmentation),
            max(max(polygon[0::2]) for polygon in segmentation),
            max(max(polygon[1::2]) for polygon in segmentation),
        )
        if _near(box, extent, size):
            return True
    # The spike of a polygon may have no pixels, so its corners alone do not convict.
    x, y, width, height = mask_utils.toBbox(segmentation_to_rle(segmentation, size)).tolist()
    return _near(box, (x, y, x + width, y + height), size)


def _near(
    box: list[float], extent: tuple[float, float, float, float], size: tuple[int, int]
) -> bool:
    x, y, width, height = box
    limits = (size[1], size[0], size[1], size[0])
    tolerance = max(_TOLERATED_PIXELS, _TOLERATED_SHARE * max(width, height))
    return all(
        abs(min(max(a, 0), limit) - min(max(b, 0), limit)) <= tolerance
        for a, b, limit in zip((x, y, x + width, y + height), extent, limits, strict=True)
    )


def _may_have_pixels(segmentation: Any) -> bool:
    """Of polygons only rasterising could tell, which is done at the training size."""
    if isinstance(segmentation, dict):
        return mask_utils.area(segmentation) > 0
    return bool(segmentation)


def _has_area_inside(box: list[float], size: tuple[int, int]) -> bool:
    x, y, width, height = box
    return x < size[1] and y < size[0] and x + width > 0 and y + height > 0


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # NaN and infinity pass: they are an issue of their own.
    return not abs(value) > _MAX_LENGTH or value in (math.inf, -math.inf)


def _name(identity: Identity | None, place: str) -> Identity:
    return place if identity is None else identity
