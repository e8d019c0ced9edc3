"""Segmentations: valid ones reach pycocotools, invalid ones are refused before."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as mask_utils

from tensormask.data.checks.segmentation import (
    check_rle,
    polygon_issue,
    run_lengths,
    segmentation_to_rle,
    valid_polygons,
)

SQUARE = [2, 2, 6, 2, 6, 6, 2, 6]
MASKS = arrays.arrays(
    np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.integers(0, 1)
)


def runs_of(mask):
    """Count run lengths pixel by pixel, background first."""
    runs, value = [0], 0
    for pixel in mask.ravel(order="F"):
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def test_run_lengths_of_a_mask_by_hand():
    mask = np.array([[0, 1], [1, 1], [0, 0]], dtype=np.uint8)  # columns: 0 1 0, 1 1 0
    code = mask_utils.encode(np.asfortranarray(mask))["counts"]
    assert run_lengths(code).tolist() == [1, 1, 1, 2, 1]
    assert run_lengths(code.decode()).tolist() == [1, 1, 1, 2, 1]
    assert run_lengths([1, 1, 1, 2, 1]).tolist() == [1, 1, 1, 2, 1]


@settings(deadline=None)
@given(MASKS)
def test_run_lengths_equal_pycocotools(mask):
    code = mask_utils.encode(np.asfortranarray(mask))
    runs = check_rle(code, mask.shape)
    assert runs.tolist() == runs_of(mask)
    uncompressed = {"size": list(mask.shape), "counts": runs.tolist()}
    assert segmentation_to_rle(uncompressed, mask.shape) == code


def test_long_runs():
    runs = [0, 1_000_000_000, 1, 5, 3_000_000_000, 1]
    size = (1, sum(runs))
    code = mask_utils.frPyObjects({"size": list(size), "counts": runs}, *size)
    assert check_rle(code, size).tolist() == runs


@pytest.mark.parametrize(
    "counts, message",
    [
        ([0, 97], "add up to 97 pixels, but height . width is 96"),
        ([95], "add up to 95"),
        ([], "add up to 0"),
        ("", "add up to 0"),
        ([101, -5], "negative run"),
        ([2**62, 2**62, 2**62, 2**62, 96], "add up to"),  # 96 in 64 bits
        ([2**64 + 96], "beyond 64 bits"),
        ([96.0], "not an integer"),
        ([True] * 96, "not an integer"),
        (["96"], "not an integer"),
        ("P", "end within a number"),
        ("0P", "end within a number"),
        ("PPPPPPPPPPPP0", "beyond 32 bits"),
        ("0\x000", "COCO's code does not use"),
        ("0é", "COCO's code does not use"),
        ("0p", "COCO's code does not use"),
        (96, "list, str or bytes"),
        (None, "list, str or bytes"),
    ],
)
def test_invalid_counts_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        check_rle({"size": [8, 12], "counts": counts}, (8, 12))
    with pytest.raises(ValueError, match=message):
        segmentation_to_rle({"size": [8, 12], "counts": counts}, (8, 12))


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_counts_that_pass_the_check_decode_to_their_runs(code):
    rle = {"size": [5, 7], "counts": code}
    try:
        runs = check_rle(rle, (5, 7))
    except ValueError:
        return
    values = np.repeat(np.arange(len(runs)) % 2, runs)
    assert (mask_utils.decode(rle).ravel(order="F") == values).all()


@pytest.mark.parametrize("size", [[12, 8], [8], 8, None, "812", [8, "12"]])
def test_another_size_is_refused(size):
    with pytest.raises(ValueError, match=r"its image is \[8, 12\]"):
        check_rle({"size": size, "counts": [96]}, (8, 12))


def test_other_values_than_an_rle_are_refused():
    for value in ({"size": [8, 12]}, {"counts": [96]}, None, [96]):
        with pytest.raises(ValueError, match="dict with size and counts"):
            check_rle(value, (8, 12))


@pytest.mark.parametrize(
    "segmentation",
    [
        [SQUARE],
        [SQUARE, [8, 1, 11, 1, 11, 4], [1, 1, 2, 2]],
        {"size": [8, 12], "counts": [10, 4, 82]},
        mask_utils.encode(np.asfortranarray(np.eye(8, 12, dtype=np.uint8))),
    ],
)
def test_polygons_and_rles_become_an_rle(segmentation):
    rle = segmentation_to_rle(segmentation, (8, 12))
    assert rle["size"] == [8, 12]
    assert 0 < mask_utils.decode(rle).sum() < 96


def test_an_rle_beyond_32_bits_is_refused():
    with pytest.raises(ValueError, match="too large"):
        check_rle({"size": [2**20, 2**13], "counts": [2**33 - 5, 5]}, (2**20, 2**13))


def test_valid_polygons():
    assert valid_polygons([SQUARE, [1, 1, 2, 2], [1, 2, 3, 4, 5, 6, 7]]) == [SQUARE]


@pytest.mark.parametrize(
    "polygon, reason",
    [
        ([0, 0, 12, 8] * 257, "outline longer than 512"),  # to and fro: 514 longer sides
        ([1, 1, 2, 2], "fewer than three points"),
        ([], "fewer than three points"),
        ([1, 2, 3, 4, 5, 6, 7], "an x without a y"),
        ([*SQUARE, math.nan, 1], "NaN or infinity"),
        ([*SQUARE, math.inf, -math.inf], "NaN or infinity"),
        ([*SQUARE, 10**400, 1], "NaN or infinity"),
        ([*SQUARE, -192.1, 1], "more than 16 of the image's longer sides"),
        ([*SQUARE, 204.1, 1], "more than 16 of the image's longer sides"),
        (["1"] * 6, "not a list of numbers"),
        ([[1, 1], [2, 2], [3, 1]], "not a list of numbers"),
        ("123456", "not a list of numbers"),
        ({"x": 1}, "not a list of numbers"),
        (None, "not a list of numbers"),
    ],
)
def test_polygon_issue(polygon, reason):
    assert polygon_issue(polygon, (8, 12)).startswith(reason)


@pytest.mark.parametrize("polygon", [SQUARE, [-192, 0, 204, 0, 204, 20], [0, 0, 12, 8, 0, 8] * 190])
def test_valid_polygons_up_to_the_limits(polygon):
    assert polygon_issue(polygon, (8, 12)) is None
