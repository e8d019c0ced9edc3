"""Test-time augmentation: what each input is, where its detections are, and how they merge."""

import pytest
import torch
from torch import nn

from tensormask.config import get_cfg
from tensormask.evaluation.tta import (
    AugmentedDetector,
    build_augmented_detector,
    check_sizes,
    merge,
    mirrored,
)
from tensormask.utils.errors import UserError


def detection(boxes, scores, labels, masks, windows=None):
    boxes = torch.as_tensor(boxes, dtype=torch.float32)
    return {
        "boxes": boxes,
        "scores": torch.tensor(scores),
        "labels": torch.tensor(labels),
        "windows": boxes if windows is None else torch.tensor(windows, dtype=torch.float32),
        "window_masks": [torch.as_tensor(mask, dtype=torch.float32) for mask in masks],
    }


class RedDetector(nn.Module):
    """Finds the red part of an image; the mask is how green that is."""

    nms_threshold, class_agnostic_nms, num_detections = 0.5, False, 100

    def __init__(self):
        super().__init__()
        self.seen, self.options = [], {}

    def detect(self, images, output_sizes, **options):
        (image,), (size,) = images, output_sizes
        self.seen.append(tuple(image.shape[1:]))
        self.options = options
        rows, columns = (torch.where((image[0] > 128).any(dim))[0] for dim in (1, 0))
        y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        scale = torch.tensor([size[1] / image.shape[2], size[0] / image.shape[1]] * 2)
        mask = image[1, y0:y1, x0:x1] / 255
        box = (torch.stack([x0, y0, x1, y1]) * scale).tolist()
        return [detection([box], [len(self.seen) / 10], [1], [mask.tolist()])]


def test_inputs_of_several_sizes_and_their_flips():
    """A red rectangle with a green left half, in an image that is scaled by 2 in the output."""
    image = torch.zeros(3, 10, 20, dtype=torch.uint8)
    image[0, 2:6, 4:12] = 255
    image[1, 2:6, 4:8] = 255
    model = RedDetector()
    detector = AugmentedDetector(model, min_sizes=(10, 20), max_size=30, flip=True)
    (found,) = detector([image], [(20, 40)], num_detections=3)
    assert model.seen == [(10, 20), (10, 20), (15, 30), (15, 30)]  # 30 is the limit
    assert model.options == {"num_detections": 3}
    assert found["scores"].tolist() == pytest.approx([0.4])
    assert found["boxes"][0].tolist() == pytest.approx([8, 4, 24, 12], abs=1.5)
    (mask,) = found["window_masks"]
    assert (mask[:, :4] > 0.7).all()
    assert (mask[:, -4:] < 0.3).all()
    model.seen.clear()
    AugmentedDetector(model, min_sizes=(10,), max_size=30, flip=False)([image])
    assert model.seen == [(10, 20)]


def test_detections_of_a_mirror_image_by_hand():
    found = detection([[1, 2, 4, 5]], [0.5], [0], [[[0.1, 0.2], [0.3, 0.4]]], [[0, 2, 6, 8]])
    result = mirrored(found, width=10)
    assert result["boxes"].tolist() == [[6, 2, 9, 5]]
    assert result["windows"].tolist() == [[4, 2, 10, 8]]
    assert torch.equal(result["window_masks"][0], torch.tensor([[0.2, 0.1], [0.4, 0.3]]))
    assert mirrored({"boxes": found["boxes"]}, 10).keys() == {"boxes"}  # without masks


def test_merged_masks_by_hand():
    """Three of a class are one object; another class, and an object elsewhere, are not."""
    first = detection(
        [[0, 0, 8, 8], [20, 0, 28, 8]], [0.6, 0.2], [0, 0], [[[1, 0], [1, 0]], [[1, 1], [1, 1]]]
    )
    second = detection(
        [[0, 0, 8, 8], [0, 0, 8, 8], [0, 0, 8, 7]],
        [0.7, 0.3, 0.1],
        [1, 0, 0],
        # The last one has half the pixels: 0 and 1 are in the middle of pixels of the first.
        [[[0, 0], [0, 0]], [[0, 1], [1, 0]], [[1]]],
        [[0, 0, 8, 8], [0, 0, 8, 8], [0, 0, 8, 8]],
    )
    merged = merge([first, second], 0.5, class_agnostic=False, num_detections=9)
    assert merged["scores"].tolist() == pytest.approx([0.7, 0.6, 0.2])
    assert merged["labels"].tolist() == [1, 0, 0]
    assert merged["boxes"].tolist() == [[0, 0, 8, 8], [0, 0, 8, 8], [20, 0, 28, 8]]
    assert merged["window_masks"][0].tolist() == [[0, 0], [0, 0]]
    expected = torch.tensor([[0.6 + 0.1, 0.3 + 0.1], [0.6 + 0.3 + 0.1, 0.1]])
    torch.testing.assert_close(merged["window_masks"][1], expected)
    assert merged["window_masks"][2].tolist() == [[1, 1], [1, 1]]
    # If classes suppress each other, the best one has them all: weights 0.7, 0.6, 0.3 and 0.1.
    (one,) = merge([first, second], 0.5, class_agnostic=True, num_detections=1)["window_masks"]
    torch.testing.assert_close(one, torch.tensor([[0.7, 0.4], [1.0, 0.1]]) / 1.7)


def test_merging_one_input_after_the_other():
    """Each mask counts once, whatever was merged before: (0.5 * 0 + 0.3 * 1 + 0.2 * 1) / 1."""
    merged = None
    for score, value in ((0.5, 0.0), (0.3, 1.0), (0.2, 1.0)):
        found = detection([[0, 0, 8, 8]], [score], [0], [[[value]]])
        parts = [found] if merged is None else [merged, found]
        merged = merge(parts, 0.5, class_agnostic=False, num_detections=9)
    assert merged["scores"].tolist() == [0.5]
    assert merged["weights"].tolist() == pytest.approx([1.0])
    assert merged["window_masks"][0].item() == pytest.approx(0.5)


def test_a_mask_is_resampled_to_the_window_of_the_best():
    """The other window begins 2 px to the right: the right half lies there, the left is outside."""
    best = detection([[0, 0, 8, 8]], [0.5], [0], [torch.ones(4, 4)], [[0, 0, 8, 8]])
    other = detection([[0, 0, 8, 8]], [0.5], [0], [[[0.0, 0.2, 0.4, 0.6]] * 4], [[4.0, 0, 12, 8]])
    (mask,) = merge([best, other], 0.5, class_agnostic=False, num_detections=1)["window_masks"]
    torch.testing.assert_close(mask[0], torch.tensor([0.5, 0.5, 0.5, 0.6]))


def test_nothing_to_merge():
    nothing = detection(torch.zeros(0, 4), [], [], [])
    nothing["labels"] = torch.zeros(0, dtype=torch.int64)
    merged = merge([nothing, nothing], 0.5, class_agnostic=False, num_detections=3)
    assert (len(merged["boxes"]), merged["window_masks"]) == (0, [])
    found = detection([[0, 0, 8, 8]], [0.5], [0], [[[1]]])
    assert not merge([found], 0.5, class_agnostic=False, num_detections=0)["window_masks"]


def test_sizes_that_are_no_sizes():
    for sizes, longest in ((), 9), ((4, 0), 9), ((4,), 0):
        with pytest.raises(UserError, match=r"TEST\.AUG\.MIN_SIZES"):
            check_sizes(sizes, longest)


def test_a_model_of_another_kind_is_evaluated_without(caplog):
    cfg = get_cfg()
    assert build_augmented_detector(cfg, RedDetector()) is None
    assert not caplog.records
    cfg.TEST.AUG.ENABLED = True
    assert build_augmented_detector(cfg, RedDetector()) is None
    assert "a RedDetector has no such test" in caplog.text
