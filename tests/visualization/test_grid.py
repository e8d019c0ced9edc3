"""Arranged images: titles, captions, grids of tiles, montages."""

import numpy as np
import pytest

from tensormask.visualization.grid import (
    captioned,
    fit,
    montage,
    shrink,
    side_by_side,
    tile_grid,
    titled,
)


def grey(height, width, value=100):
    return np.full((height, width, 3), value, np.uint8)


def test_side_by_side():
    left, right = grey(50, 80, 10), grey(30, 60, 20)
    plain = side_by_side(left, right)
    assert plain.shape == (50, 80 + 8 + 60, 3)
    assert (plain[:50, :80] == 10).all()
    assert (plain[:30, 88:] == 20).all()
    assert (plain[30:, 80:] == 255).all()
    titled = side_by_side(left, right, ("one", "two"))
    strip = titled.shape[0] - 50
    assert 10 < strip < 40
    assert (titled[strip:, :80] == 10).all()
    assert (titled[:strip] != 255).any()
    assert side_by_side(left, right, ("a" * 100, "two")).shape[1] > 500


def test_montage():
    images = [grey(10, 20, 1), grey(30, 40, 2), grey(50, 60, 3)]
    arranged = montage(images, columns=2)
    assert arranged.shape == (30 + 8 + 50, 60 + 8 + 40, 3)
    assert (arranged[:10, :20] == 1).all()
    assert (arranged[:30, 68:] == 2).all()
    assert (arranged[38:, :60] == 3).all()
    assert (arranged != 255).all(2).sum() == 10 * 20 + 30 * 40 + 50 * 60
    assert montage(images[:1], columns=4).shape == (10, 20, 3)
    with pytest.raises(ValueError, match="0 images"):
        montage([], columns=2)


def test_shrink():
    assert shrink(grey(100, 400), 200).shape == (50, 200, 3)
    assert shrink(grey(100, 400), 400).shape == (100, 400, 3)
    assert shrink(grey(1, 4000), 100).shape == (1, 100, 3)


def test_captions_are_wrapped():
    image = grey(50, 200)
    assert captioned(image, []).shape == image.shape
    one = captioned(image, ["p2", "p3"])
    assert one.shape[1] == 200
    assert np.array_equal(one[:50], image)
    assert (one[50:] < 128).any()
    three = captioned(image, ["p2 44 px: 113 objects in 1200 windows"] * 3)
    assert three.shape[1] > 200
    assert three.shape[0] - 50 > 2 * (one.shape[0] - 50)


def test_fit():
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    enlarged = fit(image, 7)
    assert enlarged.shape == (4, 6, 3)
    assert np.array_equal(enlarged[1::2, ::2], image)
    assert np.array_equal(fit(image, 4), image)
    assert fit(grey(100, 400), 200).shape == (50, 200, 3)
    assert fit(grey(1, 4000), 100).shape == (1, 100, 3)
    with pytest.raises(ValueError, match="uint8"):
        fit(np.zeros((4, 4, 3)), 8)


def test_tile_grid():
    green, red = (0, 255, 0), np.uint8([255, 0, 0])  # no grey, which texts are
    tiles = [[grey(10, 20, 3 * row + column) + red for column in range(3)] for row in range(2)]
    arranged = tile_grid(tiles, ["y 0", "y 10"], ["a", "b", "c"], {(1, 2): green})
    framed = np.nonzero((arranged == green).all(2))
    for row, column in np.ndindex(2, 3):
        rows, columns = np.nonzero((arranged == tiles[row][column][0, 0]).all(2))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (10, 20)
        if (row, column) == (1, 2):
            assert (framed[0].min(), framed[0].max()) == (rows.min() - 3, rows.max() + 3)
            assert (framed[1].min(), framed[1].max()) == (columns.min() - 3, columns.max() + 3)
    first = np.argwhere((arranged == tiles[0][0][0, 0]).all(2))[0]
    assert (arranged[: first[0], first[1] :] < 128).all(2).any()  # names above
    assert (arranged[first[0] :, : first[1]] < 128).all(2).any()  # and before
    for bad in (tiles[:1], [], [[grey(10, 20), grey(11, 20)]] * 2):
        with pytest.raises(ValueError, match="do not make a grid"):
            tile_grid(bad, ["y 0", "y 10"], ["a", "b"])


def test_titles_have_the_same_height_with_and_without_descenders():
    heights = {titled(grey(50, 80), title).shape[0] for title in ("aaa", "pqy, (j)")}
    assert len(heights) == 1
