"""The input of the model: checks of images and targets, and the normalized and padded batch."""

import torch
from torch import Tensor

from tensormask.utils.errors import UserError

# The stride of res5. Inputs are padded to a multiple of it, so that each level of the pyramid is
# half of the finer one.
SIZE_DIVISOR = 32


def padded_size(height: int, width: int, divisor: int = SIZE_DIVISOR) -> tuple[int, int]:
    """Return the size of a padded batch whose images are at most ``(height, width)`` pixels.

    Example:
        >>> padded_size(800, 1333)
        (800, 1344)
    """
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def size_of(image: Tensor) -> tuple[int, int]:
    """Return ``(height, width)`` of an image (3, height, width)."""
    return image.shape[-2], image.shape[-1]


def check_image(image: Tensor) -> None:
    """Raise UserError unless an image has a valid shape, dtype and range."""
    if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise UserError(f"an image must be (3, H, W), RGB, got shape {tuple(image.shape)}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise UserError(f"an image must be uint8 or floating, got {image.dtype}")
    # On a CPU only: reading the maximum from a GPU would wait for it.
    if image.is_floating_point() and image.device.type == "cpu" and image.max() > 2:
        raise UserError(
            f"a floating image must be in 0..1, got a value of {image.max():.4g}: "
            "divide it by 255, or give it as uint8"
        )


def normalize_and_pad(
    images: list[Tensor],
    mean: Tensor,
    std: Tensor,
    *,
    bgr: bool,
    divisor: int,
    memory_format: torch.memory_format,
) -> Tensor:
    """Return a batch (N, 3, height, width) of images, padded with 0 at the right and bottom.

    ``mean`` and ``std`` are Tensor[3, 1, 1] in 0..255. The result has their device and, like them,
    the channel order BGR if ``bgr``.
    """
    normalized = []
    for image in images:
        check_image(image)
        image = image.to(mean.device, non_blocking=True)
        image = image.float() if image.dtype == torch.uint8 else image.float() * 255
        if bgr:
            image = image.flip(0)
        normalized.append((image - mean) / std)
    heights, widths = zip(*map(size_of, images), strict=True)
    height, width = padded_size(max(heights), max(widths), divisor)
    batch = normalized[0].new_zeros(len(images), 3, height, width)
    batch = batch.contiguous(memory_format=memory_format)
    for image, padded in zip(normalized, batch, strict=True):
        padded[:, : image.shape[1], : image.shape[2]] = image
    return batch


def checked_target(
    target: dict[str, Tensor], image: Tensor, num_classes: int, device: torch.device
) -> dict[str, Tensor]:
    """Return the target after checking its parts against each other and the image.

    The masks are moved to the model's device. Boxes and labels are moved to the CPU, where windows
    are assigned while a GPU runs the backbone.
    """
    boxes, labels, masks = target["boxes"].cpu(), target["labels"].cpu(), target["masks"]
    num_objects, size = len(boxes), size_of(image)
    if boxes.shape != (num_objects, 4) or labels.shape != (num_objects,):
        raise UserError(
            "boxes must be (K, 4) and labels (K,), "
            f"got {tuple(boxes.shape)} and {tuple(labels.shape)}"
        )
    if masks.shape != (num_objects, *size):
        raise UserError(
            f"masks must be (K, H, W) = {(num_objects, *size)} like the boxes and the image, "
            f"got {tuple(masks.shape)}"
        )
    if labels.dtype != torch.int64:
        raise UserError(f"labels must be int64, got {labels.dtype}")
    if num_objects and (labels.min() < 0 or labels.max() >= num_classes):
        raise UserError(
            f"labels must be in 0..{num_classes - 1}, got {labels.min()}..{labels.max()}: "
            "set MODEL.TENSOR_MASK.NUM_CLASSES to the number of classes of the data"
        )
    if not (boxes[:, 2:] > boxes[:, :2]).all():
        raise UserError("boxes must have x0 < x1 and y0 < y1: leave out objects without area")
    return {
        "boxes": boxes.float(),
        "labels": labels,
        "masks": masks.to(device, non_blocking=True).bool(),
    }
