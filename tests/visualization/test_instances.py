"""Drawn objects: which pixels change, texts, sizes, and invalid input."""

import colorsys

import cv2
import numpy as np
import pytest
import torch

from tensormask.visualization.instances import (
    class_name,
    draw_instances,
    instance_color,
    magnification,
    save_image,
    unique_stem,
)


def grey(height=400, width=500, value=100):
    return np.full((height, width, 3), value, np.uint8)


def square(x0, y0, x1, y1, height=400, width=500):
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def draw_masks(*masks):
    """Draw masks without boxes, and with texts in the corner of the image."""
    boxes, labels = np.zeros((len(masks), 4)), [0] * len(masks)
    return draw_instances(grey(), boxes, labels, np.stack(masks), draw_boxes=False)


def test_the_input_is_untouched_and_only_the_object_changes():
    image = grey()
    mask = square(100, 150, 200, 250)
    drawn = draw_instances(image, [[100, 150, 200, 250]], [0], mask[None])
    assert (image == 100).all()
    assert drawn.dtype == np.uint8
    assert drawn.shape == image.shape
    changed = (drawn != image).any(2)
    assert changed[mask].all()
    changed[mask] = False
    rows, columns = np.nonzero(changed)
    # Outside of the mask only the text is drawn, directly above the box.
    assert 120 < rows.min() <= rows.max() < 150
    assert 100 <= columns.min() <= columns.max() < 200


def test_an_outline_in_full_color_around_a_lighter_tint():
    drawn, color = draw_masks(square(100, 150, 200, 250)), np.array(instance_color(0))
    assert (drawn[200, 100:102] == color).all()
    assert (drawn[200, 150] == np.round(0.55 * 100 + 0.45 * color)).all()
    assert (drawn[200, 99] == 100).all()


def test_touching_objects_have_outlines_of_two_colors():
    drawn = draw_masks(square(100, 150, 200, 250), square(200, 150, 300, 250))
    assert (drawn[200, 199] == instance_color(0)).all()
    assert (drawn[200, 200] == instance_color(1)).all()


def test_holes_stay_open_and_are_outlined():
    drawn = draw_masks(square(100, 150, 200, 250) & ~square(130, 180, 170, 220))
    assert (drawn[200, 150] == 100).all()
    assert (drawn[200, 129] == instance_color(0)).all()


def test_a_small_object_is_drawn_on_a_large_one_in_any_order():
    drawn = draw_masks(square(200, 200, 210, 210), square(100, 100, 300, 300))
    assert (drawn[205, 200] == instance_color(0)).all()


def test_small_images_are_magnified_by_whole_factors():
    assert [magnification(64, side) for side in (128, 256, 341, 342, 5000)] == [4, 2, 2, 1, 1]
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    empty = draw_instances(image, np.zeros((0, 4)), [], np.zeros((0, 96, 128)))
    assert np.array_equal(empty, image.repeat(4, 0).repeat(4, 1))
    mask = square(20, 30, 40, 60, 96, 128)
    drawn = draw_instances(image, [[20, 30, 40, 60]], [0], mask[None])
    assert (drawn[4 * 45, 4 * 20] == instance_color(0)).all()
    assert draw_instances(image, [[2, 3, 4, 6]], [0], None, magnify=1).shape == (96, 128, 3)


def test_boxes_only():
    drawn = draw_instances(grey(), [[100, 150, 200, 250]], [0], None, draw_boxes=False)
    assert (drawn[200, [100, 199]] == instance_color(0)).all()
    assert (drawn[200, [150, 200]] == 100).all()


def test_names_and_scores_are_written():
    box, mask = [[100, 150, 200, 250]], square(100, 150, 200, 250)[None]
    texts = ((None, None), (None, ["star"]), ([0.5], ["star"]), ([0.75], ["star"]))
    drawings = [draw_instances(grey(), box, [0], mask, *text) for text in texts]
    assert len({drawn.tobytes() for drawn in drawings}) == 4


def test_texts_do_not_cover_each_other():
    """Five objects with the same box: three texts fit, the others are omitted."""
    box = [100, 150, 200, 250]
    rows_with_text = [
        (draw_instances(grey(), [box] * n, [0] * n, None) == 32).all(2).any(1).sum()
        for n in (1, 2, 3, 5)
    ]
    assert np.array_equal(rows_with_text, np.array([1, 2, 3, 3]) * rows_with_text[0])


def test_crowded_images_have_no_texts():
    boxes = [[10 * i, 10, 10 * i + 8, 20] for i in range(41)]
    assert (draw_instances(grey(), boxes, [0] * 41, None)[:10] == 100).all()
    assert (draw_instances(grey(), boxes[:40], [0] * 40, None)[22:40] != 100).any()


def test_tensors_are_accepted():
    arrays = [np.array([[100.0, 150, 200, 250]]), np.array([3]), square(100, 150, 200, 250)[None]]
    arrays.append(np.array([0.5]))
    tensors = [torch.from_numpy(array) for array in arrays]
    tensors[0].requires_grad_()
    assert np.array_equal(draw_instances(grey(), *arrays), draw_instances(grey(), *tensors))


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (40, 3)])
def test_images_and_objects_of_any_shape(shape):
    masks = np.ones((2, *shape), bool)
    masks[1] = False
    boxes = [[-50, -50, 5000, 5000], [float("nan"), 0, float("inf"), 0]]
    drawn = draw_instances(np.zeros((*shape, 3), np.uint8), boxes, [0, 1], masks, [1.0, 0.0])
    assert drawn.shape == (*(side * magnification(*shape) for side in shape), 3)


@pytest.mark.parametrize(
    "image, labels, masks, message",
    [
        (np.zeros((8, 8, 3)), [0], None, "uint8"),
        (np.zeros((8, 8), np.uint8), [0], None, "uint8"),
        (np.zeros((3, 8, 8), np.uint8), [0], None, "uint8"),
        (np.zeros((0, 8, 3), np.uint8), [0], None, "uint8"),
        (np.zeros((8, 9, 3), np.uint8), [0], np.zeros((1, 9, 8)), "8 x 9"),
        (np.zeros((8, 9, 3), np.uint8), [0], np.zeros((2, 8, 9)), "1 labels"),
        (np.zeros((8, 9, 3), np.uint8), [0, 1], None, "2 labels, 1 boxes"),
    ],
)
def test_inconsistent_arguments_are_refused(image, labels, masks, message):
    with pytest.raises(ValueError, match=message):
        draw_instances(image, [[0, 0, 4, 4]], labels, masks)


def test_class_names_fall_back_to_numbers():
    assert class_name(1, ["a", "b"]) == "b"
    assert class_name(3, ["a", "b"]) == "class 3"
    assert class_name(-1, ["a", "b"]) == "class -1"
    assert class_name(3, None) == "class 3"


def test_colors_are_far_apart():
    colors = [np.array(instance_color(i)) / 255 for i in range(12)]
    hues = sorted(colorsys.rgb_to_hsv(*color)[0] for color in colors)
    # Evenly spread they would be 1/12 = 0.083 apart.
    assert np.diff([*hues, hues[0] + 1]).min() > 0.03


def test_saved_images_are_rgb(tmp_path):
    image = grey()
    image[..., 0] = 250
    path = tmp_path / "new folder" / "é.png"
    save_image(path, image)
    stored = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR_RGB)
    assert np.array_equal(stored, image)
    with pytest.raises(ValueError, match="xyz"):
        save_image(tmp_path / "a.xyz", image)


def test_unique_stem():
    taken = set()
    stems = [unique_stem(stem, taken) for stem in ("a", "b", "a", "a_2", "a")]
    assert stems == ["a", "b", "a_2", "a_2_2", "a_3"]
