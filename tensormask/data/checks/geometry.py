"""In which form the boxes and masks of a set are written: what most of them have in common."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

from tensormask.data.checks.measurements import FEW, Measurements, count_of, many, most

Cause = tuple[str, str]  # the name of a diagnosis, and its detail

_TOLERATED_PIXELS, _TOLERATED_SHARE = 2.0, 0.05  # between box and mask, as for single annotations
_ROUNDING = 0.01  # beyond 0..1
# Boxes without masks are judged by what reaches beyond the image: of corners, most with a center
# in the right or lower half.
_MANY_BEYOND, _FEW_BEYOND, _SWAPPED_BEYOND = 0.25, 0.01, 0.1
_PERCENT_ENOUGH, _PERCENT_SIDE, _PERCENT_MIDDLE, _PERCENT_FAR = 10, 200, 30.0, 92.0


def geometry_cause(measured: Measurements) -> Cause | None:
    """Return the first cause that most boxes and masks have in common, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # comparisons with NaN
        for test in (_normalized, _percent, _box_form, _axes, _box_corners, _beyond):
            if (cause := test(measured)) is not None:
                return cause
    return None


def ends_inside(measured: Measurements) -> np.ndarray:
    """Return which masks end inside of their image, and beyond its first pixel, bool `(K,)`."""
    ends = measured.extents[:, 2:]
    return ~_is_beyond(measured.extents, measured.sizes) & np.any(ends > 1 + _ROUNDING, axis=1)


def _normalized(measured: Measurements) -> Cause | None:
    """Boxes or masks in 0..1: a pixel at the corner of the image is not one, nor are integers."""
    large = (measured.sizes > 4).all(axis=1)
    found = []
    for name, values in (("bbox", measured.boxes), ("segmentation", measured.extents)):
        valid = np.isfinite(values).all(axis=1) & large
        unit = valid & (values >= -_ROUNDING).all(axis=1) & (values <= 1 + _ROUNDING).all(axis=1)
        unit &= (values != np.round(values)).any(axis=1)
        if many(unit, valid):
            count = f"{np.count_nonzero(unit)} of {np.count_nonzero(valid)}"
            found.append(f"{name} of {count} annotations is in 0..1")
    return ("coordinates_normalized", ", ".join(found)) if found else None


def _percent(measured: Measurements) -> Cause | None:
    """Nearly all in 0..100, up to near 100 in both directions, in images that are larger."""
    sizes = measured.sizes
    for name, values in (("segmentation", measured.extents), ("bbox", _corners(measured.boxes))):
        valid = np.isfinite(values).all(axis=1) & (sizes >= _PERCENT_SIDE).all(axis=1)
        within = valid & (values[:, 2:] <= 100 + _ROUNDING).all(axis=1)
        ends = values[within][:, 2:]
        if len(ends) < _PERCENT_ENOUGH or len(ends) < len(measured) / 2:
            continue
        # Some large objects at the top left of an image are no reason: nothing is elsewhere.
        far = ends.max(axis=0).min() > _PERCENT_FAR
        far &= np.median(ends, axis=0).min() > _PERCENT_MIDDLE
        nearly_all = len(ends) >= (1 - _FEW_BEYOND) * np.count_nonzero(valid)
        if nearly_all and far and (ends != np.round(ends)).any():
            return "coordinates_normalized", f"{name} of {count_of(within)} is in 0..100: percent"
    return None


def _box_form(measured: Measurements) -> Cause | None:
    """Boxes that fit their masks only if they are read in another way."""
    boxes, extents, sizes = measured.boxes, measured.extents, measured.sizes
    valid = np.isfinite(np.concatenate([boxes, extents, sizes], axis=1)).all(axis=1)
    valid &= measured.mask_areas > 0
    boxes, extents, sizes = boxes[valid], extents[valid], sizes[valid]
    # Boxes of tiny objects that are rounded to pixels do not differ.
    differs = ~_near(_corners(boxes), extents, sizes, at_least=_TOLERATED_PIXELS)
    fitting = differs & ~_is_beyond(extents, sizes)
    scale = np.tile(sizes[:, ::-1], 2)
    for text, (name, read) in _FORMS.items():
        fits = fitting & _near(read(boxes, scale), extents, sizes)
        if many(fits) and most(fits, differs):
            return name, f"{text} fits the masks of {count_of(fits)}"
    if not most(differs):
        return None
    if most(differs & _near(_corners(boxes), extents[:, [1, 0, 3, 2]], sizes)):
        return "axes_swapped", f"the masks of {count_of(differs)} have y before x, their boxes not"
    return "boxes_disagree", count_of(differs)


def _axes(measured: Measurements) -> Cause | None:
    """Objects that reach beyond their image, and do not if height and width are exchanged."""
    corners, sizes = _regions(measured)
    beyond = _is_beyond(corners, sizes)
    swapped = _is_beyond(corners, sizes[:, ::-1])
    count = np.count_nonzero(beyond)
    # Corners that are taken for sizes reach beyond in any orientation.
    if count < 2 * FEW or count < _SWAPPED_BEYOND * len(beyond):
        return None
    if np.count_nonzero(swapped) > _FEW_BEYOND * len(beyond):
        return None
    return "axes_swapped", f"{count_of(beyond)} reach beyond the image, and none if it is turned"


def _box_corners(measured: Measurements) -> Cause | None:
    """Boxes without masks: x + width is beyond the image, but width is not, and it is above x."""
    boxes, sizes = measured.boxes, measured.sizes
    valid = np.isfinite(np.concatenate([boxes, sizes], axis=1)).all(axis=1)
    valid &= ~np.isfinite(measured.extents).all(axis=1)
    boxes, sizes = boxes[valid], sizes[valid]
    beyond = _is_beyond(_corners(boxes), sizes)
    ordered = (boxes[:, 2:] >= boxes[:, :2]).all(axis=1) & ~_is_beyond(boxes, sizes)
    count = np.count_nonzero(beyond)
    if count < 2 * FEW or count < _MANY_BEYOND * len(beyond) or not len(ordered):
        return None
    if np.count_nonzero(~ordered) > _FEW_BEYOND * len(ordered):
        return None
    return "boxes_as_corners", f"x + width or y + height of {count_of(beyond)} is beyond the image"


def _beyond(measured: Measurements) -> Cause | None:
    corners, sizes = _regions(measured)
    beyond = _is_beyond(corners, sizes) | (corners[:, :2] < -_margin(sizes)).any(axis=1)
    return ("coordinates_beyond", count_of(beyond)) if most(beyond) else None


def _corners(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


# How else a `bbox` may be read, as (x0, y0, x1, y1), with the image's (width, height) twice; the
# diagnosis by the text of each.
_FORMS: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "[x0, y0, x1, y1]": ("boxes_as_corners", lambda boxes, scale: boxes),
    "[center x, center y, width, height]": (
        "boxes_as_centers",
        lambda boxes, scale: _corners(boxes) - np.tile(boxes[:, 2:] / 2, 2),
    ),
    "[y, x, height, width]": (
        "axes_swapped",
        lambda boxes, scale: _corners(boxes[:, [1, 0, 3, 2]]),
    ),
    "[y0, x0, y1, x1]": ("axes_swapped", lambda boxes, scale: boxes[:, [1, 0, 3, 2]]),
    "bbox as percent of the image": (
        "coordinates_normalized",
        lambda boxes, scale: _corners(boxes * scale / 100),
    ),
    "bbox in pixels, and segmentation in percent,": (
        "coordinates_normalized",
        lambda boxes, scale: _corners(boxes / scale * 100),
    ),
}


def _near(
    corners: np.ndarray, extents: np.ndarray, sizes: np.ndarray, at_least: float = 0
) -> np.ndarray:
    """Return where boxes and masks' extents agree inside of the image, bool `(K,)`.

    The tolerance is at most half of the longer side, but not below `at_least` pixels.
    """
    limits = np.tile(sizes[:, ::-1], 2)
    longer = (extents[:, 2:] - extents[:, :2]).max(axis=1)
    tolerance = np.minimum(longer / 2, np.maximum(_TOLERATED_PIXELS, _TOLERATED_SHARE * longer))
    tolerance = np.maximum(tolerance, at_least)
    distance = np.abs(np.clip(corners, 0, limits) - np.clip(extents, 0, limits)).max(axis=1)
    return np.asarray(distance <= tolerance)


def _regions(measured: Measurements) -> tuple[np.ndarray, np.ndarray]:
    """Return extents of the masks, of boxes where there is none, `(R, 4)`; and images' sizes."""
    has_mask = np.isfinite(measured.extents).all(axis=1)
    regions = np.where(has_mask[:, None], measured.extents, _corners(measured.boxes))
    valid = np.isfinite(np.concatenate([regions, measured.sizes], axis=1)).all(axis=1)
    return regions[valid], measured.sizes[valid]


def _is_beyond(corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return which boxes end more than 2 % of the image, and a pixel, beyond it."""
    return np.any(corners[:, 2:] > sizes[:, ::-1] + _margin(sizes), axis=1)


def _margin(sizes: np.ndarray) -> np.ndarray:
    return np.maximum(1.0, 0.02 * sizes[:, ::-1])
