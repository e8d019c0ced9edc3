"""What is wrong with a data set as a whole: one cause that makes an issue of most entries, or none.

Each test is a pure function of the measurements of a set; it judges by the share of the set, never
by single entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tensormask.data.checks.annotations import find_id
from tensormask.data.checks.geometry import ends_inside, geometry_cause
from tensormask.data.checks.issues import Identity
from tensormask.data.checks.measurements import FEW, Measurements, References, count_of, most
from tensormask.utils.errors import shorten


class Diagnosis(NamedTuple):
    """One cause: its name in `DIAGNOSES`, and what the set shows of it."""

    name: str
    detail: str

    def __str__(self) -> str:
        meaning, mend = DIAGNOSES[self.name]
        return f"{self.name}: {meaning}: {self.detail}. {mend}."

    def as_record(self) -> dict[str, str]:
        """Return name, meaning, detail and mend for JSON."""
        meaning, mend = DIAGNOSES[self.name]
        return {"name": self.name, "meaning": meaning, "detail": self.detail, "mend": mend}


# name: (meaning, mend)
DIAGNOSES = {
    "images_missing": (
        "many images have no file where file_name says",
        "Correct file_name, which is relative to the folder of images, or give another folder",
    ),
    "images_not_turned": (
        "the annotations ignore the EXIF orientation by which the images are turned",
        "Remove the tag from the files (`exiftool -Orientation= FOLDER`), or turn the images and "
        "annotate them again",
    ),
    "images_of_another_size": (
        "the files have another size than height and width state",
        "Use the files that were annotated, or scale height, width, bbox and segmentation",
    ),
    "images_unreadable": (
        "no image of the set can be used",
        "Correct the files or the annotations; `tensormask check` names each of them",
    ),
    "ids_of_another_type": (
        "ids are text where they are defined and numbers where they are used, or vice versa",
        "They are matched by value; write them in one type",
    ),
    "ids_unknown": (
        "most annotations name an id that the file does not have",
        "Write the `id` of images and categories into image_id and category_id",
    ),
    "ids_shifted": (
        "image_id or category_id seems to count from another number than the ids that it names",
        "Count both from 0 or both from 1",
    ),
    "coordinates_normalized": (
        "coordinates are shares of the image, not pixels",
        "Multiply x and widths by the image's width, y and heights by its height (divide percent "
        "by 100)",
    ),
    "boxes_malformed": (
        "most bbox are not four numbers",
        "Write [x, y, width, height] as numbers, in pixels",
    ),
    "boxes_as_corners": (
        "bbox has two corners, not a corner and a size",
        "Write [x0, y0, x1 - x0, y1 - y0]",
    ),
    "boxes_as_centers": (
        "bbox begins with its center, not with its top left corner",
        "Write [x - width / 2, y - height / 2, width, height]",
    ),
    "axes_swapped": (
        "x and y are exchanged",
        "Write x before y, and width before height; or exchange height and width of the images",
    ),
    "boxes_disagree": (
        "most boxes are not those of their masks",
        "Compute bbox from the segmentation: x, y, width, height in pixels",
    ),
    "coordinates_beyond": (
        "most objects reach beyond their image",
        "They seem to be of larger images, or from another origin: scale or shift them",
    ),
    "crowds": (
        "many objects are marked as crowds, which are not trained on and not scored",
        "Set iscrowd to 0 for single objects, whatever form their mask has (CVAT writes 1 for "
        "each brush mask)",
    ),
    "areas_wrong": (
        "most areas differ from those of the masks by a factor above 2",
        "The masks' own area is used for the sizes small, medium, large; correct or remove area",
    ),
    "masks_missing": (
        "most annotations have no segmentation",
        "Annotate masks: boxes alone can be evaluated, but not trained on",
    ),
    "masks_malformed": (
        "most segmentations are not in COCO's form",
        "Write [[x0, y0, x1, y1, ...], ...] in pixels, or a run-length code of the image's size",
    ),
}
# In COCO 1 % of the annotations are crowds; a cause can also be in a part of a set.
_CROWD_SHARE, _FEW_CROWDS, _CROWD_AREA = 0.2, 4, 4.0
_AREA_FACTOR, _AREA_PIXELS = 2.0, 1.0


def diagnose(measured: Measurements) -> list[Diagnosis]:
    """Return the causes that the annotations of a set show, in the order of `DIAGNOSES`."""
    found = [diagnosis for test in _TESTS if (diagnosis := test(measured)) is not None]
    return sorted(found, key=lambda diagnosis: list(DIAGNOSES).index(diagnosis.name))


def _ids_of_another_type(measured: Measurements) -> Diagnosis | None:
    for key, references in (("image_id", measured.images), ("category_id", measured.categories)):
        other = np.array([find_id(i, references.known)[1] for i in references.ids], dtype=bool)
        if most(other):
            given = next(i for i, differs in zip(references.ids, other, strict=True) if differs)
            named = find_id(given, references.known)[0]
            detail = f"{count_of(other)}, such as {key} {_text(given)} for the id {_text(named)}"
            return Diagnosis("ids_of_another_type", detail)
    return None


def _ids_unknown(measured: Measurements) -> Diagnosis | None:
    for key, references in (("image_id", measured.images), ("category_id", measured.categories)):
        unknown = _unknown(references)
        if not most(unknown):
            continue
        ids = [i for i, is_unknown in zip(references.ids, unknown, strict=True) if is_unknown]
        known = ", ".join(map(_text, list(references.known)[:3]))
        detail = f"{count_of(unknown)}, such as {key} {_text(ids[0])}; the ids are {known}, ..."
        if most(np.array([i in references.names for i in ids])):
            detail += "; a name is written in place of the id"
        return Diagnosis("ids_unknown", detail)
    return None


def _ids_shifted(measured: Measurements) -> Diagnosis | None:
    """Ids from 0 for categories from 1: one class is unknown, and all others are another class."""
    for key, references, fewest, fewest_unknown in (
        ("image_id", measured.images, 5, 1),
        ("category_id", measured.categories, 2, 2 * FEW),
    ):
        used = {i for i in references.ids if isinstance(i, int)}
        known = {i for i in references.known if isinstance(i, int)}
        num_unknown = np.count_nonzero(_unknown(references))
        # A few annotations of a class or an image that was taken out are no reason.
        rare = num_unknown < max(fewest_unknown, len(references.ids) / (4 * max(1, len(known))))
        if min(len(known), len(used)) < fewest or rare:
            continue
        if not used <= known and any({i + shift for i in used} <= known for shift in (1, -1)):
            detail = f"{key} goes from {min(used)} to {max(used)}, and the ids from {min(known)} "
            return Diagnosis("ids_shifted", f"{detail}to {max(known)}")
    return None


def _text(identity: Identity | None) -> str:
    return shorten(repr(identity), 60)


def _unknown(references: References) -> np.ndarray:
    found = (find_id(i, references.known)[0] for i in references.ids)
    return np.array([i is None or i not in references.known for i in found], dtype=bool)


def _geometry(measured: Measurements) -> Diagnosis | None:
    cause = geometry_cause(measured)
    return None if cause is None else Diagnosis(*cause)


def _boxes(measured: Measurements) -> Diagnosis | None:
    malformed = ~np.isfinite(measured.boxes).all(axis=1)
    return Diagnosis("boxes_malformed", count_of(malformed)) if most(malformed) else None


def _crowds(measured: Measurements) -> Diagnosis | None:
    crowds = measured.crowds
    enough = np.count_nonzero(crowds) >= max(_FEW_CROWDS, _CROWD_SHARE * len(crowds))
    if not enough and not (len(crowds) and crowds.all()):
        return None
    areas = [
        measured.mask_areas[part & np.isfinite(measured.mask_areas)] for part in (crowds, ~crowds)
    ]
    # A crowd of many objects is larger than one object.
    larger = all(map(len, areas)) and np.median(areas[0]) > _CROWD_AREA * np.median(areas[1])
    if larger and not most(crowds):
        return None
    return Diagnosis("crowds", f"{count_of(crowds)} have iscrowd 1")


def _areas(measured: Measurements) -> Diagnosis | None:
    stated, own = measured.areas + _AREA_PIXELS, measured.mask_areas + _AREA_PIXELS
    compared = np.isfinite(stated) & np.isfinite(own) & ~measured.crowds & (stated > 0)
    factors = stated[compared] / own[compared]
    wrong = (factors > _AREA_FACTOR) | (factors < 1 / _AREA_FACTOR)
    # Not the area is wrong where the mask is: beyond the image, within a pixel, or empty.
    wrong &= (ends_inside(measured) & (measured.mask_areas > 0))[compared]
    if not most(wrong):
        return None
    example = int(np.flatnonzero(wrong)[0])
    detail = (
        f"{count_of(wrong)}, such as {stated[compared][example] - _AREA_PIXELS:g} for a mask of "
        f"{own[compared][example] - _AREA_PIXELS:.0f} pixels"
    )
    return Diagnosis("areas_wrong", detail)


def _masks(measured: Measurements) -> Diagnosis | None:
    forms = measured.forms
    if most(forms == "missing"):
        return Diagnosis("masks_missing", count_of(forms == "missing"))
    for form, text in _WRONG_FORMS.items():
        if most(forms == form):
            return Diagnosis("masks_malformed", f"{count_of(forms == form)} have {text}")
    empty = measured.mask_areas == 0
    if most(empty):
        return Diagnosis("masks_malformed", f"{count_of(empty)} have a mask without a pixel")
    sizes, rle_sizes = measured.sizes, measured.rle_sizes
    differs = np.isfinite(rle_sizes + sizes).all(axis=1) & (rle_sizes != sizes).any(axis=1)
    if not most(differs):
        return None
    stated, expected = rle_sizes[differs], sizes[differs]
    detail = f"{count_of(differs)} have a run-length code of another size than their image"
    if most((stated == expected[:, ::-1]).all(axis=1)):
        detail += ": its size is (width, height) in place of (height, width)"
    else:
        (height, width), (image_height, image_width) = stated[0], expected[0]
        detail += f", such as {height:g} x {width:g} for {image_height:g} x {image_width:g}"
    return Diagnosis("masks_malformed", detail)


_WRONG_FORMS = {
    "flat": "a polygon [x0, y0, ...] that is not in a list of polygons",
    "points": "a list of points [[x, y], ...] in place of a list of polygons",
    "nested": "a list too many around their points",
    "objects": "JSON objects in place of lists of numbers",
    "text": "text in place of lists",
    "other": "another content than lists of numbers",
}
_TESTS: tuple[Callable[[Measurements], Diagnosis | None], ...] = (
    *(_ids_of_another_type, _ids_unknown, _ids_shifted),
    *(_boxes, _geometry, _crowds, _areas, _masks),
)
