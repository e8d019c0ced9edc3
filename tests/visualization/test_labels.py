"""Positions of labels, and sizes of texts."""

import numpy as np
import pytest

from tensormask.visualization.labels import draw_labels, place_labels
from tensormask.visualization.text import relative_size, text_size


def place(boxes, size=(60, 20), canvas_size=(400, 500)):
    boxes = np.array(boxes, int).reshape(-1, 4)
    return place_labels(np.full((len(boxes), 2), size), boxes, canvas_size)


def test_a_label_is_above_its_box_or_where_it_is_inside_of_the_image():
    assert place([[100, 150, 200, 250]]) == [(100, 130)]
    assert place([[480, 150, 500, 250]]) == [(440, 130)]
    assert place([[100, 5, 200, 50]]) == [(100, 50)]  # below
    assert place([[0, 0, 500, 400]]) == [(0, 0)]  # inside
    assert place([]) == []


def test_a_label_avoids_other_objects():
    small = [100, 132, 140, 148]
    (x, y), *_ = place([[100, 150, 200, 250], small])
    assert x >= 140 or y + 20 <= 132 or y >= 148


def test_labels_do_not_cover_each_other():
    positions = np.array(place([[100, 150, 200, 250]] * 8))
    for index, position in enumerate(positions):
        assert (np.abs(positions[:index] - position) >= (60, 20)).any(1).all()


def test_labels_that_do_not_fit_are_omitted():
    positions = place([[100, 150, 160, 250]] * 12)
    omitted = positions.index(None)
    assert omitted >= 6
    assert positions[omitted:] == [None] * (12 - omitted)
    canvas = np.zeros((400, 500))
    for x, y in positions[:omitted]:
        canvas[y : y + 20, x : x + 60] = 1
    assert 0.3 < canvas[150:250, 100:160].mean() <= 0.4  # of the box


def test_crowded_images_have_no_labels():
    boxes = [
        [70 * (i % 7), 55 * (i // 7), 70 * (i % 7) + 30, 55 * (i // 7) + 50] for i in range(42)
    ]
    assert None not in place(boxes[:41])  # 41 labels of 1200 pixels are a quarter of the image
    assert place(boxes) == [None] * 42


def test_a_label_has_the_color_of_its_object_and_readable_text():
    for color, ink in (((250, 240, 0), 0), ((0, 0, 200), 255)):
        canvas = np.full((300, 400, 3), 100, np.uint8)
        draw_labels(canvas, ["cell"], np.array([[20, 160, 180, 290]]), [color], 3.0)
        assert (canvas[159, 20] == color).all()
        assert (canvas[:160] == ink).all(2).any()
        assert (canvas[160:] == 100).all()


@pytest.mark.parametrize("side, expected", [(1, 1), (640, 1), (1280, 1.5), (3840, 3.5)])
def test_texts_grow_with_the_image(side, expected):
    assert relative_size(side) == expected
    width, height = text_size("person 62%")
    larger = text_size("person 62%", expected)
    assert np.allclose(larger, np.multiply((width, height), expected), rtol=0.15)
    assert text_size("")[1] == height
