"""Drawn objects: which pixels change, texts, sizes, and invalid input."""

import cv2
import numpy as np
import pytest
import torch

from tensormask.visualization.colors import UNMATCHED, instance_color
from tensormask.visualization.instances import (
    class_name,
    draw_instances,
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
    """Draw masks only: without boxes, and with empty names."""
    boxes, labels = np.zeros((len(masks), 4)), [0] * len(masks)
    return draw_instances(grey(), boxes, labels, np.stack(masks), class_names=[""])


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
    names = ["star", "disc"]
    texts = ((None, None), (None, names), ([0.5], names), ([0.75], names))
    drawings = [draw_instances(grey(), box, [0], mask, *text) for text in texts]
    assert len({drawn.tobytes() for drawn in drawings}) == 4


def test_the_name_of_an_only_class_is_omitted():
    box = [[100, 150, 200, 250]]

    def draw(scores, names):
        return draw_instances(grey(), box, [0], None, scores, names).tobytes()

    assert draw([0.5], ["star"]) == draw([0.5], ["disc"]) != draw(None, ["star"])
    assert draw([0.5], ["star", "disc"]) != draw([0.5], ["star"])


def test_an_object_of_two_classes_is_drawn_once_with_both_names():
    near, apart = square(100, 150, 200, 250), square(100, 150, 200, 200)
    boxes, scores, names = [[100, 150, 200, 250]] * 2, [0.5, 0.75], ["cat", "dog"]

    def draw(masks, labels=(0, 1)):
        return draw_instances(grey(), boxes, labels, masks, scores, names)

    one = draw_instances(
        *(grey(), boxes[:1], [0], near[None], None, ["dog 75% / cat 50%", ""]),
        colors=[instance_color(1)],
    )
    assert np.array_equal(draw(np.stack([near, near])), one)
    assert not np.array_equal(draw(np.stack([near, near]), labels=(1, 1)), one)
    assert (draw(np.stack([near, apart]))[150, 150] == instance_color(1)).all()  # its own outline
    assert (draw(np.stack([apart, near]))[199, 150] == instance_color(0)).all()


def test_colors_by_class_or_given_by_row():
    masks = np.stack([square(10, 150, 110, 250), square(200, 150, 300, 250)])
    boxes = [[10, 150, 110, 250], [200, 150, 300, 250]]

    def outlines(**options):
        return draw_instances(grey(), boxes, [4, 4], masks, **options)[200, [10, 200]].tolist()

    assert outlines() == [[*instance_color(0)], [*instance_color(1)]]
    assert outlines(color_by="class") == [[*instance_color(4)]] * 2
    given = [[1, 2, 3], [250, 5, 6]]
    assert outlines(colors=given) == outlines(colors=torch.tensor(given)) == given
    with pytest.raises(ValueError, match="'klass'; expected 'instance' or 'class'"):
        outlines(color_by="klass")
    with pytest.raises(ValueError, match=r"expected \(2, 3\)"):
        outlines(colors=given[:1])


def test_lines_are_wider_in_large_images():
    drawn = draw_instances(grey(40, 3840), [[9, 5, 39, 35]], [0], None, class_names=[""])
    assert (drawn[20, 9:13] == instance_color(0)).all()  # inside of the box
    assert (drawn[20, [8, 13]] == 100).all()
    mask = square(9, 5, 39, 35, 40, 3840)[None]
    drawn = draw_instances(grey(40, 3840), np.zeros((1, 4)), [0], mask, class_names=[""])
    assert (drawn[20, 9:16] == instance_color(0)).all()
    assert not (drawn[20, 17] == instance_color(0)).any()


def test_thin_masks_are_drawn_and_those_at_the_border_are_closed():
    masks = np.stack([square(50, 300, 400, 301), square(400, 0, 500, 400)])
    drawn = draw_masks(*masks)
    assert (drawn[300, 50:399] == instance_color(0)).all()
    assert (drawn[[0, 399, 200, 200], [450, 450, 400, 499]] == instance_color(1)).all()


def test_tensors_are_accepted():
    arrays = [np.array([[100.0, 150, 200, 250]]), np.array([3]), square(100, 150, 200, 250)[None]]
    arrays.append(np.array([0.5]))
    tensors = [torch.from_numpy(array) for array in arrays]
    tensors[0].requires_grad_()
    assert np.array_equal(draw_instances(grey(), *arrays), draw_instances(grey(), *tensors))


def test_without_a_valid_box_a_mask_has_the_label_and_no_mask_is_not_drawn():
    boxes = [[float("nan")] * 4, [9, 9, 5, 5], [0, 0, float("inf"), 9]]
    assert (draw_instances(grey(), boxes, [0] * 3, None) == 100).all()
    mask = square(100, 150, 200, 250)[None]
    labelled = draw_instances(grey(), [[100, 150, 200, 250]], [0], mask, draw_boxes=False)
    assert np.array_equal(draw_instances(grey(), boxes[:1], [0], mask), labelled)


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


def test_colors_are_told_apart():
    colors = [UNMATCHED, *map(instance_color, range(80))]
    lab = cv2.cvtColor(np.float32(colors)[None] / 255, cv2.COLOR_RGB2LAB)[0]
    distances = np.linalg.norm(lab[:, None] - lab, axis=2) + 1000 * np.eye(len(lab))
    assert distances[0].min() > 50  # 2 are just seen
    for num, least in ((8, 50), (20, 20), (80, 16)):
        assert distances[1 : num + 1, 1 : num + 1].min() > least
    assert instance_color(80) == instance_color(0)


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
