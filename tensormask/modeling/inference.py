"""Inference after the dense heads: NMS of candidates, and the masks of the detections."""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, nms

from tensormask.layers import mask_boxes, paste_masks
from tensormask.layers.masks import to_device
from tensormask.layers.plain import is_plain
from tensormask.modeling.candidates import Candidates, cat, find_candidates, outputs_of_candidates
from tensormask.modeling.head import ClassBoxHead, DenseOutputs
from tensormask.modeling.mask_head import MaskHead
from tensormask.modeling.sparse import Finest, mask_features
from tensormask.modeling.tiles import to_device_at_once
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError

# Beyond it, torchvision compares the boxes of each class apart, which takes less memory.
_MAX_BOXES_MOVED_APART = 25_000


def check_score_threshold(score_threshold: float) -> None:
    """Raise UserError unless it is a score: logits are compared with its inverse sigmoid."""
    if not 0 <= score_threshold < 1:
        raise UserError(f"score_threshold must be in 0..1, below 1, got {score_threshold}")


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

    Those with score -1 are no detections; `rescale_and_clip` drops them. The arguments are those of
    `TensorMask`; ``options`` are those of `find_candidates`.

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
        candidates = find_candidates(
            [x[0] for x in image.logits],
            functools.partial(outputs_of_candidates, head, image) if head.with_boxes else None,
            windows,
            score_threshold=score_threshold,
            mask_iou=head.mask_iou,
            classes=classes,
            **options,
        )
        candidates_per_image.append(candidates)
    if nms_on == "masks":
        assert mask_head is not None
        candidates_per_image, rows = _drop(candidates_per_image)
        boxes_per_image = boxes_from_masks(mask_head, dense.features, candidates_per_image, rows)
    else:
        boxes_per_image = [candidates.boxes for candidates in candidates_per_image]
    detections = []
    for candidates, boxes in zip(candidates_per_image, boxes_per_image, strict=True):
        scores = candidates.scores
        if nms_on == "masks":  # empty masks have boxes without area, and are no detections
            scores = torch.where(boxes[:, 2] > boxes[:, 0], scores, -1.0)
        if not head.with_boxes:
            candidates = candidates._replace(boxes=boxes)
        labels = candidates.labels
        groups = torch.zeros_like(labels) if class_agnostic_nms else labels
        kept = _nms(boxes, scores, groups, nms_threshold)[:num_detections]
        detections.append(candidates._replace(scores=scores).select(kept))
    return detections


def _nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Return the rows that `torchvision.ops.batched_nms` keeps; the host waits for a GPU once.

    Rows with score -1 suppress no others, and are last.
    """
    if boxes.device.type == "cpu" or len(boxes) > _MAX_BOXES_MOVED_APART:
        return batched_nms(boxes, scores, groups, threshold)
    boxes = torch.where(scores[:, None] >= 0, boxes, 0.0)
    # As torchvision, which copies a number to the GPU: each group is moved to its own area. Boxes
    # reach beyond the image: unlike torchvision's, the areas have room for negative coordinates.
    area = boxes.amax() - boxes.amin() + 1 if len(boxes) else 0
    offsets = groups.to(boxes.dtype) * area
    return nms(boxes + offsets[:, None], scores, threshold)


def rescale_and_clip(
    detections_per_image: list[Candidates],
    input_sizes: Sequence[tuple[int, int]],
    output_sizes: Sequence[tuple[int, int]],
) -> list[Candidates]:
    """Scale boxes and windows to the output sizes, clip the boxes, and drop those outside.

    Sizes are ``(height, width)`` in pixels, those of the input without padding. The levels, sizes
    and locations of the windows that remain are on the CPU: the host waits for a GPU once.
    """
    factors = [
        [(out_width / width, out_height / height) * 2, (out_width, out_height) * 2]
        for (height, width), (out_height, out_width) in zip(input_sizes, output_sizes, strict=True)
    ]
    boxes = detections_per_image[0].boxes
    scaled = []
    for d, (scale, limit) in zip(
        detections_per_image,
        to_device(torch.tensor(factors, dtype=boxes.dtype), boxes.device),
        strict=True,
    ):
        boxes = torch.minimum((d.boxes * scale).clamp(min=0), limit)
        scaled.append(d._replace(boxes=boxes, windows=d.windows * scale))
    remaining, rows_per_image = _drop(scaled, without_area=True)
    return [
        d._replace(level=rows[:, 0], size=rows[:, 1], y=rows[:, 3], x=rows[:, 4])
        for d, rows in zip(remaining, rows_per_image, strict=True)
    ]


def _drop(
    candidates_per_image: list[Candidates], *, without_area: bool = False
) -> tuple[list[Candidates], list[Tensor]]:
    """Drop those with score -1, and with ``without_area`` also those with boxes without area.

    Returns:
        - the candidates that remain, per image;
        - their windows, per image: int64 (K, 5) ``(level, size, n, y, x)`` on the CPU.
    """
    columns = []
    for n, c in enumerate(candidates_per_image):
        remains = c.scores >= 0
        if without_area:
            remains &= (c.boxes[:, 2:] > c.boxes[:, :2]).all(1)
        image = torch.full_like(c.level, n)
        columns.append(torch.stack([c.level, c.size, image, c.y, c.x, remains.long()], dim=1))
    counts = [len(c.scores) for c in candidates_per_image]
    remaining, rows_per_image = [], []
    # One copy for all images: the only time that the host waits.
    for c, rows in zip(candidates_per_image, cat(columns).cpu().split(counts), strict=True):
        kept = torch.where(rows[:, 5] > 0)[0]
        rows_per_image.append(rows[kept, :5])
        all_remain = len(kept) == len(rows)
        remaining.append(c if all_remain else c.select(to_device(kept, c.scores.device)))
    return remaining, rows_per_image


def masks_at_windows(
    mask_head: MaskHead,
    features: list[Tensor],
    detections_per_image: list[Candidates],
    finest: Finest | None = None,
) -> list[list[Tensor]]:
    """Return the mask probabilities of the detections of a batch: per image K Tensor[V, U].

    ``features`` are those of the pyramid, per level (N, C, H, W); with ``finest``, those of the
    finest level may be incomplete. The host waits for a GPU unless the detections are from
    `rescale_and_clip`.
    """
    columns = [
        torch.stack([d.level, d.size, torch.full_like(d.level, n), d.y, d.x], dim=1)
        for n, d in enumerate(detections_per_image)
    ]
    groups, positions = _group_windows(cat(columns).cpu())
    masks: dict[int, Tensor] = {}
    masks_per_group = _iter_masks(mask_head, features, groups, finest)
    for logits, position in zip(masks_per_group, positions, strict=True):
        masks.update(zip(position.tolist(), logits.float().sigmoid(), strict=True))
    in_order = (masks[i] for i in range(len(masks)))
    return [list(itertools.islice(in_order, len(d.scores))) for d in detections_per_image]


def boxes_from_masks(
    mask_head: MaskHead,
    features: list[Tensor],
    candidates_per_image: list[Candidates],
    rows_per_image: list[Tensor],
) -> Sequence[Tensor]:
    """Return per image the boxes (K, 4) of the masks of its candidates, without area if empty.

    ``features`` are those of the pyramid, per level (N, C, H, W); ``rows_per_image`` the windows of
    the candidates, int64 (K, 5) ``(level, size, n, y, x)`` on the CPU.
    """
    windows = cat([candidates.windows for candidates in candidates_per_image])
    # Masks are class-agnostic: a window that is a candidate for several classes needs one mask.
    rows, inverse = cat(rows_per_image).unique(dim=0, return_inverse=True)
    groups, positions = _group_windows(rows)
    *positions, inverse = to_device_at_once([*positions, inverse], windows.device)
    window_boxes = windows.new_empty(len(rows), 4)
    window_boxes[inverse] = windows
    boxes = torch.empty_like(window_boxes)
    # All masks of a level can be as large as its dense tensor: only one group is in memory.
    for logits, position in zip(_iter_masks(mask_head, features, groups), positions, strict=True):
        boxes[position] = mask_boxes(logits, window_boxes[position])
    return boxes[inverse].split([len(candidates.scores) for candidates in candidates_per_image])


def _iter_masks(
    mask_head: nn.Module,
    features: list[Tensor],
    groups: list[tuple[int, int, Tensor]],
    finest: Finest | None = None,
) -> Iterable[Tensor]:
    """Return the masks of `MaskHead.forward`, group by group unless it has to be called."""
    if is_plain(mask_head, MaskHead):
        plain = cast(MaskHead, mask_head)
        of_finest = None
        if finest is not None and not finest.all_asked and plain.bipyramid and groups:
            of_finest = mask_features(plain, finest, groups)
        return plain.iter_masks(features, groups, of_finest)
    windows = to_device_at_once([group[2] for group in groups], features[0].device)
    return mask_head(features, [(*group[:2], w) for group, w in zip(groups, windows, strict=True)])


def read_detection(detection: Mapping[str, Any]) -> dict[str, Any]:
    """Return an image's result of `TensorMask.detect` or `TensorMask.forward` on the CPU.

    The host waits for a GPU twice, for numbers and for masks, and not for each tensor.
    """
    if detection["boxes"].device.type == "cpu":
        return dict(detection)
    names = [name for name in ("boxes", "scores", "labels", "windows") if name in detection]
    # As numbers of one dtype, which have all labels; not float64, which MPS lacks.
    dtype = torch.promote_types(detection["boxes"].dtype, torch.float32)
    columns = [detection[name].to(dtype) for name in names]
    columns = [x if x.dim() == 2 else x[:, None] for x in columns]
    numbers = torch.cat(columns, dim=1).cpu().split([x.shape[1] for x in columns], dim=1)
    read = dict(detection)
    for name, part in zip(names, numbers, strict=True):
        read[name] = part.to(detection[name].dtype).view(detection[name].shape)
    if "masks" in detection:
        read["masks"] = detection["masks"].cpu()
    if "window_masks" in detection:
        masks = list(detection["window_masks"])
        if masks:
            parts = cat([x.flatten() for x in masks]).cpu().split([x.numel() for x in masks])
            masks = [part.view(x.shape) for part, x in zip(parts, masks, strict=True)]
        read["window_masks"] = masks
    return read


def paste_detection(detection: dict[str, Any], size: tuple[int, int]) -> dict[str, Tensor]:
    """Convert an image's result of `TensorMask.detect` to that of `TensorMask.forward`."""
    pasted = {name: detection[name] for name in ("boxes", "scores", "labels")}
    if "window_masks" in detection:
        pasted["masks"] = paste_masks(detection["window_masks"], detection["windows"], size)
    return pasted


def _group_windows(rows: Tensor) -> tuple[list[tuple[int, int, Tensor]], list[Tensor]]:
    """Group windows by level and size, that is by the size of their masks.

    Args:
        rows: int64 (K, 5) ``(level, size, n, y, x)`` on the CPU.

    Returns the groups that `MaskHead.forward` takes, and per group the positions of its windows in
    ``rows``, int64 (K,); all on the CPU.
    """
    kinds, kind = rows[:, :2].unique(dim=0, return_inverse=True)
    positions = [torch.where(kind == i)[0] for i in range(len(kinds))]
    groups = [
        (level, size, rows[position, 2:])
        for (level, size), position in zip(kinds.tolist(), positions, strict=True)
    ]
    return groups, positions
