"""Drawings of scores and masks: their positions and colors."""

import itertools

import numpy as np

from tensormask.visualization.grid import TILE_GAP
from tensormask.visualization.windows import (
    MARK,
    aligned_view,
    grid_through,
    mask_colors,
    natural_view,
    score_view,
    spread,
    window_crop,
)


def framed_part(view: np.ndarray) -> np.ndarray:
    """The tile in the green frame."""
    rows, columns = np.nonzero((view == MARK).all(2))
    frame = view[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    edge = slice(TILE_GAP - 1, 1 - TILE_GAP)
    return frame[edge, edge]


def test_a_tile_is_the_mask_of_its_window():
    masks = np.random.default_rng(0).random((2, 3, 5, 5))
    for y, x in itertools.product((1, 4), (0, 3, 6)):
        tile = framed_part(natural_view(masks, [1, 4], [0, 3, 6], 10, {(y, x): MARK}))
        mask = masks[(y - 1) // 3, x // 3]
        assert np.array_equal(tile, mask_colors(mask).repeat(2, 0).repeat(2, 1))


def test_marks_are_at_their_locations():
    slices = np.zeros((2, 2, 20, 30))
    offsets = [-1, 1]
    plain = aligned_view(slices, (offsets, offsets), 60)
    marked = aligned_view(slices, (offsets, offsets), 60, ([4, 9], [5, 25]))
    rows, columns = np.nonzero((plain != marked).any(2))
    assert len(rows)
    # Tiles of 40 x 60 pixels, at the bottom right of the image.
    top, left = plain.shape[0] - 2 * 40 - 2 * TILE_GAP, plain.shape[1] - 2 * 60 - 2 * TILE_GAP
    for row, y in enumerate([4, 9]):
        for column, x in enumerate([5, 25]):
            center_y = top + row * (40 + TILE_GAP) + 2 * y + 1
            center_x = left + column * (60 + TILE_GAP) + 2 * x + 1
            distance = np.hypot(rows - center_y, columns - center_x)
            assert ((distance > 3) & (distance < 7)).sum() > 30
            assert (marked[center_y, center_x] == plain[center_y, center_x]).all()


def test_colors():
    low, undecided, high = mask_colors(np.array([0.0, 0.5, 1.0])).tolist()
    assert undecided == [255, 255, 255]
    assert low[2] > 2 * low[0]
    assert high[0] > 2 * high[2]
    view = score_view(np.array([[0.0, 0.2], [0.4, 0.4]]), 0.4, 10, [(1, 0, MARK)])
    assert view.shape == (20, 20, 3)
    brightness = view.astype(int).sum(2)
    assert brightness[5, 5] < 30 < brightness[5, 15] < brightness[15, 15]
    assert (view[15, 0] == MARK).all()


def test_which_tiles_are_shown():
    for shape, max_num in itertools.product(((7, 11), (32, 32), (200, 336), (1, 1)), (5, 8)):
        for index in ((0, 0), tuple(n - 1 for n in shape), tuple(n // 3 for n in shape)):
            shown = grid_through(index, shape, max_num)
            for i, indices, extent in zip(index, shown, shape, strict=True):
                assert i in indices
                assert len(indices) <= max_num
                assert max(indices) < extent
    assert spread(15, 5) == [1, 4, 7, 10, 13]
    assert spread(11, 5) == [1, 3, 5, 7, 9]
    assert spread(3, 5) == [0, 1, 2]
    assert spread(1, 5) == [0]


def test_a_crop_is_black_beyond_the_image():
    rgb = np.full((10, 20, 3), 200, np.uint8)
    crop = window_crop(rgb, (-4.0, -4.0, 4.0, 4.0), 8)
    assert (crop[4:, 4:] == 200).all()
    assert (crop[:4] == 0).all()
    assert (crop[:, :4] == 0).all()
    assert not window_crop(rgb, (-20.0, -20.0, -10.0, -10.0), 8).any()
    assert window_crop(rgb, (2.0, 2.0, 8.0, 8.0), 12).shape == (12, 12, 3)
