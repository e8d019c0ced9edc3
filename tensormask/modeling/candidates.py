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
    deltas_at: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None,
    windows: Windows,
    *,
    box_weights: tuple[float, ...],
    score_threshold: float,
    num_candidates: int,
    classes: Sequence[int] | None = None,
) -> Candidates:
    """Return the best (window, class) pairs of one image, before NMS.

    On a GPU their number does not depend on the scores, because the host would wait for it: pairs
    that are not above the threshold follow, with score -1.

    Args:
        logits_per_level: per level (num_sizes * num_classes, H, W).
        deltas_at: from ``(level, size, y, x)`` of K windows, int64 (K,) each, to the deltas (K, 4)
            of their boxes. None without a box head: the boxes are then the windows.
        windows: their geometry.
        box_weights: of `box_coder`.
        score_threshold: scores must be above it.
        num_candidates: the maximum over all levels.
        classes: labels of the candidates; None for all.
    """
    odds = score_threshold / (1 - score_threshold)
    threshold = math.log(odds) if odds > 0 else -math.inf
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

    table = torch.tensor([*zip(*grids, strict=True), starts[:-1]])
    heights, widths, first = to_device(table, device)
    level = torch.bucketize(index, first[1:], right=True)
    rest, width, height = index - first[level], widths[level], heights[level]
    rest, x = rest // width, rest % width
    rest, y = rest // height, rest % height
    size, label = (rest // num_labels, rest % num_labels) if num_labels else (rest, rest)
    if classes is not None:
        label = labels_of[label]
    window_boxes = boxes = windows.boxes(level, size, y, x)
    if deltas_at is not None:
        boxes = decode_boxes(deltas_at(level, size, y, x).float(), window_boxes, box_weights)
    return Candidates(boxes, scores, label, level, size, y, x, window_boxes)


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


def deltas_of_candidates(
    head: ClassBoxHead, image: DenseOutputs, level: Tensor, size: Tensor, y: Tensor, x: Tensor
) -> Tensor:
    """Return the deltas (K, 4) of K windows of any levels of one image, int64 (K,) each."""
    if image.deltas is None:
        rows = [torch.where(level == k)[0] for k in range(len(image.features))]
        parts = [
            head.deltas_at(image, k, torch.zeros_like(row), size[row], y[row], x[row])
            for k, row in enumerate(rows)
        ]
        deltas = parts[0].new_empty(len(level), 4)
        deltas[torch.cat(rows)] = torch.cat(parts)
        return deltas
    grids = [d.shape[-2:] for d in image.deltas]
    counts = (head.num_sizes * height * width for height, width in grids)
    table = [
        (*grid, n) for grid, n in zip(grids, itertools.accumulate(counts, initial=0), strict=False)
    ]
    height, width, first = to_device(torch.tensor(table), level.device)[level].unbind(1)
    # (num_sizes * H * W, 4) of each level
    rows_per_level = [
        d[0].unflatten(0, (-1, 4)).movedim(1, -1).flatten(0, -2) for d in image.deltas
    ]
    return cat(rows_per_level)[first + (size * height + y) * width + x]
