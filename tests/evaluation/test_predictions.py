"""Predictions beside ground truth: which objects are drawn, and in which colors."""

import numpy as np
import pytest
from grey import GreyDataset, annotation, coco_json, rectangle

from tensormask.evaluation.predictions import draw_beside, evenly_spread, ground_truth
from tensormask.visualization.colors import UNMATCHED, instance_color
from tensormask.visualization.instances import magnification

GREY = np.full((128, 160, 3), 90, np.uint8)
NONE = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "scores": np.zeros(0)}


def panels(dataset, found):
    """The drawings without their titles, in the size of the image, which they show magnified."""
    factor = magnification(128, 160)
    drawn = draw_beside(GREY, dataset, 1, found, 0.3)[-factor * 128 :]
    return drawn[::factor, : factor * 160 : factor], drawn[::factor, -factor * 160 :: factor]


def test_all_objects_but_crowds_are_drawn(tmp_path):
    truth = [
        annotation(1, 1, 4, rectangle(10, 10, 40, 40)),
        annotation(2, 1, 4, rectangle(80, 60, 120, 110), iscrowd=1),
        annotation(3, 1, 4, rectangle(50, 90, 70, 120)) | {"bbox": None},
        annotation(4, 1, 4, rectangle(20, 90, 40, 120)) | {"segmentation": []},
        annotation(5, 1, 4, rectangle(1, 1, 4, 4)) | {"segmentation": [], "bbox": None},
    ]
    dataset = GreyDataset(coco_json(truth), tmp_path)
    assert ground_truth((128, 160), dataset, 1)[3] == 1
    _, image = panels(dataset, NONE)
    assert (image[25, 25] != 90).any()
    assert (image[105, 60] != 90).any()  # a mask without a box
    assert (image[90, 20] != 90).any()  # a box without a mask
    assert (image[2, 2] == 90).all()
    assert (image[85, 100] == 90).all()


@pytest.mark.parametrize("with_masks", [True, False])
def test_a_match_has_the_color_of_its_object_and_the_rest_is_red(tmp_path, with_masks):
    near, missed, apart = (10, 50, 40, 90), (60, 50, 90, 90), (110, 50, 140, 90)
    truth = [annotation(i, 1, 4, rectangle(*box)) for i, box in ((1, missed), (2, near))]
    found = {
        "boxes": np.array([[11, 51, 40, 90], near, apart]),
        "labels": np.array([1, 1, 1]),
        "scores": np.array([0.5, 0.9, 0.8]),
    }
    if with_masks:
        found["masks"] = np.stack([rectangle(*box) for box in found["boxes"].tolist()])
    predicted, drawn_truth = panels(GreyDataset(coco_json(truth), tmp_path), found)
    assert (predicted[70, 10] == instance_color(1)).all()  # of the second object
    assert (drawn_truth[70, 10] == instance_color(1)).all()
    assert (predicted[70, 11] == UNMATCHED).all()  # the object is taken
    assert (predicted[70, 110] == UNMATCHED).all()
    assert (drawn_truth[70, 60] == UNMATCHED).all()

    predicted, _ = panels(GreyDataset(coco_json([]), tmp_path), found)  # nothing to be matched
    assert (predicted[70, 110] == instance_color(1)).all()


@pytest.mark.parametrize(
    "count, expected", [(0, []), (1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (99, list(range(10)))]
)
def test_evenly_spread(count, expected):
    assert evenly_spread(list(range(10)), count) == expected
