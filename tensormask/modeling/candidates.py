"""Candidates for detections: the best (window, class) pairs of an image."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tensormask.layers.masks import to_device
from tensormask.modeling.box_coder import decode_boxes
from tensormask.modeling.head import ClassBoxHead, DenseOutputs
from tensormask.modeling.windows import Windows

# Scores above it are candidates if a lower threshold is not asked for, see `find_candidates`.
_ENOUGH = 0.05


class Candidates(NamedTuple):
    """K (window, class) pairs of an image, best first; int64 (K,) unless stated."""

    boxes: Tensor  # (K, 4) float, pixels of the network's input
    scores: Tensor  # (K,) float
    labels: Tensor
    level: Tensor
    size: Tensor
    y: Tensor
    x: Tensor
    windows: Tensor  # (K, 4) float, the boxes of the windows

    def select(self, rows: Tensor) -> "Candidates":
        """Return the candidates at an index or a bool mask."""
        return Candidates(*(column[rows] for column in self))


def find_candidates(
    logits_per_level: list[Tensor],
    outputs_at: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None,
    windows: Windows,
    *,
    box_weights: tuple[float, ...],
    score_threshold: float,
    num_candidates: int,
    mask_iou: bool = False,
    classes: Sequence[int] | None = None,
) -> Candidates:
    """Return the best (window, class) pairs of one image, before NMS.

    On a GPU their number does not depend on the scores, because the host would wait for it: pairs
    that are not above the threshold follow, with score -1.

    With ``mask_iou``, the final score is the geometric mean of the class score and the predicted
    IoU of the mask (Huang et al., arXiv 1903.00241, multiply them, which orders candidates alike).
    It has to be above the threshold; the class score may be lower, down to the smaller of the
    threshold and 0.05. The candidates are those with the best class scores.

    Args:
        logits_per_level: per level (num_sizes * num_classes, H, W).
        outputs_at: from ``(level, size, y, x)`` of K windows, int64 (K,) each, to the outputs of
            the box head (K, 4) or (K, 5), the deltas of their boxes and the logits of the IoUs.
            None without a box head: the boxes are then the windows.
        windows: their geometry.
        box_weights: of `box_coder`.
        score_threshold: scores must be above it.
        num_candidates: the maximum over all levels.
        mask_iou: whether the outputs have IoUs.
        classes: labels of the candidates; None for all.
    """
    threshold = logit_threshold(score_threshold, mask_iou=mask_iou)
    device = logits_per_level[0].device
    num_labels = len(logits_per_level[0]) // windows.num_sizes
    if classes is not None:
        num_labels = len(classes)
        labels_of = to_device(torch.tensor(classes, dtype=torch.int64), device)

    def flat(logits: Tensor) -> Tensor:
        logits = logits.unflatten(0, (windows.num_sizes, -1))  # (num_sizes, num_classes, H, W)
        return (logits if classes is None else logits[:, labels_of]).flatten()

    grids = [x.shape[1:] for x in logits_per_level]
    sizes = (windows.num_sizes * num_labels * height * width for height, width in grids)
    starts = list(itertools.accumulate(sizes, initial=0))
    if device.type == "cpu":
        best = [_above(flat(x), threshold, num_candidates) for x in logits_per_level]
        index = torch.cat([i + start for (i, _), start in zip(best, starts, strict=False)])
        scores = torch.cat([score for _, score in best]).float().sigmoid()
    else:
        all_logits = cat([flat(x) for x in logits_per_level])
        score, index = all_logits.topk(min(num_candidates, starts[-1]), sorted=False)
        index, order = index.sort()  # equal scores keep the order of their windows
        score = score[order]
        scores = torch.where(score > threshold, score.float().sigmoid(), -1.0)
    scores, order = scores.sort(descending=True, stable=True)
    scores, index = scores[:num_candidates], index[order[:num_candidates]]

    level, size, label, y, x = locate(index, grids, windows.num_sizes, num_labels)
    if classes is not None:
        label = labels_of[label]
    window_boxes = boxes = windows.boxes(level, size, y, x)
    outputs = None if outputs_at is None else outputs_at(level, size, y, x).float()
    if outputs is not None:
        boxes = decode_boxes(outputs[:, :4], window_boxes, box_weights)
    candidates = Candidates(boxes, scores, label, level, size, y, x, window_boxes)
    if outputs is None or not mask_iou:
        return candidates
    scores = (scores * outputs[:, 4].sigmoid()).sqrt()  # NaN of those with score -1
    scores = torch.where(scores > score_threshold, scores, -1.0)
    order = scores.argsort(descending=True, stable=True)
    if device.type == "cpu":
        order = order[scores[order] >= 0]
    return candidates._replace(scores=scores).select(order)


def logit_threshold(score_threshold: float, *, mask_iou: bool) -> float:
    """Return the class logit that candidates exceed, see `find_candidates`."""
    lowest = score_threshold
    if mask_iou:  # sqrt(score * IoU) above the threshold needs a score above its square
        lowest = max(score_threshold**2, min(score_threshold, _ENOUGH))
    odds = lowest / (1 - lowest)
    return math.log(odds) if odds > 0 else -math.inf


def locate(
    index: Tensor, grids: Sequence[tuple[int, ...]], num_sizes: int, num_labels: int
) -> tuple[Tensor, ...]:
    """Return level, size, label, y and x of (window, class) pairs, int64 of the shape of ``index``.

    Args:
        index: positions in the logits of all levels, fine to coarse, each flattened from
            (num_sizes, num_labels, height, width).
        grids: (height, width) of each level.
    """
    counts = (num_sizes * num_labels * height * width for height, width in grids)
    starts = [*itertools.accumulate(counts, initial=0)][:-1]
    table = torch.tensor([*zip(*grids, strict=True), starts])
    heights, widths, first = to_device(table, index.device)
    level = torch.bucketize(index, first[1:], right=True)
    rest, width, height = index - first[level], widths[level], heights[level]
    rest, x = rest // width, rest % width
    rest, y = rest // height, rest % height
    size, label = (rest // num_labels, rest % num_labels) if num_labels else (rest, rest)
    return level, size, label, y, x


def rows_of_windows(
    grids: Sequence[tuple[int, ...]],
    num_sizes: int,
    level: Tensor,
    size: Tensor,
    y: Tensor,
    x: Tensor,
) -> Tensor:
    """Return the positions of windows among all of (num_sizes, height, width) of all levels."""
    counts = (num_sizes * height * width for height, width in grids)
    table = [
        (*grid, n) for grid, n in zip(grids, itertools.accumulate(counts, initial=0), strict=False)
    ]
    height, width, first = to_device(torch.tensor(table), level.device)[level].unbind(-1)
    return first + (size * height + y) * width + x


def _above(logits: Tensor, threshold: float, largest: int) -> tuple[Tensor, Tensor]:
    """Return indices and values of the logits above a threshold, the largest if too many."""
    index = torch.nonzero(logits > threshold)[:, 0]
    score = logits[index]
    if len(index) > largest:
        score, best = score.topk(largest, sorted=False)
        index, order = index[best].sort()  # equal scores keep the order of their windows
        score = score[order]
    return index, score


def cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def outputs_of_candidates(
    head: ClassBoxHead, image: DenseOutputs, level: Tensor, size: Tensor, y: Tensor, x: Tensor
) -> Tensor:
    """Return `ClassBoxHead.outputs_at` of K windows of any levels of one image, int64 (K,) each."""
    if image.deltas is None:
        rows = [torch.where(level == k)[0] for k in range(len(image.features))]
        parts = [
            head.outputs_at(image, k, torch.zeros_like(row), size[row], y[row], x[row])
            for k, row in enumerate(rows)
        ]
        outputs = parts[0].new_empty(len(level), head.num_outputs)
        outputs[torch.cat(rows)] = torch.cat(parts)
        return outputs
    grids = [d.shape[-2:] for d in image.deltas]
    windows = rows_of_windows(grids, head.num_sizes, level, size, y, x)
    # (num_sizes * H * W, num_outputs) of each level
    rows_per_level = [
        d[0].unflatten(0, (-1, head.num_outputs)).movedim(1, -1).flatten(0, -2)
        for d in image.deltas
    ]
    return cat(rows_per_level)[windows]
