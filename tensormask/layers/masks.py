"""Crop target masks to windows, paste predicted masks into images, and bound masks by boxes."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.ops  # noqa: F401 (registers torch.ops.torchvision)
from torch import Tensor

from tensormask.layers import _native

# Mask pixels computed at once: limits the floating copies to 128 MB.
_MAX_PIXELS_AT_ONCE = 1 << 25


@torch.no_grad()
def crop_masks(masks: Tensor, objects: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Crop each object's mask to a window and resize it (detectron2's `BitMasks.crop_and_resize`).

    The host never waits for a GPU.

    Args:
        masks (Tensor[M, H, W]): bool or uint8, the masks of M objects in an image. Floating masks
            of the dtype of ``boxes`` are not converted again: for several calls with the same
            masks on a GPU.
        objects (Tensor[K]): int64, the object of each window. On the CPU, or on the device of
            ``masks``; on a GPU, all M masks are converted to floating, not only those in use.
        boxes (Tensor[K, 4]): the windows ``(x0, y0, x1, y1)`` in pixels, floating, on the device
            of ``objects``. They may extend beyond the image.
        side: side of the cropped masks, in mask pixels.

    Returns:
        Tensor[K, side, side]: bool, True where at least half of the mask pixel belongs to the
        object.

    Example:
        >>> masks = torch.zeros(1, 8, 8, dtype=torch.bool)
        >>> masks[0, :4] = True  # the upper half of the image
        >>> crop_masks(masks, torch.tensor([0]), torch.tensor([[0.0, 2.0, 4.0, 6.0]]), 2).tolist()
        [[[True, True], [False, False]]]
    """
    # A limited number of pixels is converted to floating at a time.
    num_masks = max(1, _MAX_PIXELS_AT_ONCE // max(1, masks[:1].numel()))
    if objects.device.type != "cpu":
        return _crop_from_all(masks, objects, boxes, side, num_masks)
    used, row = objects.unique(return_inverse=True)
    cropped = masks.new_empty(len(objects), side, side, dtype=torch.bool)
    for start in range(0, len(used), num_masks):
        part = used[start : start + num_masks]
        of_part = masks[start : start + num_masks]
        if len(used) < len(masks):
            of_part = masks[to_device(part, masks.device)]
        if len(part) == len(used):
            return _crop(of_part, row, boxes, side)
        at = torch.where((row >= start) & (row < start + num_masks))[0]
        crops = _crop(of_part, row[at] - start, boxes[at], side)
        cropped[to_device(at, masks.device)] = crops
    return cropped


def _crop_from_all(
    masks: Tensor, objects: Tensor, boxes: Tensor, side: int, num_masks: int
) -> Tensor:
    """Crop as `crop_masks`, also from masks without a window: the host need not know which."""
    if len(masks) <= num_masks or masks.dtype == boxes.dtype:
        return _crop(masks, objects, boxes, side)
    cropped = masks.new_zeros(len(objects), side, side, dtype=torch.bool)
    for number, part in enumerate(masks.split(num_masks)):
        row = objects - number * num_masks
        inside = (row >= 0) & (row < len(part))
        of_part = _crop(part, torch.where(inside, row, 0), boxes, side)
        cropped |= of_part & inside[:, None, None]
    return cropped


def _crop(masks: Tensor, objects: Tensor, boxes: Tensor, side: int) -> Tensor:
    rois = to_device(torch.cat([objects.to(boxes.dtype)[:, None], boxes], dim=1), masks.device)
    # The operator itself: where algorithms must be deterministic, torchvision's function calls
    # another one on a GPU, for the sake of the gradient, that takes H * W samples per mask pixel.
    soft = torch.ops.torchvision.roi_align(
        masks[:, None].to(boxes.dtype), rois, 1.0, side, side, 0, True
    )
    return soft[:, 0] >= 0.5


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; the host waits for a copy from a GPU, not for one to it."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    # A copy to the CPU that is not waited for would be read before it is complete.
    return x.to(device, non_blocking=device.type == "cuda")


@torch.no_grad()
def paste_masks(masks: Tensor | Sequence[Tensor], boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste masks into images: interpolate bilinearly at pixel centers, 0 outside of the mask.

    Args:
        masks (Tensor[K, V, U]): probabilities, floating; or a sequence of K Tensor[V, U] of any
            sizes.
        boxes (Tensor[K, 4]): the box of each mask, ``(x0, y0, x1, y1)`` in pixels of the output
            image. It may extend beyond the image.
        size: ``(height, width)`` of the output image.

    Returns:
        Tensor[K, height, width]: bool, True where the probability is >= 0.5.

    Example:
        >>> box = torch.tensor([[1.0, 0.0, 3.0, 2.0]])
        >>> paste_masks(torch.ones(1, 2, 2), box, (3, 4)).int().tolist()
        [[[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]]
    """
    device = boxes.device
    if device.type == "cpu":
        # NumPy's zeros use memory only where something is written: pasted masks are mostly empty.
        pasted = torch.from_numpy(np.zeros((len(masks), *size), dtype=bool))
        for image, (x0, y0, region) in zip(pasted, paste_regions(masks, boxes, size), strict=True):
            image[y0 : y0 + region.shape[0], x0 : x0 + region.shape[1]] = region
        return pasted
    if len(masks) == 0:
        return torch.zeros(0, *size, dtype=torch.bool, device=device)
    if _native.use_native(device.type):
        return torch.ops.tensormask.paste_masks(*_packed(masks, boxes), *size)
    return _paste_whole(masks, boxes, size)


def _packed(masks: Tensor | Sequence[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return the arguments of the compiled op: values, layout, boxes, and the largest width."""
    sizes = torch.tensor([mask.shape for mask in masks])
    values = torch.cat([mask.reshape(-1) for mask in masks])
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    areas = sizes.prod(1)
    layout = torch.stack([areas.cumsum(0) - areas, *sizes.unbind(1)], dim=1)
    boxes = boxes.to(values.dtype).contiguous()
    return values, to_device(layout, boxes.device), boxes, int(sizes[:, 1].max())


def _paste_whole(masks: Tensor | Sequence[Tensor], boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste into whole images, many at once: fast on a GPU, where small operations are slow.

    Bilinear interpolation is two matrix products, for the rows and for the columns. They are in
    float32 at least, but in TF32 where PyTorch may use it.
    """
    height, width = size
    pasted = torch.empty(len(masks), height, width, dtype=torch.bool, device=boxes.device)
    num_masks = max(1, _MAX_PIXELS_AT_ONCE // max(1, height * width))
    rows = sorted(range(len(masks)), key=lambda row: masks[row].shape)
    table = torch.tensor([(row, *masks[row].shape[::-1]) for row in rows])
    order, *sides = to_device(table, boxes.device).unbind(1)
    corner, opposite = boxes[order].to(torch.promote_types(boxes.dtype, torch.float32)).split(2, 1)
    scale = torch.stack(sides, dim=1) / (opposite - corner).clamp(min=0)
    # The pixel centers of the images, in mask pixels.
    xs, ys = (
        (torch.arange(0.5, end, device=boxes.device) - corner[:, i, None]) * scale[:, i, None] - 0.5
        for i, end in enumerate((width, height))
    )
    end = 0
    kind = boxes.device.type if torch.amp.is_autocast_available(boxes.device.type) else "cpu"
    with torch.autocast(kind, enabled=False):
        for (num_rows, num_columns), group in itertools.groupby(rows, lambda row: masks[row].shape):
            of_shape = torch.stack([masks[row] for row in group]).to(xs.dtype)
            for part in of_shape.split(num_masks):
                at = slice(end, end := end + len(part))
                soft = torch.bmm(_weights(ys[at], num_rows), part)
                soft = torch.bmm(soft, _weights(xs[at], num_columns).mT)
                pasted[order[at]] = soft >= 0.5
    return pasted


def _weights(locations: Tensor, side: int) -> Tensor:
    """Return the bilinear weights (K, n, side) of the mask pixels at locations (K, n)."""
    distance = locations[:, :, None] - torch.arange(side, device=locations.device)
    return (1 - distance.abs()).clamp(min=0)


def _sample(masks: Tensor, boxes: Tensor, region: tuple[int, int, int, int]) -> Tensor:
    """Sample masks (K, V, U) in boxes (K, 4) at the pixels of a region of the image: (K, h, w)."""
    x0, y0, x1, y1 = region
    masks = masks.to(torch.promote_types(masks.dtype, torch.float32))  # locations need the digits
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
    """Paste masks as `paste_masks`, but iterate over them and only fill the region of each box.

    Only one region is in memory at a time, for any number of masks and any image size. Masks on a
    GPU are copied to the host once, all together.

    Args:
        masks, boxes, size: as for `paste_masks`.

    Yields:
        ``(x0, y0, region)`` per mask: the region's corner in pixels of the output image, and the
        region, Tensor[h, w] bool on the CPU, clipped to the image. Outside of the region the mask
        is empty.
    """
    height, width = size
    if boxes.device.type != "cpu":
        parts = [boxes, *masks]
        values = torch.cat([part.reshape(-1) for part in parts]).cpu()
        split = zip(parts, values.split([part.numel() for part in parts]), strict=True)
        boxes, *masks = (on_cpu.view(part.shape).to(part.dtype) for part, on_cpu in split)
    # Outside of its box a bilinear mask is below 1/2; one more pixel allows for rounding.
    corners = torch.cat([boxes[:, :2].floor() - 1, boxes[:, 2:].ceil() + 1], dim=1).long().tolist()
    for mask, box, (x0, y0, x1, y1) in zip(masks, boxes, corners, strict=True):
        x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
        if x0 >= x1 or y0 >= y1:
            yield 0, 0, mask.new_zeros(0, 0, dtype=torch.bool)
            continue
        yield x0, y0, _sample(mask[None], box[None], (x0, y0, x1, y1))[0]


def mask_boxes(logits: Tensor, windows: Tensor) -> Tensor:
    """Return the boxes around the object pixels of masks (sec. 6.1, mask-bb).

    Args:
        logits (Tensor[K, V, U]): floating; object pixels are >= 0.
        windows (Tensor[K, 4]): the window of each mask, ``(x0, y0, x1, y1)``.

    Returns:
        Tensor[K, 4]: ``(x0, y0, x1, y1)`` in the windows' unit; four zeros for an empty mask.
    """
    inside = logits >= 0
    bounds = []
    for axis in (1, 2):  # rows are reduced for x, columns for y
        line = inside.any(axis).byte()
        side = line.shape[1]
        bounds.append((line.argmax(1) / side, 1 - line.flip(1).argmax(1) / side))
    (left, right), (top, bottom) = bounds
    corner, size = windows[:, :2].tile(2), (windows[:, 2:] - windows[:, :2]).tile(2)
    boxes = corner + size * torch.stack([left, top, right, bottom], dim=1)
    return torch.where(inside.any(2).any(1)[:, None], boxes, 0.0)
