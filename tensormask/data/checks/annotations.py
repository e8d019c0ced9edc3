"""Checks the images, categories and annotations of a COCO file, entry by entry.

What is invalid is replaced by None or left out, and counted under a kind of `issues`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Container, Mapping
from typing import Any

from pycocotools import mask as mask_utils

from tensormask.data.checks.issues import Identity, IssueLog
from tensormask.data.checks.segmentation import check_rle, polygon_issue, segmentation_to_rle

Annotation = dict[str, Any]
ImageEntry = dict[str, Any]
Finding = tuple[str, str]  # the kind of an issue and the exact reason

# A box disagrees with its mask if they differ by more than this many pixels and this share of the
# longer side.
_TOLERATED_PIXELS, _TOLERATED_SHARE = 2.0, 0.05
_TOLERATED_BEYOND = 1.0  # pixels that a box may reach beyond the image by rounding
# Masks of the stated size are allocated before an image is opened, so the size is limited: hardly
# more than PIL reads.
_MAX_SIDE, _MAX_PIXELS = 2**17, 2**28
_MAX_LENGTH = 2**40  # a larger number is not a length in pixels
_MAX_AREA = 1e10  # COCO's evaluation ignores larger objects
_INTEGER = re.compile(r"(-?[0-9]{1,18})(\.0+)?")  # an id as text; "12.0" is how tables write 12


def as_id(value: Any) -> Identity | None:
    """Return an id as an integer or a string, None for any other value.

    Example:
        >>> as_id(7.0), as_id("a"), as_id(True)
        (7, 'a', None)
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    valid = isinstance(value, int) and not isinstance(value, bool)
    return value if valid or is_text(value) else None


def is_text(value: Any) -> bool:
    """Return whether a value is a non-empty string that can be encoded (JSON allows others)."""
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def sort_key(identity: Identity) -> tuple[bool, Identity]:
    """Sort integer ids before string ids."""
    return isinstance(identity, str), identity


def find_id(value: Any, known: Container[Identity]) -> tuple[Identity | None, bool]:
    """Return the id of `known` that a reference names, or None; and whether its type differs.

    Text that is a number names the number and the other way round. " 7" and "07" name nothing if
    `known` has both 7 and "7".

    Example:
        >>> find_id("12", {12, 13}), find_id(7, {"7"}), find_id("x", {12})
        ((12, True), ('7', True), (None, False))
    """
    identity = as_id(value)
    if identity is None or identity in known:
        return identity, False
    other: Identity = str(identity)
    if isinstance(identity, str):
        number = _INTEGER.fullmatch(identity.strip())
        other = int(number[1]) if number else identity
        if str(other) in known:
            return None, False
    return (other, True) if other in known else (None, False)


def check_images(entries: list[Any], issues: IssueLog) -> dict[Identity, ImageEntry | None]:
    """Return the valid entries of `images` by id, None where an id names several images.

    Only `id`, `file_name`, `height` and `width` are kept.
    """
    images: dict[Identity, ImageEntry | None] = {}
    left_out: list[tuple[Identity, str]] = []
    for number, entry in enumerate(entries):
        fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
        identity, file_name = as_id(fields.get("id")), fields.get("file_name", "")
        size = {side: _as_length(fields.get(side)) for side in ("height", "width")}
        # The second condition excludes "", ".." and "/".
        valid = is_text(file_name) and file_name.strip("/.") and "\0" not in file_name
        checks = {"id": identity is not None, "file_name": valid, **size}
        invalid = [f"{key} {fields.get(key)!r}" for key, is_valid in checks.items() if not is_valid]
        if identity is None or invalid or size["height"] * size["width"] > _MAX_PIXELS:
            issues.add("image_malformed", _name(identity, f"images[{number}]"), ", ".join(invalid))
            if identity is not None and valid:
                left_out.append((identity, file_name))
        elif identity not in images:
            images[identity] = {"id": identity, "file_name": file_name, **size}
        elif (first := images[identity]) is not None:
            same = _is_file_of(first, file_name)
            same &= all(first[side] == length for side, length in size.items())
            issues.add("image_duplicate_id" if same else "image_ambiguous_id", identity)
            images[identity] = first if same else None
    # The annotations of an entry that is left out are not those of another image.
    for identity, file_name in left_out:
        named = images.get(identity)
        if named is not None and not _is_file_of(named, file_name):
            issues.add("image_ambiguous_id", identity)
            images[identity] = None
    return images


def _is_file_of(image: ImageEntry, file_name: str) -> bool:
    return os.path.normpath(image["file_name"]) == os.path.normpath(file_name)


def check_categories(entries: list[Any], issues: IssueLog) -> dict[Identity, str | None]:
    """Return the names of the valid entries of `categories` by id, None where an id has several."""
    categories: dict[Identity, str | None] = {}
    for number, entry in enumerate(entries):
        fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
        identity, name = as_id(fields.get("id")), fields.get("name", "")
        if identity is None or not is_text(name):
            issues.add("category_malformed", _name(identity, f"categories[{number}]"))
        elif identity not in categories:
            categories[identity] = name
        elif (first := categories[identity]) is not None:
            same = first == name
            issues.add("category_duplicate_id" if same else "category_ambiguous_id", identity)
            categories[identity] = first if same else None
    return categories


def check_annotation(
    annotation: Any,
    number: int,
    images: Mapping[Identity, ImageEntry | None],
    categories: Mapping[Identity, str | None],
    issues: IssueLog,
) -> Annotation | None:
    """Return the valid part of an entry of `annotations`.

    Args:
        annotation: the entry, of any type.
        number: its index in the file, which names it if it has no id.
        images: result of `check_images`.
        categories: result of `check_categories`.
        issues: counts what is invalid.

    Returns:
        A dict of `id`, `image_id`, `category_id`, `iscrowd` (0 or 1), `bbox` (four finite floats
        x, y, width, height in pixels, or None), `segmentation` (valid polygons, a valid compressed
        RLE, or None) and, if the file has a valid one, `area`. None if the image or the category
        is unknown or ambiguous.
    """
    location = f"annotations[{number}]"
    if not isinstance(annotation, dict):
        issues.add("annotation_malformed", location, "not a JSON object")
        return None
    identity = _name(as_id(annotation.get("id")), location)
    found: dict[str, Identity] = {}
    for key, known in (("image_id", images), ("category_id", categories)):
        named, is_other_type = find_id(annotation.get(key), known)
        if named is None or named not in known:
            unknown = f"unknown {key} {as_id(annotation.get(key))!r}"
            issues.add("annotation_malformed", identity, unknown)
            return None
        if known[named] is None:
            issues.add("annotation_ambiguous", identity, f"{key} {named!r}")
            return None
        if is_other_type:
            issues.add("annotation_id_type", identity, f"{key} {annotation[key]!r}")
        found[key] = named
    image = images[found["image_id"]]
    assert image is not None
    size = image["height"], image["width"]
    box, box_findings = check_box(annotation.get("bbox"), size)
    segmentation, mask_findings = check_segmentation(annotation.get("segmentation"), size)
    findings = box_findings + mask_findings
    if box and segmentation and not findings and not _agree(box, segmentation, size):
        findings.append(("box_mask_disagree", ""))
    is_crowd: Any = annotation.get("iscrowd", 0)
    area: Any = annotation.get("area")
    if is_crowd not in (0, 1):  # True is 1
        findings.append(("iscrowd_malformed", ""))
        is_crowd = 0
    valid_area = _is_number(area) and 0 <= area <= _MAX_AREA  # false for NaN, too
    if area is not None and not valid_area:
        findings.append(("area_malformed", ""))
    for kind, reason in findings:
        issues.add(kind, identity, reason)
    checked: Annotation = {"id": identity, **found}
    checked |= {"iscrowd": int(is_crowd), "bbox": box, "segmentation": segmentation}
    if valid_area:
        checked["area"] = area
    return checked


def check_box(box: Any, size: tuple[int, int]) -> tuple[list[float] | None, list[Finding]]:
    """Return a box (x, y, width, height) in pixels as four finite floats or None; and its issues.

    Args:
        box: the entry's `bbox`, of any type.
        size: (height, width) of the image.

    Example:
        >>> check_box([2, 2, 4, 0], (8, 12))
        ([2.0, 2.0, 4.0, 0.0], [('box_empty', 'width or height is 0')])
    """
    if box is None:
        return None, [("box_malformed", "missing")]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return None, [("box_malformed", "not four numbers")]
    if not all(map(math.isfinite, box)):
        return None, [("box_malformed", "NaN or infinity")]
    x, y, width, height = box = [float(value) for value in box]
    if width < 0 or height < 0:
        return None, [("box_malformed", "negative width or height")]
    if width == 0 or height == 0:
        return box, [("box_empty", "width or height is 0")]
    if not _has_area_inside(box, size):
        return box, [("box_empty", "outside of the image")]
    reach = max(-x, -y, x + width - size[1], y + height - size[0])
    return box, [("box_beyond", "")] if reach > _TOLERATED_BEYOND else []


def check_segmentation(
    segmentation: Any, size: tuple[int, int]
) -> tuple[list[list[float]] | dict[str, Any] | None, list[Finding]]:
    """Return the valid polygons of a segmentation, its RLE compressed, or None; and its issues.

    `segmentation` has any type; `size` is the (height, width) of the image in pixels.
    """
    if isinstance(segmentation, dict):
        try:
            runs = check_rle(segmentation, size)
        except ValueError as error:
            return None, [("mask_malformed", str(error).rstrip("."))]
        # An empty mask is scored all the same: pycocotools counts it as missed, too.
        issues = [] if runs[1::2].any() else [("mask_empty", "")]
        return segmentation_to_rle(segmentation, size), issues
    if not segmentation:
        return None, [("mask_missing", "")]
    if not isinstance(segmentation, list):
        return None, [("mask_malformed", f"a {type(segmentation).__name__}")]
    reasons = [polygon_issue(polygon, size) for polygon in segmentation]
    valid = [p for p, reason in zip(segmentation, reasons, strict=True) if reason is None]
    distinct = sorted({reason for reason in reasons if reason is not None})
    return valid or None, [("polygon_malformed", ", ".join(distinct))] if distinct else []


def is_trainable(annotation: Annotation, image: ImageEntry) -> bool:
    """Return whether a checked annotation has a mask and a box in the image, and is not a crowd."""
    box, mask = annotation["bbox"], annotation["segmentation"]
    if annotation["iscrowd"] or not box or not mask:
        return False
    # Polygons may be empty, too: they are rasterized at training size.
    if isinstance(mask, dict) and not mask_utils.area(mask):
        return False
    return min(box[2:]) > 0 and _has_area_inside(box, (image["height"], image["width"]))


def is_usable(annotation: Annotation) -> bool:
    """Return whether a checked annotation can be evaluated: no crowd, with a box or a mask."""
    return bool(not annotation["iscrowd"] and (annotation["bbox"] or annotation["segmentation"]))


def _agree(box: list[float], segmentation: Any, size: tuple[int, int]) -> bool:
    """Return whether the box is the extent of the mask in the image, within the tolerance."""
    if isinstance(segmentation, list):
        xs = [x for polygon in segmentation for x in polygon[0::2]]
        ys = [y for polygon in segmentation for y in polygon[1::2]]
        if _near(box, (min(xs), min(ys), max(xs), max(ys)), size):
            return True
    # The spike of a polygon may cover no pixel, so the corners do not decide against the box.
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


def _has_area_inside(box: list[float], size: tuple[int, int]) -> bool:
    x, y, width, height = box
    return x < size[1] and y < size[0] and x + width > 0 and y + height > 0


def _as_length(value: Any) -> int:
    """Return a height or width in pixels, 0 if it is not valid."""
    length = as_id(value)
    return length if isinstance(length, int) and 0 < length <= _MAX_SIDE else 0


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # NaN and infinity pass: they have a reason of their own.
    return not abs(value) > _MAX_LENGTH or value in (math.inf, -math.inf)


def _name(identity: Identity | None, location: str) -> Identity:
    return location if identity is None else identity
