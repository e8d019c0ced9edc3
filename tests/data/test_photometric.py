"""Photometric distortion: colors by hand, and what is drawn."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tensormask.data.photometric import Distortion, draw_distortion


@pytest.mark.parametrize(
    "name, factor, expected",
    [
        ("brightness", 1.5, (150, 60, 0)),
        ("saturation", 0.0, (53, 53, 53)),  # 0.299 * 100 + 0.587 * 40
        ("contrast", 0.0, (53, 53, 53)),  # the mean of the gray image
        ("hue", 1 / 3, (0, 100, 40)),  # a third of the circle: red becomes green
    ],
)
def test_colors_by_hand(name, factor, expected):
    image = Image.new("RGB", (3, 2), (100, 40, 0))
    changed = np.asarray(Distortion(((name, factor),))(image)).astype(int)
    assert changed.shape == (2, 3, 3)
    assert np.abs(changed - expected).max() <= 3  # PIL's hue has 256 steps


def test_each_operation_has_the_probability_and_the_range():
    drawn = [draw_distortion(0.5, np.random.default_rng(i)) for i in range(400)]
    assert drawn == [draw_distortion(0.5, np.random.default_rng(i)) for i in range(400)]
    counts = Counter(name for distortion in drawn for name, _ in distortion.steps)
    assert set(counts) == {"brightness", "contrast", "saturation", "hue"}
    assert all(150 < count < 250 for count in counts.values())
    shifts = [factor for d in drawn for name, factor in d.steps if name == "hue"]
    assert -0.05 <= min(shifts) < 0 < max(shifts) <= 0.05
    orders = {
        tuple(name for name, _ in draw_distortion(1, np.random.default_rng(i)).steps)
        for i in range(20)
    }
    assert len(orders) == 2
    assert draw_distortion(0, np.random.default_rng(0)).steps == ()
