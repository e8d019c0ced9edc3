"""Inference after the dense heads: candidates, NMS, and the masks of the detections."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from tensormask.layers import mask_boxes, paste_masks
from tensormask.layers.masks import to_device
from tensormask.layers.plain import is_plain
from tensormask.modeling.box_coder import decode_boxes
from tensormask.modeling.head import ClassBoxHead, DenseOutputs
from tensormask.modeling.mask_head import MaskHead
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError


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


def check_score_threshold(score_threshold: float) -> None:
    """Raise UserError unless it is a score: logits are compared with its inverse sigmoid."""
    if not 0 <= score_threshold < 1:
        raise UserError(f"score_threshold must be in 0..1, below 1, got {score_threshold}")


def find_candidates(
    logits_per_level: list[Tensor],
    deltas_at: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None,
    windows: Windows,
    *,
    box_weights: tuple[float, ...],
    score_threshold: float,
    num_candidates: int,
    classes: Sequence[int] | None = None,
) -> Candidates:
    """Return the best (window, class) pairs of one image, before NMS.

    Args:
        logits_per_level: per level (num_sizes * num_classes, H, W).
        deltas_at: from ``(level, size, y, x)`` of K windows of a level, int64 (K,), to the deltas
            (K, 4) of their boxes. None without a box head: the boxes are then the windows.
        windows: their geometry.
        box_weights: of `box_coder`.
        score_threshold: scores must be above it.
        num_candidates: the maximum over all levels.
        classes: labels of the candidates; None for all.
    """
    columns_per_level = []
    odds = score_threshold / (1 - score_threshold)
    threshold = math.log(odds) if odds > 0 else -math.inf
    for level, logits in enumerate(logits_per_level):
        logits = logits.unflatten(0, (windows.num_sizes, -1))  # (num_sizes, num_classes, H, W)
        if classes is not None:
            labels_of = torch.tensor(classes, dtype=torch.int64, device=logits.device)
            logits = logits[:, labels_of]
        flat = logits.flatten()
        index = torch.nonzero(flat > threshold)[:, 0]
        score = flat[index]
        if len(index) > num_candidates:
            score, best = score.topk(num_candidates, sorted=False)
            index, order = index[best].sort()  # equal scores keep the order of their windows
            score = score[order]
        size, label, y, x = torch.unravel_index(index, logits.shape)
        if classes is not None:
            label = labels_of[label]
        columns = [score.float().sigmoid(), label, torch.full_like(size, level), size, y, x]
        if deltas_at is not None:
            columns.append(deltas_at(level, size, y, x).float())
        columns_per_level.append(columns)
    scores, labels, levels, size, y, x, *deltas = map(
        torch.cat, zip(*columns_per_level, strict=True)
    )

    scores, best = scores.sort(descending=True, stable=True)
    scores, best = scores[:num_candidates], best[:num_candidates]
    labels, levels, size, y, x = (column[best] for column in (labels, levels, size, y, x))
    window_boxes = boxes = windows.boxes(levels, size, y, x)
    if deltas:
        boxes = decode_boxes(deltas[0][best], window_boxes, box_weights)
    return Candidates(boxes, scores, labels, levels, size, y, x, window_boxes)


def find_detections(
    dense: DenseOutputs,
    head: ClassBoxHead,
    mask_head: MaskHead | None,
    windows: Windows,
    *,
    score_threshold: float,
    nms_on: str,
    nms_threshold: float,
    class_agnostic_nms: bool,
    num_detections: int,
    classes: Sequence[int] | None,
    **options: Any,
) -> list[Candidates]:
    """Return per image the candidates after NMS, in pixels of the network's input.

    The arguments are those of `TensorMask`; ``options`` are those of `find_candidates`.

    Raises:
        UserError: one is out of range.
    """
    check_score_threshold(score_threshold)
    if num_detections < 0:
        raise UserError(f"num_detections must be >= 0, got {num_detections}")
    if classes is not None and not all(0 <= label < head.num_classes for label in classes):
        raise UserError(f"classes must be labels in 0..{head.num_classes - 1}, got {list(classes)}")
    candidates_per_image = []
    for image in map(dense.image, range(len(dense.logits[0]))):

        def deltas_at(
            level: int, size: Tensor, y: Tensor, x: Tensor, image: DenseOutputs = image
        ) -> Tensor:
            return head.deltas_at(image, level, torch.zeros_like(y), size, y, x)

        candidates = find_candidates(
            [x[0] for x in image.logits],
            deltas_at if head.with_boxes else None,
            windows,
            score_threshold=score_threshold,
            classes=classes,
            **options,
        )
        candidates_per_image.append(candidates)
    boxes_per_image: Sequence[Tensor] = [c.boxes for c in candidates_per_image]
    if nms_on == "masks":
        assert mask_head is not None
        boxes_per_image = boxes_from_masks(mask_head, dense.features, candidates_per_image)
    detections = []
    for candidates, boxes in zip(candidates_per_image, boxes_per_image, strict=True):
        if not head.with_boxes:
            candidates = candidates._replace(boxes=boxes)
        if nms_on == "masks":  # drop empty masks
            rows = boxes[:, 2] > boxes[:, 0]
            candidates, boxes = candidates.select(rows), boxes[rows]
        labels = candidates.labels
        groups = torch.zeros_like(labels) if class_agnostic_nms else labels
        rows = batched_nms(boxes, candidates.scores, groups, nms_threshold)
        detections.append(candidates.select(rows[:num_detections]))
    return detections


def rescale_and_clip(
    detections: Candidates, input_size: tuple[int, int], output_size: tuple[int, int]
) -> Candidates:
    """Scale boxes and windows to the output size, clip the boxes, and drop those outside.

    Both sizes are ``(height, width)`` in pixels, the input's without padding.
    """
    (height, width), (out_height, out_width) = input_size, output_size
    scale = detections.boxes.new_tensor([out_width / width, out_height / height] * 2)
    limit = detections.boxes.new_tensor([out_width, out_height] * 2)
    boxes = torch.minimum((detections.boxes * scale).clamp(min=0), limit)
    detections = detections._replace(boxes=boxes, windows=detections.windows * scale)
    return detections.select((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))


def masks_at_windows(
    mask_head: MaskHead, features: list[Tensor], detections_per_image: list[Candidates]
) -> list[list[Tensor]]:
    """Return the mask probabilities of the detections of a batch: per image K Tensor[V, U].

    ``features`` are those of the pyramid, per level (N, C, H, W).
    """
    groups, positions = _group_windows(_window_rows(detections_per_image))
    masks: dict[int, Tensor] = {}
    for logits, position in zip(_iter_masks(mask_head, features, groups), positions, strict=True):
        masks.update(zip(position.tolist(), logits.float().sigmoid(), strict=True))
    in_order = (masks[i] for i in range(len(masks)))
    return [list(itertools.islice(in_order, len(d.scores))) for d in detections_per_image]


def boxes_from_masks(
    mask_head: MaskHead, features: list[Tensor], candidates_per_image: list[Candidates]
) -> Sequence[Tensor]:
    """Return per image the boxes (K, 4) of the masks of its candidates, without area if empty.

    ``features`` are those of the pyramid, per level (N, C, H, W).
    """
    windows = torch.cat([candidates.windows for candidates in candidates_per_image])
    # Masks are class-agnostic: a window that is a candidate for several classes needs one mask.
    rows, inverse = _window_rows(candidates_per_image).unique(dim=0, return_inverse=True)
    window_boxes = windows.new_empty(len(rows), 4)
    window_boxes[inverse] = windows
    groups, positions = _group_windows(rows)
    boxes = torch.empty_like(window_boxes)
    # All masks of a level can be as large as its dense tensor: only one group is in memory.
    for logits, position in zip(_iter_masks(mask_head, features, groups), positions, strict=True):
        position = to_device(position, boxes.device)
        boxes[position] = mask_boxes(logits, window_boxes[position])
    return boxes[inverse].split([len(candidates.scores) for candidates in candidates_per_image])


def _iter_masks(
    mask_head: nn.Module, features: list[Tensor], groups: list[tuple[int, int, Tensor]]
) -> Iterable[Tensor]:
    """Return the masks of `MaskHead.forward`, group by group unless it has to be called."""
    if is_plain(mask_head, MaskHead):
        return cast(MaskHead, mask_head).iter_masks(features, groups)
    return mask_head(features, groups)


def paste_detection(detection: dict[str, Any], size: tuple[int, int]) -> dict[str, Tensor]:
    """Convert an image's result of `TensorMask.detect` to that of `TensorMask.forward`."""
    pasted = {name: detection[name] for name in ("boxes", "scores", "labels")}
    if "window_masks" in detection:
        pasted["masks"] = paste_masks(detection["window_masks"], detection["windows"], size)
    return pasted


def _window_rows(candidates_per_image: list[Candidates]) -> Tensor:
    """Return the windows of a batch, image after image: int64 (K, 5) ``(level, size, n, y, x)``."""
    columns = [
        (c.level, c.size, torch.full_like(c.level, n), c.y, c.x)
        for n, c in enumerate(candidates_per_image)
    ]
    return torch.cat([torch.stack(of_image, dim=1) for of_image in columns])


def _group_windows(rows: Tensor) -> tuple[list[tuple[int, int, Tensor]], list[Tensor]]:
    """Group the ``rows`` of `_window_rows` by level and size, that is by the size of their masks.

    Returns the groups that `MaskHead.forward` takes, and per group the positions of its windows in
    ``rows``, int64 (K,) on the CPU.
    """
    # Sorted on the CPU: otherwise the host would wait for a GPU at every group.
    kinds, kind = rows[:, :2].cpu().unique(dim=0, return_inverse=True)
    positions = [torch.where(kind == i)[0] for i in range(len(kinds))]
    groups = [
        (level, size, rows[position.to(rows.device), 2:])
        for (level, size), position in zip(kinds.tolist(), positions, strict=True)
    ]
    return groups, positions
