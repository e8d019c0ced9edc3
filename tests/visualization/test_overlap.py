"""IoU, matches of detections to the ground truth, and objects of several classes."""

import numpy as np
import pytest

from tensormask.visualization.overlap import box_iou, group_duplicates, mask_extents, match

NAN, INF = float("nan"), float("inf")


def paint(boxes, height=60, width=80):
    masks = np.zeros((len(boxes), height, width), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def test_mask_extents():
    boxes = [[3, 4, 10, 5], [0, 0, 80, 60], [5, 5, 5, 5], [79, 59, 80, 60]]
    assert mask_extents(paint(boxes)).tolist() == [*boxes[:2], [0, 0, 0, 0], boxes[3]]
    assert mask_extents(paint([])).shape == (0, 4)


def test_box_iou():
    boxes = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [3, 3, 3, 9], [NAN, 0, 9, 9], [0, 0, INF, 9]])
    expected = np.zeros((5, 5))
    expected[0, 0] = expected[1, 1] = 1
    expected[0, 1] = expected[1, 0] = 1 / 3
    assert np.array_equal(box_iou(boxes, boxes)[:4], expected[:4])
    assert box_iou(boxes, boxes[:0]).shape == (5, 0)


@pytest.mark.parametrize("with_masks", [True, False])
def test_match(with_masks):
    truth = [[0, 0, 20, 20], [12, 0, 32, 20], [50, 30, 70, 50]]
    found = [[1, 0, 20, 20], [0, 0, 20, 20], [10, 0, 30, 20], [50, 41, 70, 50]]
    masks, gt_masks = (paint(found), paint(truth)) if with_masks else (None, None)
    rows = match(np.array(found), masks, np.array(truth), gt_masks)
    assert rows.tolist() == [0, -1, 1, -1]  # the better score first, and IoU >= 0.5
    assert match(np.array(found), masks, np.zeros((0, 4)), None).tolist() == [-1] * 4


def test_masks_decide_where_both_have_one():
    box = np.array([[0, 0, 20, 20]])
    half, other_half = paint([[0, 0, 20, 10]]), paint([[0, 10, 20, 20]])
    assert match(box, half, box, other_half).tolist() == [-1]
    assert match(box, half, np.array([[40, 40, 50, 50]]), half).tolist() == [0]
    assert match(box, half, box, paint([[0, 0, 0, 0]])).tolist() == [0]


def test_group_duplicates():
    boxes = np.array(
        [[0, 0, 20, 20], [0, 0, 20, 19], [0, 0, 20, 20], [0, 0, 20, 20], [9, 9, 29, 29]]
    )
    labels = np.array([0, 1, 0, 2, 5])

    def group(order, masks=None):
        extents = None if masks is None else mask_extents(masks)
        return group_duplicates(order, labels, boxes, masks, extents)

    assert group([0, 1, 2, 3, 4]) == [[0, 1, 3], [2], [4]]
    assert group([3, 4, 2, 1, 0]) == [[3, 2, 1], [4], [0]]
    masks = paint(boxes.tolist())
    assert group([0, 1, 2, 3, 4], masks) == [[0, 1, 3], [2], [4]]
    masks[1, :8] = False
    assert group([0, 1, 2, 3, 4], masks) == [[0, 3], [1], [2], [4]]
