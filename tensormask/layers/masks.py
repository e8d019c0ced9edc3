"""Masks into windows and back: targets are cropped, predictions are pasted into images."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

# Pixels of masks that are worked on at once: bounds what is floating to 128 MB.
_MAX_PIXELS_AT_ONCE = 1 << 25


def crop_masks(masks: Tensor, objects: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Crop each object's mask to a window and resize it (detectron2's `BitMasks.crop_and_resize`).

    Args:
        masks (Tensor[M, H, W]): bool or uint8, the masks of M objects in an image.
        objects (Tensor[K]): int64, the object of each window; on the CPU, or on the device of
            ``masks``, which is then waited for.
        boxes (Tensor[K, 4]): the windows ``(x0, y0, x1, y1)`` in pixels, floating, beside
            ``objects``; they may leave the image.
        side: mask side, in mask pixels.

    Returns:
        Tensor[K, side, side]: bool, True where at least half of the mask pixel belongs to the
        object.
    """
    used, row = objects.unique(return_inverse=True)
    cropped = masks.new_empty(len(objects), side, side, dtype=torch.bool)
    # Only masks that are used become floating, a bounded number of pixels at a time.
    num_masks = max(1, _MAX_PIXELS_AT_ONCE // max(1, masks[:1].numel()))
    for number, part in enumerate(used.split(num_masks)):
        start = number * num_masks
        at = torch.where((row >= start) & (row < start + num_masks))[0]
        rois = torch.cat([(row[at] - start).to(boxes.dtype)[:, None], boxes[at]], dim=1)
        part, at, rois = (to_device(t, masks.device) for t in (part, at, rois))
        soft = roi_align(masks[part][:, None].to(boxes.dtype), rois, side, 1.0, 0, True)
        cropped[at] = soft[:, 0] >= 0.5
    return cropped


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on a device; the host does not wait for a copy to a GPU."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def paste_masks(masks: Tensor | Sequence[Tensor], boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste masks into a frame: bilinear at pixel centres, 0 outside; the object is where >= 0.5.

    Args:
        masks (Tensor[K, V, U]): probabilities, floating; or a sequence of K Tensor[V, U] of any
            sizes.
        boxes (Tensor[K, 4]): where each mask goes, ``(x0, y0, x1, y1)`` in pixels of the frame; may
            leave it.
        size: ``(height, width)`` of the frame.

    Returns:
        Tensor[K, height, width]: bool.
    """
    if boxes.device.type == "cpu":
        # NumPy's zeros take up memory where something is written only: frames are mostly empty.
        frames = torch.from_numpy(np.zeros((len(masks), *size), dtype=bool))
        for frame, (x0, y0, region) in zip(frames, paste_regions(masks, boxes, size), strict=True):
            frame[y0 : y0 + region.shape[0], x0 : x0 + region.shape[1]] = region
    else:
        frames = torch.zeros(len(masks), *size, dtype=torch.bool, device=boxes.device)
        _paste_frames(masks, boxes, frames)
    return frames


def _paste_frames(masks: Tensor | Sequence[Tensor], boxes: Tensor, frames: Tensor) -> None:
    """`paste_masks` into whole frames, many at once: for a GPU, which waits for small work."""
    height, width = frames.shape[1:]
    num_frames = max(1, _MAX_PIXELS_AT_ONCE // (height * width))
    rows_per_shape: dict[torch.Size, list[int]] = {}
    for row, mask in enumerate(masks):
        rows_per_shape.setdefault(mask.shape, []).append(row)
    for rows in rows_per_shape.values():
        for part in torch.tensor(rows).split(num_frames):
            of_shape = torch.stack([masks[row] for row in part.tolist()])
            part = to_device(part, frames.device)
            frames[part] = _sample(of_shape, boxes[part], (0, 0, width, height))


def _sample(masks: Tensor, boxes: Tensor, region: tuple[int, int, int, int]) -> Tensor:
    """Masks (K, V, U) in their boxes (K, 4), at the pixels of a region of the frame: (K, h, w)."""
    x0, y0, x1, y1 = region
    xs = torch.arange(x0, x1, device=boxes.device, dtype=boxes.dtype) + 0.5
    ys = torch.arange(y0, y1, device=boxes.device, dtype=boxes.dtype) + 0.5
    left, top, right, bottom = boxes[:, :, None].unbind(1)  # (K, 1) each
    xs = (xs - left) / (right - left) * 2 - 1
    ys = (ys - top) / (bottom - top) * 2 - 1
    shape = (len(boxes), ys.shape[1], xs.shape[1])
    grid = torch.stack([xs[:, None].expand(shape), ys[:, :, None].expand(shape)], dim=3)
    pasted = F.grid_sample(masks[:, None], grid.to(masks.dtype), align_corners=False)
    return pasted[:, 0] >= 0.5


def paste_regions(
    masks: Tensor | Sequence[Tensor], boxes: Tensor, size: tuple[int, int]
) -> Iterator[tuple[int, int, Tensor]]:
    """Paste masks one at a time, each into the part of the frame that its box covers.

    Nothing but the region at hand is in memory, whatever the number of masks and the frame.

    Args:
        masks, boxes, size: as of `paste_masks`.

    Yields:
        per mask ``(x0, y0, region)``: the corner in pixels of the frame, and Tensor[h, w] bool, all
        of it inside the frame; outside of it the mask is empty.
    """
    height, width = size
    # Outside of its window a bilinear mask stays below 1/2; a pixel around it is for rounding.
    corners = torch.cat([boxes[:, :2].floor() - 1, boxes[:, 2:].ceil() + 1], dim=1).long().tolist()
    for mask, box, (x0, y0, x1, y1) in zip(masks, boxes, corners, strict=True):
        x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
        if x0 >= x1 or y0 >= y1:
            yield 0, 0, mask.new_zeros(0, 0, dtype=torch.bool)
            continue
        yield x0, y0, _sample(mask[None], box[None], (x0, y0, x1, y1))[0]


def mask_boxes(logits: Tensor, windows: Tensor) -> Tensor:
    """The boxes of masks: around the pixels of each that belong to the object (sec. 6.1, mask-bb).

    Args:
        logits (Tensor[K, V, U]): floating; the object is where they are >= 0.
        windows (Tensor[K, 4]): where each mask is, ``(x0, y0, x1, y1)``.

    Returns:
        Tensor[K, 4]: ``(x0, y0, x1, y1)`` in the windows' unit; of an empty mask four zeros.
    """
    inside = logits >= 0
    bounds = []
    for axis in (1, 2):  # rows are summed up for x, columns for y
        line = inside.any(axis).byte()
        side = line.shape[1]
        bounds.append((line.argmax(1) / side, 1 - line.flip(1).argmax(1) / side))
    (left, right), (top, bottom) = bounds
    corner, size = windows[:, :2].tile(2), (windows[:, 2:] - windows[:, :2]).tile(2)
    boxes = corner + size * torch.stack([left, top, right, bottom], dim=1)
    return torch.where(inside.any(2).any(1)[:, None], boxes, 0.0)
