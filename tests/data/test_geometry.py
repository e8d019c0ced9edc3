"""Geometries with crop, window and rotation: examples by hand, and a slow twin on pixels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_utils

from tensormask.data.geometry import (
    FLIPS,
    PADDING_COLOR,
    Geometry,
    Region,
    leave_image,
    transform_boxes,
    transform_image,
    transform_points,
)
from tensormask.data.transforms import transform_annotations

BOX = np.array([[1.0, 2.0, 5.0, 4.0]])  # in an image of 10 x 20 (height x width)


@pytest.mark.parametrize(
    "options, size, box",
    [
        ({"flip": "both"}, (10, 20), (15, 6, 19, 8)),
        ({"quarter_turns": 1}, (20, 10), (2, 15, 4, 19)),
        ({"quarter_turns": 2}, (10, 20), (15, 6, 19, 8)),
        ({"quarter_turns": 3}, (20, 10), (6, 1, 8, 5)),
        ({"crop": Region(1, 0, 5, 10)}, (10, 20), (2, 2, 10, 6)),  # doubles the sides
        ({"crop": Region(3, 2, 5, 10)}, (10, 20), (0, 0, 6, 2)),  # cuts the box
        ({"window": Region(-3, 1, 8, 3)}, (8, 3), (0, 5, 3, 7)),  # three rows of padding
        ({"window": Region(-3, 1, 8, 3), "quarter_turns": 1}, (3, 8), (5, 0, 7, 3)),
        ({"window": Region(6, 0, 5, 5)}, (5, 5), (1, 0, 5, 0)),  # the box is above it
    ],
)
def test_boxes_by_hand(options, size, box):
    geometry = Geometry((10, 20), (10, 20), **options)
    assert geometry.output_size == size
    np.testing.assert_allclose(transform_boxes(BOX, geometry), [box])


def test_objects_that_leave_the_image_by_hand():
    boxes = np.array([[1.0, 1, 3, 3], [3, 3, 6, 6], [7, 7, 9, 9], [-1, 0, 2, 2]])
    window = Geometry((10, 10), (10, 10), "none", 1, window=Region(0, 0, 5, 5))
    assert leave_image(boxes, window).tolist() == [False, True, True, True]
    # Annotations outside of the image are clipped as in detectron2, but nothing cuts them.
    assert not leave_image(boxes, Geometry((10, 10), (20, 20), "both")).any()


def slow_image(image, geometry, method):
    """Transform all pixels step by step, and return them with the pixels that are no padding."""
    top, left, height, width = geometry.source
    image = image[top : top + height, left : left + width]
    image = np.asarray(Image.fromarray(image).resize(geometry.new_size[::-1], method))
    if geometry.flip in ("vertical", "both"):
        image = np.flipud(image)
    if geometry.flip in ("horizontal", "both"):
        image = np.fliplr(image)
    if geometry.window is not None:
        margin = 100
        edges = [(margin, margin)] * 2 + [(0, 0)] * (image.ndim - 2)
        shown = np.pad(np.ones(image.shape[:2], bool), margin)
        image = np.pad(image, edges)
        top, left, height, width = geometry.window
        slices = np.s_[top + margin :, left + margin :]
        image, shown = (a[slices][:height, :width] for a in (image, shown))
    else:
        shown = np.ones(image.shape[:2], bool)
    return np.rot90(image, geometry.quarter_turns), np.rot90(shown, geometry.quarter_turns)


@st.composite
def geometries(draw):
    side = st.integers(1, 40)
    height, width = draw(side), draw(side)
    crop = window = None
    if draw(st.booleans()):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        crop = Region(
            top, left, draw(st.integers(1, height - top)), draw(st.integers(1, width - left))
        )
    if draw(st.booleans()):
        window = Region(
            draw(st.integers(-40, 40)), draw(st.integers(-40, 40)), draw(side), draw(side)
        )
    new_size = (
        (draw(side), draw(side)) if draw(st.booleans()) else (crop or (0, 0, height, width))[2:]
    )
    flip, turns = draw(st.sampled_from(FLIPS)), draw(st.integers(0, 3))
    return Geometry((height, width), tuple(new_size), flip, turns, crop, window)


@settings(max_examples=150, deadline=None)
@given(geometries(), st.integers(0, 2**31))
def test_pixels_masks_and_boxes_equal_the_slow_steps(geometry, seed):
    rng = np.random.default_rng(seed)
    height, width = geometry.old_size
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected, shown = slow_image(image, geometry, Image.Resampling.BILINEAR)
    pixels = transform_image(image, geometry).astype(int)
    assert pixels.shape[:2] == geometry.output_size
    # PIL resizes a part of an image from coordinates of 32 bits.
    tolerance = 3 if geometry.window is not None else 0
    assert np.abs(pixels - expected)[shown].max(initial=0) <= tolerance
    assert (pixels[~shown] == PADDING_COLOR).all()

    left, right = np.sort(rng.integers(0, width + 1, 2)).tolist()
    top, bottom = np.sort(rng.integers(0, height + 1, 2)).tolist()
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[top:bottom, left:right] = rng.random((bottom - top, right - left)) < 0.7
    rle = mask_utils.encode(np.asfortranarray(mask))
    box = [left, top, right - left, bottom - top]
    annotation = {"bbox": box, "segmentation": rle}
    target, _ = transform_annotations([annotation], [4], geometry)
    expected, _ = slow_image(mask, geometry, Image.Resampling.NEAREST)
    # The corners decide whether the box is empty; an empty one has no pixels of its mask.
    if len(target["labels"]):
        np.testing.assert_array_equal(target["masks"][0], expected > 0)
        if leave_image(np.array([[left, top, right, bottom]]), geometry)[0]:
            rows, columns = np.nonzero(expected)
            extent = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            np.testing.assert_array_equal(target["boxes"][0], extent)


@settings(max_examples=60, deadline=None)
@given(geometries(), st.integers(0, 2**31))
def test_polygons_equal_the_part_of_the_whole_mask(geometry, seed):
    """A polygon is rasterized at the new size; window and rotation move its whole pixels."""
    rng = np.random.default_rng(seed)
    height, width = geometry.old_size
    polygon = (rng.uniform(-0.2, 1.2, (4, 2)) * (width, height)).ravel().tolist()
    low, high = np.reshape(polygon, (-1, 2)).min(axis=0), np.reshape(polygon, (-1, 2)).max(axis=0)
    annotation = {"bbox": [*low, *(high - low)], "segmentation": [polygon]}
    whole = Geometry(geometry.old_size, geometry.new_size, geometry.flip, crop=geometry.crop)
    everything = transform_annotations([annotation], [0], whole)[0]["masks"]
    target, _ = transform_annotations([annotation], [0], geometry)
    moved = Geometry(
        whole.new_size, whole.new_size, "none", geometry.quarter_turns, None, geometry.window
    )
    if len(everything):
        expected, _ = slow_image(
            everything[0].numpy().view(np.uint8), moved, Image.Resampling.NEAREST
        )
        assert len(target["masks"]) == expected.any()
        if len(target["masks"]):
            np.testing.assert_array_equal(target["masks"][0], expected > 0)


def test_integer_points_are_truncated_unless_they_are_cropped():
    """detectron2 clips polygons in floating point, but scales integer ones in integers."""
    points = np.array([[1, 2]])
    assert transform_points(points, Geometry((10, 10), (15, 15))).tolist() == [[1, 3]]
    cropped = Geometry((10, 10), (15, 15), crop=Region(0, 0, 10, 10))
    assert transform_points(points, cropped).tolist() == [[1.5, 3]]
