"""Compare the detections of an exported graph with those of its model on images."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tensormask.export.runtime import paste_masks
from tensormask.export.ties import possible_detections
from tensormask.layers import paste_masks as paste
from tensormask.modeling import TensorMask

MIN_SCORE = 0.3  # of the detections that are compared
MAX_BOX_DIFFERENCE = 0.1  # pixels
MAX_SCORE_DIFFERENCE = 1e-4
MIN_MASK_IOU = 0.995
# Of a mask: the IoU of a small one is less if a single pixel differs.
_FEW_PIXELS = 2

Run = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Differences:
    """The largest differences between detections of a graph and of its model."""

    num_detections: int = 0
    boxes: float = 0.0  # pixels
    scores: float = 0.0
    mask_iou: float = 1.0  # the smallest
    mask_pixels: int = 0
    num_unmatched: int = 0
    num_bad: int = 0  # unmatched, or with differences that are too large
    num_ties: int = 0  # of another window than the model's, see `ties`

    @property
    def too_large(self) -> bool:
        """Whether the file must not be used."""
        return self.num_bad > 0

    def __str__(self) -> str:
        text = (
            f"{self.num_detections} detections: boxes {self.boxes:.2g} px, scores "
            f"{self.scores:.2g}, smallest mask IoU {self.mask_iou:.4f} ({self.mask_pixels} px "
            f"differ), without a counterpart {self.num_unmatched}"
        )
        if self.num_ties:
            text += f"; of an overlapping window with the same score {self.num_ties}"
        return text

    def __add__(self, other: "Differences") -> "Differences":
        return Differences(
            self.num_detections + other.num_detections,
            max(self.boxes, other.boxes),
            max(self.scores, other.scores),
            min(self.mask_iou, other.mask_iou),
            max(self.mask_pixels, other.mask_pixels),
            self.num_unmatched + other.num_unmatched,
            self.num_bad + other.num_bad,
            self.num_ties + other.num_ties,
        )


def compare(model: TensorMask, run: Run, images: Iterable[np.ndarray]) -> Differences:
    """Compare detections with scores above 0.3, or all where no score is above it.

    Detections are matched one to one: each to the one of its label with the nearest box and score.
    Where they differ, the graph may have kept other windows with the same scores: see `ties`.

    Args:
        model: in eval mode, on the CPU.
        run: from uint8 (1, height, width, 3) to the outputs of a `DetectionGraph`, as of
            `OnnxPredictor.run`.
        images: uint8 (height, width, 3), RGB, of the graph's size.
    """
    found = []
    for image in images:
        pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())
        with torch.inference_mode():
            expected = model.detect([pixels])[0]
        outputs = run(image[None])
        count = int(outputs.pop("num_detections")[0])
        found.append((pixels, expected, {name: x[0][:count] for name, x in outputs.items()}))
    scores = [score for _, expected, _ in found for score in expected["scores"]]
    threshold = MIN_SCORE if any(score > MIN_SCORE for score in scores) else 0.0
    total = Differences()
    for pixels, expected, actual in found:
        size = (pixels.shape[1], pixels.shape[2])
        differences = _compare(expected, actual, size, threshold)
        if differences.too_large:
            with torch.inference_mode():
                possible = possible_detections(
                    model,
                    pixels,
                    actual,
                    min_score=threshold,
                    box_tolerance=MAX_BOX_DIFFERENCE,
                    score_tolerance=MAX_SCORE_DIFFERENCE,
                )
            if possible is not None:
                of_ties = _compare(possible, actual, size, threshold)
                if not of_ties.too_large:
                    differences = replace(of_ties, num_ties=differences.num_bad)
        total += differences
    return total


def _compare(
    expected: dict[str, Any],
    actual: dict[str, np.ndarray],
    size: tuple[int, int],
    threshold: float,
) -> Differences:
    """Return the differences of an image."""
    count = len(actual["scores"])
    boxes, scores, labels = (expected[name].numpy() for name in ("boxes", "scores", "labels"))
    pairs, free = [], np.ones(count, bool)
    num_unmatched = 0
    # A score next to the threshold may be on its other side.
    for row in np.flatnonzero(scores > threshold):
        of_boxes = np.abs(actual["boxes"] - boxes[row]).max(1) if count else np.zeros(0)
        of_scores = np.abs(actual["scores"] - scores[row])
        distance = of_boxes / MAX_BOX_DIFFERENCE + of_scores / MAX_SCORE_DIFFERENCE
        distance = np.where(free & (actual["labels"] == labels[row]), distance, np.inf)
        if not np.isfinite(distance).any():
            num_unmatched += 1
            continue
        other = int(distance.argmin())
        free[other] = False
        pairs.append((row, other))
    num_unmatched += int((free & (actual["scores"] > threshold + MAX_SCORE_DIFFERENCE)).sum())
    if not pairs:
        return Differences(num_unmatched=num_unmatched, num_bad=num_unmatched)
    rows, other_rows = (np.array(column) for column in zip(*pairs, strict=True))
    of_boxes = np.abs(actual["boxes"][other_rows] - boxes[rows]).max(1)
    of_scores = np.abs(actual["scores"][other_rows] - scores[rows])
    is_good = (of_boxes <= MAX_BOX_DIFFERENCE) & (of_scores <= MAX_SCORE_DIFFERENCE)
    pixels, iou = np.zeros(len(rows), int), np.ones(len(rows))
    if "masks" in actual:
        window_masks = [expected["window_masks"][row] for row in rows]
        theirs = paste(window_masks, expected["windows"][rows], size).numpy()
        ours = paste_masks(actual["masks"][other_rows], actual["mask_boxes"][other_rows], size)
        pixels = (theirs ^ ours).sum((1, 2))
        iou = 1 - pixels / np.maximum((theirs | ours).sum((1, 2)), 1)
        is_good &= (iou >= MIN_MASK_IOU) | (pixels <= _FEW_PIXELS)
    return Differences(
        num_detections=len(rows),
        boxes=float(of_boxes.max()),
        scores=float(of_scores.max()),
        mask_iou=float(iou.min()),
        mask_pixels=int(pixels.max()),
        num_unmatched=num_unmatched,
        num_bad=num_unmatched + int((~is_good).sum()),
    )
