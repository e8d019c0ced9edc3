"""Transforms: values computed by hand, comparison with PIL, properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_utils

from tensormask.config import get_cfg
from tensormask.data.augmentation import (
    Augmentation,
    build_test_transform,
    build_train_transform,
    resized_size,
)
from tensormask.data.geometry import Geometry, nearest_pixels, transform_boxes, transform_image
from tensormask.data.transforms import (
    image_to_tensor,
    transform_annotations,
    transform_polygons,
    transform_rle,
)


def rle_of(mask):
    return mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))


def annotation(x, y, width, height, segmentation=None):
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {"bbox": [x, y, width, height], "segmentation": segmentation or [corners]}


@pytest.mark.parametrize(
    "size, short, longest, expected",
    [
        ((480, 640), 800, 1333, (800, 1067)),  # 1066.67 rounds up
        ((640, 480), 800, 1333, (1067, 800)),
        ((427, 640), 800, 1333, (800, 1199)),  # 1199.06
        ((240, 960), 800, 1333, (333, 1333)),  # 333.25: the longer side decides
        ((100, 100), 50, 1333, (50, 50)),
        ((3, 1000), 100, 200, (1, 200)),  # 0.6 rounds to 1
        ((1, 1000), 100, 200, (1, 200)),  # 0.2 would round to 0
    ],
)
def test_resized_size(size, short, longest, expected):
    assert resized_size(size, short, longest) == expected


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 1200), st.integers(1, 1600))
def test_resized_size_equals_detectron2s(height, width, short, longest):
    size = short * 1.0
    scale = size / min(height, width)
    new = (size, scale * width) if height < width else (scale * height, size)
    if max(new) > longest:
        scale = longest * 1.0 / max(new)
        new = new[0] * scale, new[1] * scale
    expected = tuple(max(1, int(side + 0.5)) for side in new)
    assert resized_size((height, width), short, longest) == expected
    assert max(expected) <= longest


def test_boxes_by_hand():
    expected = {"none": (2, 6, 10, 12), "horizontal": (10, 6, 18, 12), "vertical": (2, 18, 10, 24)}
    for flip, box in expected.items():
        geometry = Geometry((10, 10), (30, 20), flip)  # x doubles, y triples
        boxes = transform_boxes(np.array([[1.0, 2.0, 5.0, 4.0]]), geometry)
        np.testing.assert_allclose(boxes, [box])


def test_boxes_are_clipped_to_the_image():
    boxes = np.array([[-5.0, -5.0, 50.0, 5.0], [11.0, 1.0, 12.0, 2.0]])
    clipped = transform_boxes(boxes, Geometry((10, 10), (20, 20)))
    np.testing.assert_allclose(clipped, [[0, 0, 20, 10], [20, 2, 20, 4]])


def test_polygons_are_scaled_before_they_are_rasterized():
    # Half a pixel at the old size becomes five pixels at the new size.
    polygon = [0.5, 0.5, 1.0, 0.5, 1.0, 1.0, 0.5, 1.0]
    out = np.zeros((20, 20), dtype=bool)
    transform_polygons([polygon], Geometry((2, 2), (20, 20), "horizontal"), out)
    expected = np.zeros((20, 20), dtype=bool)
    expected[5:10, 10:15] = True
    np.testing.assert_array_equal(out, expected)


def test_several_polygons_are_one_mask():
    out = np.zeros((8, 8), dtype=bool)
    left, right = [1, 1, 3, 1, 3, 3, 1, 3], [5, 5, 7, 5, 7, 7, 5, 7]
    transform_polygons([left, right, [0, 0, 1, 1]], Geometry((8, 8), (8, 8)), out)
    expected = np.zeros((8, 8), dtype=bool)
    expected[1:3, 1:3] = expected[5:7, 5:7] = True
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    "counts",
    [[12], [0, 12], [12, 0], [11, 1], [0, 1, 11], [5, 0, 7], [5, 2, 5, 0], [5, 2, 5, 0, 0], [4, 8]],
)
def test_rle_runs_at_the_borders(counts):
    """Masks of 3 x 4 pixels: empty, full, one corner, and runs without a pixel."""
    rle = {"size": [3, 4], "counts": counts}
    expected = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(4, 3).T
    geometry = Geometry((3, 4), (3, 4))
    out = np.zeros((3, 4), dtype=bool)
    transform_rle(rle, geometry, nearest_pixels(geometry), out)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("old, new", [(640, 427), (333, 800), (801, 800), (1000, 7)])
def test_nearest_pixels_equal_pils_at_photograph_sizes(old, new):
    values = np.random.default_rng(0).integers(0, 256, (old, 3), dtype=np.uint8)
    rows, _ = nearest_pixels(Geometry((old, 3), (new, 3)))
    resized = np.asarray(Image.fromarray(values).resize((3, new), Image.NEAREST))
    np.testing.assert_array_equal(values[rows], resized)


def test_rle_of_another_size_is_refused():
    geometry = Geometry((4, 6), (8, 12))
    rle, out = rle_of(np.ones((6, 4))), np.zeros((8, 12), dtype=bool)
    with pytest.raises(ValueError, match=r"\[6, 4\].*\[4, 6\]"):
        transform_rle(rle, geometry, nearest_pixels(geometry), out)


def test_image_boxes_and_masks_are_transformed_alike():
    """Box, polygon and RLE of a white rectangle agree with its pixels after resize and flip."""
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    image[4:10, 6:21] = 255
    polygon = annotation(6, 4, 15, 6)
    rle = annotation(6, 4, 15, 6, rle_of(image[:, :, 0] > 0))
    for flip in ("none", "horizontal", "vertical"):
        geometry = Geometry((20, 30), (40, 60), flip)
        white = transform_image(image, geometry)[:, :, 0] > 127
        target, _ = transform_annotations([polygon, rle], [0, 1], geometry)
        rows, columns = np.nonzero(white)
        extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            np.testing.assert_allclose(box, extent)
            np.testing.assert_array_equal(mask, white)


def test_empty_objects_are_left_out_with_their_labels():
    tiny = annotation(10.1, 10.1, 0.2, 0.2)  # its mask is empty at a tenth of the size
    outside = annotation(120, 10, 20, 20)
    large = annotation(20, 20, 40, 40)
    geometry = Geometry((100, 100), (10, 10))
    target, _ = transform_annotations([tiny, outside, large], [3, 4, 5], geometry)
    assert target["labels"].tolist() == [5]
    assert target["masks"].sum() == 16
    np.testing.assert_allclose(target["boxes"], [[2, 2, 6, 6]])


def test_an_image_without_objects():
    target, _ = transform_annotations([], [], Geometry((10, 10), (5, 7)))
    assert [target[key].shape for key in ("boxes", "masks", "labels")] == [(0, 4), (0, 5, 7), (0,)]


def test_random_geometries_are_spread_and_repeatable():
    size = (480, 640)
    ranged = Augmentation((640, 800), 1333, sampling="range", flip="horizontal")
    sampled = [ranged.draw(size, np.random.default_rng(i)) for i in range(400)]
    assert sampled == [ranged.draw(size, np.random.default_rng(i)) for i in range(400)]
    shorts = [geometry.new_size[0] for geometry in sampled]
    assert min(shorts) < 650
    assert max(shorts) > 790
    assert 640 <= min(shorts) <= max(shorts) <= 800
    assert 150 < sum(geometry.flip == "horizontal" for geometry in sampled) < 250
    chosen = Augmentation((100, 200), 1333, flip="none")
    sampled = [chosen.draw(size, np.random.default_rng(i)) for i in range(50)]
    assert {geometry.new_size[0] for geometry in sampled} == {100, 200}
    assert {geometry.flip for geometry in sampled} == {"none"}


def test_a_range_includes_both_ends():
    ranged = Augmentation((7, 8), 100, sampling="range")
    sampled = {ranged.draw((10, 10), np.random.default_rng(i)).new_size for i in range(30)}
    assert sampled == {(7, 7), (8, 8)}


def test_size_zero_keeps_the_size():
    geometry = Augmentation((0,), 100).draw((480, 640), np.random.default_rng(0))
    assert geometry.new_size == (480, 640)


def test_from_config():
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            *("INPUT.MIN_SIZE_TRAIN", (640, 800), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"),
            *("INPUT.MAX_SIZE_TRAIN", 1000, "INPUT.RANDOM_FLIP", "vertical"),
            *("INPUT.MIN_SIZE_TEST", 700, "INPUT.MAX_SIZE_TEST", 900),
        ]
    )
    assert build_train_transform(cfg) == Augmentation((640, 800), 1000, "range", "vertical")
    assert build_test_transform(cfg) == Augmentation((700,), 900, "choice", "none")
    cfg.INPUT.MASK_FORMAT = "outline"
    with pytest.raises(ValueError, match="MASK_FORMAT"):
        build_train_transform(cfg)


@pytest.mark.parametrize(
    "arguments",
    [
        {"min_sizes": ()},
        {"min_sizes": (-1,)},
        {"min_sizes": (5,), "sampling": "range"},
        {"min_sizes": (9, 5), "sampling": "range"},
        {"min_sizes": (5,), "sampling": "some"},
        {"min_sizes": (5,), "flip": "diagonal"},
    ],
)
def test_invalid_augmentations_are_refused(arguments):
    with pytest.raises(ValueError):
        Augmentation(max_size=10, **arguments)


def test_image_to_tensor():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)[:, ::-1]
    tensor = image_to_tensor(image)
    assert tensor.shape == (3, 2, 4)
    assert tensor.is_contiguous()
    assert tensor[2, 0, 3] == 2
