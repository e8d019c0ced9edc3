"""From dense outputs to detections: candidates, NMS, and the masks of what is kept."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from tensormask.layers import mask_boxes, paste_masks
from tensormask.layers.masks import to_device
from tensormask.modeling.box_coder import decode_boxes
from tensormask.modeling.mask_head import MaskHead
from tensormask.modeling.windows import Windows


class Kept(NamedTuple):
    """K (window, class) pairs of an image, best first; int64 (K,) unless said."""

    boxes: Tensor  # (K, 4) float, pixels of the network's input
    scores: Tensor  # (K,) float
    labels: Tensor
    level: Tensor
    size: Tensor
    y: Tensor
    x: Tensor
    windows: Tensor  # (K, 4) float, the boxes of the windows

    def __getitem__(self, index: Tensor) -> "Kept":
        return Kept(*(t[index] for t in self._asdict().values()))


def find_candidates(
    logits_per_level: list[Tensor],
    deltas_at: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None,
    windows: Windows,
    *,
    box_weights: tuple[float, ...],
    score_threshold: float,
    num_candidates: int,
) -> Kept:
    """The best (window, class) pairs of one image, which are then to pass NMS.

    Args:
        logits_per_level: per level (num_sizes * num_classes, H, W).
        deltas_at: from ``(level, size, y, x)`` of K windows of a level, int64 (K,), to the deltas
            (K, 4) of their boxes; None without a box head: boxes are then those of the windows.
        windows: their geometry.
        box_weights: of `box_coder`.
        score_threshold: scores must be above it.
        num_candidates: how many are kept at most, over all levels.
    """
    found = []
    threshold = (
        math.log(score_threshold / (1 - score_threshold)) if score_threshold > 0 else -math.inf
    )
    for level, logits in enumerate(logits_per_level):
        flat = logits.flatten()
        index = torch.nonzero(flat > threshold)[:, 0]
        score = flat[index]
        if len(index) > num_candidates:
            score, best = score.topk(num_candidates, sorted=False)
            index, order = index[best].sort()  # equal scores keep the order of their windows
            score = score[order]
        channel, y, x = torch.unravel_index(index, logits.shape)
        num_classes = len(logits) // windows.num_sizes
        size, label = channel // num_classes, channel % num_classes
        found.append([score.float().sigmoid(), label, torch.full_like(size, level), size, y, x])
        if deltas_at is not None:
            found[-1].append(deltas_at(level, size, y, x).float())
    scores, labels, level, size, y, x, *deltas = (torch.cat(t) for t in zip(*found, strict=True))

    scores, best = scores.sort(descending=True, stable=True)
    scores, best = scores[:num_candidates], best[:num_candidates]
    labels, level, size, y, x = (t[best] for t in (labels, level, size, y, x))
    boxes_of_windows = boxes = windows.boxes(level, size, y, x)
    if deltas:
        boxes = decode_boxes(deltas[0][best], boxes_of_windows, box_weights)
    return Kept(boxes, scores, labels, level, size, y, x, boxes_of_windows)


def suppress(candidates: Kept, boxes: Tensor, nms_threshold: float, num_detections: int) -> Kept:
    """Of boxes of one class whose IoU is above the threshold only the best stays (NMS).

    Args:
        candidates: K pairs of one image, best first.
        boxes (Tensor[K, 4]): the boxes that are compared, in any unit.
        nms_threshold: the IoU.
        num_detections: how many are kept at most.
    """
    keep = batched_nms(boxes, candidates.scores, candidates.labels, nms_threshold)
    return candidates[keep[:num_detections]]


def to_frame(kept: Kept, input_size: tuple[int, int], output_size: tuple[int, int]) -> Kept:
    """Scale boxes and windows to the output frame, clip the boxes, and drop those outside.

    Both sizes are ``(height, width)`` in pixels, the input's without padding.
    """
    (height, width), (out_height, out_width) = input_size, output_size
    scale = kept.boxes.new_tensor([out_width / width, out_height / height] * 2)
    limit = kept.boxes.new_tensor([out_width, out_height] * 2)
    boxes = torch.minimum((kept.boxes * scale).clamp(min=0), limit)
    kept = kept._replace(boxes=boxes, windows=kept.windows * scale)
    return kept[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]


def group_windows(kept_per_image: list[Kept]) -> tuple[list[tuple[int, int, Tensor]], list[Tensor]]:
    """Group the detections of a batch by level and window size: by the size of their masks.

    Returns:
        - groups ``(level, size, windows)`` with ``windows`` (K, 3) rows ``(n, y, x)``, as
        `MaskHead.forward` wants;
        - per group the positions of its windows among all detections of the batch, image after
        image; int64 (K,) on the CPU.
    """
    level, size, y, x = (
        torch.cat([getattr(kept, name) for kept in kept_per_image])
        for name in ("level", "size", "y", "x")
    )
    image = torch.cat([torch.full_like(kept.level, n) for n, kept in enumerate(kept_per_image)])
    rows = torch.stack([image, y, x], dim=1)
    # Sorted out on the CPU: a GPU would be waited for at every group.
    kinds, kind = torch.stack([level, size]).cpu().unique(dim=1, return_inverse=True)
    positions = [torch.where(kind == i)[0] for i in range(kinds.shape[1])]
    groups = [
        (k, s, rows[position.to(rows.device)])
        for (k, s), position in zip(kinds.T.tolist(), positions, strict=True)
    ]
    return groups, positions


def ungroup_masks(
    logits_per_group: Iterable[Tensor], positions: list[Tensor], kept_per_image: list[Kept]
) -> list[list[Tensor]]:
    """Mask logits of groups to probabilities, per image K Tensor[V, U], best first."""
    masks: dict[int, Tensor] = {}
    for logits, position in zip(logits_per_group, positions, strict=True):
        masks.update(zip(position.tolist(), logits.float().sigmoid(), strict=True))
    in_order = (masks[i] for i in range(len(masks)))
    return [list(itertools.islice(in_order, len(kept.scores))) for kept in kept_per_image]


def with_boxes_of_masks(
    mask_head: MaskHead, features: list[Tensor], candidates: list[Kept], *, replace: bool
) -> tuple[list[Kept], list[Tensor]]:
    """Per image the candidates whose mask is not empty, and the boxes (K, 4) of their masks.

    Args:
        features: of the pyramid, per level (N, C, H, W).
        candidates: per image.
        replace: whether these are also the boxes of the candidates, as where no box is regressed.
    """
    groups, positions = group_windows(candidates)
    windows = torch.cat([kept.windows for kept in candidates])
    boxes = torch.empty_like(windows)
    # A level's masks of all candidates are as large as its dense tensor may be: one at a time.
    masks = mask_head.one_by_one(features, groups)
    for logits, position in zip(masks, positions, strict=True):
        position = to_device(position, boxes.device)
        boxes[position] = mask_boxes(logits, windows[position])
    found, boxes_per_image = [], []
    for kept, boxes_of_image in zip(
        candidates, boxes.split([len(kept.scores) for kept in candidates]), strict=True
    ):
        whole = boxes_of_image[:, 2] > boxes_of_image[:, 0]
        kept, boxes_of_image = kept[whole], boxes_of_image[whole]
        found.append(kept._replace(boxes=boxes_of_image) if replace else kept)
        boxes_per_image.append(boxes_of_image)
    return found, boxes_per_image


def with_frames(
    detection: dict[str, Tensor | list[Tensor]], size: tuple[int, int]
) -> dict[str, Tensor]:
    """A detection of `TensorMask.detect` as `TensorMask.forward` gives it."""
    in_frame = {name: detection[name] for name in ("boxes", "scores", "labels")}
    if "window_masks" in detection:
        in_frame["masks"] = paste_masks(detection["window_masks"], detection["windows"], size)
    return in_frame
