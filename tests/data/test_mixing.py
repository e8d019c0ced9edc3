"""Copy-paste: examples by hand, and properties of the result."""

import numpy as np
import pytest
import torch

from tensormask.data.mixing import copy_paste


class Always:
    """Draws that choose each object (0) or none (1)."""

    def __init__(self, value):
        self.value = value

    def random(self, count):
        return np.full(count, self.value)


def scene(size, *boxes, value=0):
    """An image of one value and rectangles (x0, y0, x1, y1) that are labelled 0, 1, ..."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return np.full((*size, 3), value, np.uint8), {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.arange(len(boxes)),
        "masks": masks,
    }


def test_objects_lose_the_pixels_that_a_pasted_one_covers():
    # Covered: the right half of the first, all of the second, nothing of the third.
    image, target = scene((10, 10), (0, 0, 4, 4), (4, 1, 5, 2), (7, 7, 9, 9))
    source, source_target = scene((10, 10), (2, 0, 6, 5), value=200)
    target["boxes"][2] = torch.tensor([7, 7, 9.5, 9.5])  # not that of its mask: kept
    mixed, result = copy_paste(image, target, source, source_target, Always(0))
    assert result["labels"].tolist() == [0, 2, 0]
    assert result["boxes"].tolist() == [[0, 0, 2, 4], [7, 7, 9.5, 9.5], [2, 0, 6, 5]]
    assert result["masks"][0].sum() == 8
    expected = np.zeros((10, 10, 3), np.uint8)
    expected[0:5, 2:6] = 200
    np.testing.assert_array_equal(mixed, expected)
    assert not image.any()  # the input is not changed


@pytest.mark.parametrize("size", [(4, 20), (20, 4), (20, 20), (4, 4)])
def test_a_source_of_another_size_is_cut_or_padded(size):
    image, target = scene((8, 8))
    source, source_target = scene(size, (1, 1, 3, 3), (2, 2, 20, 20), value=9)
    source_target["boxes"][1] = torch.tensor([2.0, 2, min(20, size[1]), min(20, size[0])])
    mixed, result = copy_paste(image, target, source, source_target, Always(0))
    height, width = min(8, size[0]), min(8, size[1])
    assert result["boxes"].tolist() == [[1, 1, 3, 3], [2, 2, width, height]]
    assert result["masks"].shape == (2, 8, 8)
    assert (
        (mixed[:, :, 0] == 9).sum()
        == result["masks"].any(dim=0).sum()
        == 3 + (height - 2) * (width - 2)
    )


def test_an_object_outside_of_the_image_is_left_out():
    image, target = scene((4, 4), (0, 0, 2, 2))
    source, source_target = scene((9, 9), (5, 5, 8, 8), value=9)
    mixed, result = copy_paste(image, target, source, source_target, Always(0))
    assert result["boxes"].tolist() == [[0, 0, 2, 2]]
    assert not mixed.any()


@pytest.mark.parametrize("boxes, value", [([], 0), ([(0, 0, 4, 4)], 1)])
def test_nothing_to_paste(boxes, value):
    image, target = scene((10, 10), (0, 0, 4, 4))
    source, source_target = scene((10, 10), *boxes, value=9)
    mixed, result = copy_paste(image, target, source, source_target, Always(value))
    assert mixed is image
    assert all(torch.equal(result[key], target[key]) for key in target)


def test_a_random_half_of_the_objects_is_pasted():
    image, target = scene((4, 4))
    source, source_target = scene((4, 4), *[(0, 0, 2, 2)] * 400)
    pasted = copy_paste(image, target, source, source_target, np.random.default_rng(0))[1]
    assert 160 < len(pasted["labels"]) < 240
