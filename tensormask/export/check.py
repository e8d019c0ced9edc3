"""Compare an exported graph with its model on images."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tensormask.export.runtime import paste_masks
from tensormask.layers import paste_masks as paste
from tensormask.modeling import TensorMask

MIN_SCORE = 0.3  # of the detections that are compared
MAX_BOX_DIFFERENCE = 0.1  # pixels
MAX_SCORE_DIFFERENCE = 1e-4
MIN_MASK_IOU = 0.995
# Of a mask: the IoU of a small one is less if a single pixel differs.
_FEW_PIXELS = 2

Run = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass
class Differences:
    """The largest differences between detections of a graph and of its model."""

    num_detections: int = 0
    boxes: float = 0.0  # pixels
    scores: float = 0.0
    mask_iou: float = 1.0  # the smallest
    mask_pixels: int = 0
    num_unmatched: int = 0
    num_bad_masks: int = 0

    @property
    def too_large(self) -> bool:
        """Whether the file must not be used."""
        return (
            self.num_unmatched > 0
            or self.num_bad_masks > 0
            or not self.boxes <= MAX_BOX_DIFFERENCE
            or not self.scores <= MAX_SCORE_DIFFERENCE
        )

    def __str__(self) -> str:
        return (
            f"{self.num_detections} detections: boxes {self.boxes:.2g} px, scores "
            f"{self.scores:.2g}, smallest mask IoU {self.mask_iou:.4f} ({self.mask_pixels} px "
            f"differ), without a counterpart {self.num_unmatched}"
        )


def compare(model: TensorMask, run: Run, images: Iterable[np.ndarray]) -> Differences:
    """Compare detections with scores above 0.3, or all where no score is above it.

    Detections are matched one to one: each to the one of its label with the nearest box.

    Args:
        model: in eval mode, on the CPU.
        run: from uint8 (1, height, width, 3) to the outputs of a `DetectionGraph`, as of
            `OnnxPredictor.run`.
        images: uint8 (height, width, 3), RGB, of the graph's size.
    """
    found = []
    for image in images:
        with torch.inference_mode():
            expected = model.detect([torch.from_numpy(image.transpose(2, 0, 1).copy())])[0]
        found.append((image.shape[:2], expected, run(image[None])))
    scores = [score for _, expected, _ in found for score in expected["scores"]]
    threshold = MIN_SCORE if any(score > MIN_SCORE for score in scores) else 0.0
    differences = Differences()
    for size, expected, actual in found:
        _compare(differences, expected, actual, size, threshold)
    return differences


def _compare(
    differences: Differences,
    expected: dict[str, Any],
    actual: dict[str, np.ndarray],
    size: tuple[int, int],
    threshold: float,
) -> None:
    """Add the differences of an image."""
    count = int(actual["num_detections"][0])
    actual = {name: x[0][:count] for name, x in actual.items() if name != "num_detections"}
    boxes, scores, labels = (expected[name].numpy() for name in ("boxes", "scores", "labels"))
    pairs, free = [], np.ones(count, bool)
    # A score next to the threshold may be on its other side.
    for row in np.flatnonzero(scores > threshold):
        distance = np.abs(actual["boxes"] - boxes[row]).max(1) if count else np.zeros(0)
        distance = np.where(free & (actual["labels"] == labels[row]), distance, np.inf)
        if not np.isfinite(distance).any():
            differences.num_unmatched += 1
            continue
        other = int(distance.argmin())
        free[other] = False
        pairs.append((row, other))
    others = free & (actual["scores"] > threshold + MAX_SCORE_DIFFERENCE)
    differences.num_unmatched += int(others.sum())
    if not pairs:
        return
    rows, other_rows = (np.array(column) for column in zip(*pairs, strict=True))
    differences.num_detections += len(rows)
    for name, values in (("boxes", boxes), ("scores", scores)):
        largest = float(np.abs(actual[name][other_rows] - values[rows]).max())
        setattr(differences, name, max(getattr(differences, name), largest))
    if "masks" not in actual:
        return
    window_masks = [expected["window_masks"][row] for row in rows]
    theirs = paste(window_masks, expected["windows"][rows], size).numpy()
    ours = paste_masks(actual["masks"][other_rows], actual["mask_boxes"][other_rows], size)
    for mask, other_mask in zip(theirs, ours, strict=True):
        pixels, union = int((mask ^ other_mask).sum()), int((mask | other_mask).sum())
        iou = 1 - pixels / max(union, 1)
        differences.mask_iou = min(differences.mask_iou, iou)
        differences.mask_pixels = max(differences.mask_pixels, pixels)
        differences.num_bad_masks += iou < MIN_MASK_IOU and pixels > _FEW_PIXELS
