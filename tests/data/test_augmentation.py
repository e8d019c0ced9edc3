"""What is drawn: detectron2's crops, scale jitter, zoom-out, rotations and flips."""

from collections import Counter

import numpy as np
import pytest

from tensormask.config import get_cfg
from tensormask.data.augmentation import (
    Augmentation,
    RandomCrop,
    build_train_transform,
    fitted_size,
)

SIZE = (40, 60)


def drawn(count=300, size=SIZE, **options):
    augmentation = Augmentation(**{"min_sizes": (0,), "max_size": 100, **options})
    return [augmentation.draw(size, np.random.default_rng(i)) for i in range(count)]


@pytest.mark.parametrize(
    "kind, size, heights, widths",
    [
        ("absolute", (30, 100), (30, 30), (60, 60)),  # the image is narrower than 100
        ("relative", (0.5, 0.26), (20, 20), (16, 16)),  # 15.6 rounds up
        ("relative_range", (0.5, 0.9), (20, 40), (54, 60)),
        ("absolute_range", (10, 50), (10, 40), (10, 50)),
        ("relative", (0.01, 1), (1, 1), (60, 60)),  # 0.4 would round to 0
    ],
)
def test_crops_by_hand(kind, size, heights, widths):
    crops = [RandomCrop(kind, size).draw(SIZE, np.random.default_rng(i)) for i in range(400)]
    for limits, sides in ((heights, [c.height for c in crops]), (widths, [c.width for c in crops])):
        assert (min(sides), max(sides)) == limits
        assert np.mean(sides) == pytest.approx(np.mean(limits), abs=2)  # uniform
    # Each offset in the image is possible.
    assert min(crop.top for crop in crops) == min(crop.left for crop in crops) == 0
    assert max(crop.top + crop.height for crop in crops) == SIZE[0]
    assert max(crop.left + crop.width for crop in crops) == SIZE[1]


def test_the_crop_comes_before_the_resize():
    crop = RandomCrop("absolute", (10, 20))
    assert {g.new_size for g in drawn(3, crop=crop, min_sizes=(5,))} == {(5, 10)}


@pytest.mark.parametrize("rotate", [False, True])
def test_scale_jitter_has_one_output_size_and_a_range_of_scales(rotate):
    geometries = drawn(scale_jitter=(0.1, 2.0), jitter_size=(32, 48), rotate=rotate)
    assert {geometry.output_size for geometry in geometries} == {(32, 48)}
    upright = [g for g in geometries if g.quarter_turns % 2 == 0]
    heights = [geometry.new_size[0] for geometry in upright]
    assert (min(heights), max(heights)) == pytest.approx((3, 64), abs=2)
    for geometry in upright:
        _, _, height, width = geometry.visible
        # Padded at the right and bottom only if the image is smaller than the window.
        assert (height, width) == tuple(map(min, geometry.new_size, (32, 48)))
        assert geometry.visible[:2] == (0, 0)


def test_fitted_size_by_hand():
    assert fitted_size((40, 60), (32, 48), 1.0) == (32, 48)
    assert fitted_size((40, 60), (32, 24), 2.0) == (32, 48)  # the width decides
    assert fitted_size((1, 1000), (10, 10), 0.1) == (1, 1)


def test_zoom_out_keeps_the_size_of_the_canvas():
    geometries = drawn(zoom_out=0.5)
    zoomed = [geometry for geometry in geometries if geometry.window is not None]
    assert 100 < len(zoomed) < 200
    for geometry in geometries:
        assert geometry.output_size == SIZE
        assert geometry.visible[2:] == geometry.new_size
    ratios = [40 / geometry.new_size[0] for geometry in zoomed]
    assert 1 <= min(ratios) < 1.3
    assert 3.5 < max(ratios) <= 4
    with_jitter = drawn(zoom_out=1.0, scale_jitter=(1.0, 1.0), jitter_size=SIZE)
    assert all(g.visible[2:] == g.new_size for g in with_jitter)
    assert max(g.visible.top for g in with_jitter) > 10
    assert max(g.visible.left for g in with_jitter) > 15


def test_flips_and_rotations_are_equally_likely():
    geometries = drawn(1600, flip="both", rotate=True)
    counts = Counter((geometry.flip, geometry.quarter_turns) for geometry in geometries)
    assert len(counts) == 16
    assert min(counts.values()) > 60
    assert max(counts.values()) < 140


def test_new_draws_do_not_change_those_of_the_default():
    everything = {"rotate": True, "crop": RandomCrop("absolute", (40, 60)), "zoom_out": 1.0}
    plain = drawn(20, min_sizes=(20, 30), flip="horizontal")
    for before, after in zip(
        plain, drawn(20, min_sizes=(20, 30), flip="horizontal", **everything), strict=True
    ):
        assert before.flip == after.flip
        assert before.new_size == after.window[2:]  # the canvas of the smaller image


def test_from_config():
    cfg = get_cfg()
    assert build_train_transform(cfg) == Augmentation((800,), 1333, flip="horizontal")
    cfg.merge_from_list(
        [
            *("INPUT.RANDOM_FLIP", "both", "INPUT.ROTATE_90", "True"),
            *("INPUT.SCALE_JITTER", "(0.1, 2)", "INPUT.SCALE_JITTER_SIZE", "(512, 640)"),
            *("INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "absolute_range"),
            *("INPUT.CROP.SIZE", "[384, 600]", "INPUT.ZOOM_OUT", "0.5"),
            *("INPUT.PHOTOMETRIC", "0.25", "INPUT.COPY_PASTE", "1"),
        ]
    )
    assert build_train_transform(cfg) == Augmentation(
        (800,),
        1333,
        flip="both",
        rotate=True,
        crop=RandomCrop("absolute_range", (384, 600)),
        scale_jitter=(0.1, 2),
        jitter_size=(512, 640),
        zoom_out=0.5,
        photometric=0.25,
        copy_paste=1.0,
    )


@pytest.mark.parametrize(
    "key, value, named",
    [
        ("INPUT.CROP.TYPE", "half", "absolute_range"),
        ("INPUT.CROP.SIZE", "[384, 600]", "shares"),
        ("INPUT.CROP.SIZE", "[0.9]", "shares"),
        ("INPUT.SCALE_JITTER", "(2, 0.1)", "lowest, highest"),
        ("INPUT.SCALE_JITTER", "('a', 'b')", "lowest, highest"),
        ("INPUT.SCALE_JITTER_SIZE", "(0, 5)", "height, width"),
        ("INPUT.SCALE_JITTER_SIZE", "(512.5, 512)", "height, width"),
        ("INPUT.ZOOM_OUT", "1.5", "probability"),
        ("INPUT.COPY_PASTE", "-0.5", "probability"),
    ],
)
def test_invalid_keys_are_refused_by_name(key, value, named):
    cfg = get_cfg()
    cfg.merge_from_list(["INPUT.CROP.ENABLED", "True", key, value])
    with pytest.raises(ValueError, match=rf"^{key} .*{named}"):
        build_train_transform(cfg)


@pytest.mark.parametrize("kind, size", [("absolute", (0.9, 5)), ("absolute_range", (9, 5))])
def test_invalid_crops_in_pixels_are_refused(kind, size):
    with pytest.raises(ValueError, match=r"INPUT\.CROP\.SIZE.*whole numbers"):
        RandomCrop(kind, size)
