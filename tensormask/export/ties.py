"""What non-maximum suppression (NMS) may keep if scores are rounded in another way.

Two overlapping windows of an object can have scores that are equal but for rounding. Then NMS keeps
one of them in a model, and perhaps the other one in an exported graph. Both are right.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from tensormask.modeling import TensorMask
from tensormask.modeling.candidates import Candidates
from tensormask.modeling.head import DenseOutputs
from tensormask.modeling.inference import boxes_from_masks, find_detections, masks_at_windows

_MAX_IOU_DIFFERENCE = 1e-3  # by rounding of boxes


def possible_detections(
    model: TensorMask,
    image: Tensor,
    actual: dict[str, np.ndarray],
    *,
    min_score: float,
    box_tolerance: float,
    score_tolerance: float,
) -> dict[str, Any] | None:
    """Return the candidates that a graph detects, with the numbers of the model.

    The detections have to be a result of NMS of the model's candidates. It has these properties:
    no detections of a class overlap, and each other candidate overlaps a detection with a score
    that is not lower, up to the tolerance.

    Args:
        image: uint8 (3, height, width).
        actual: ``boxes``, ``scores`` and ``labels`` of the detections of the graph.
        min_score: detections and candidates with lower scores are left out.
        box_tolerance: of boxes, in pixels.
        score_tolerance: of scores.

    Returns:
        the candidate nearest to each detection, as of `TensorMask.detect`; None if they are no
        result of NMS.
    """
    dense = model.dense([image])
    lowest = max(min_score - 2 * score_tolerance, model.score_threshold)
    candidates, nms_boxes = _all_candidates(model, dense, lowest)
    height, width = image.shape[1:]
    limit = candidates.boxes.new_tensor([width, height, width, height])
    candidates = candidates._replace(boxes=candidates.boxes.clamp(min=0).minimum(limit))
    boxes, scores, labels = candidates[:3]
    detected = {name: torch.from_numpy(actual[name]) for name in ("boxes", "scores", "labels")}
    above = detected["scores"] > min_score - score_tolerance
    detected = {name: x[above] for name, x in detected.items()}
    if not len(boxes) or not above.any():
        return None
    of_boxes = torch.cdist(detected["boxes"], boxes, p=torch.inf)
    of_scores = (detected["scores"][:, None] - scores).abs()
    like = (of_scores <= score_tolerance) & (detected["labels"][:, None] == labels)
    distance = of_boxes / box_tolerance + of_scores / score_tolerance
    kept = distance.where(like, torch.inf).argmin(1)

    overlap = box_iou(nms_boxes[kept], nms_boxes)
    if not model.class_agnostic_nms:
        overlap = overlap.where(labels[kept, None] == labels, 0.0)
    is_kept = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, kept, True)
    suppressed = overlap > model.nms_threshold - _MAX_IOU_DIFFERENCE
    suppressed &= scores[kept, None] >= scores - score_tolerance
    is_explained = is_kept | suppressed.any(0) | (scores <= min_score)
    is_explained |= (boxes[:, 2:] <= boxes[:, :2]).any(1)  # outside of the image
    if len(actual["scores"]) == model.num_detections:  # no more have room
        is_explained |= scores <= scores[kept].min() + score_tolerance
    overlaps = (overlap[:, kept] > model.nms_threshold + _MAX_IOU_DIFFERENCE).sum()
    if overlaps > len(kept) or is_kept.sum() < len(kept) or not is_explained.all():
        return None
    candidates = candidates.select(kept)
    found: dict[str, Any] = candidates._asdict()
    if model.mask_head is not None:
        (found["window_masks"],) = masks_at_windows(model.mask_head, dense.features, [candidates])
    return found


def _all_candidates(
    model: TensorMask, dense: DenseOutputs, min_score: float
) -> tuple[Candidates, Tensor]:
    """Return the candidates of an image before NMS, and the boxes (K, 4) that NMS compares."""
    (candidates,) = find_detections(
        dense,
        model.head,
        model.mask_head,
        model.windows,
        box_weights=model.criterion.box_weights,
        score_threshold=min_score,
        num_candidates=model.num_candidates,
        classes=None,
        nms_on=model.nms_on,
        nms_threshold=1.0,
        class_agnostic_nms=False,
        num_detections=model.num_candidates,
    )
    candidates = candidates.select(candidates.scores >= 0)  # without empty masks
    if model.nms_on == "boxes" or model.mask_head is None:
        return candidates, candidates.boxes
    c = candidates
    rows = torch.stack([c.level, c.size, torch.zeros_like(c.y), c.y, c.x], dim=1)
    (boxes,) = boxes_from_masks(model.mask_head, dense.features, [c], [rows])
    return candidates, boxes
