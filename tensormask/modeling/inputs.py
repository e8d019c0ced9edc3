"""The input of the model: checks of images and targets, and the size of a padded batch."""

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


def checked_target(
    target: dict[str, Tensor], image: Tensor, num_classes: int, device: torch.device
) -> dict[str, Tensor]:
    """Return the target after checking its parts against each other and the image.

    The masks are moved to the model's device. Boxes and labels are moved to the CPU, where windows
    are assigned while a GPU runs the backbone.
    """
    boxes, labels, masks = target["boxes"].cpu(), target["labels"].cpu(), target["masks"]
    num_objects, shapes = len(boxes), [tuple(x.shape) for x in (boxes, labels, masks)]
    if shapes[:2] != [(num_objects, 4), (num_objects,)]:
        raise UserError(f"boxes must be (K, 4) and labels (K,), got {shapes[0]} and {shapes[1]}")
    if shapes[2] != (num_objects, *size_of(image)):
        raise UserError(
            f"masks must be (K, H, W) = {(num_objects, *size_of(image))} like the boxes and the "
            f"image, got {shapes[2]}"
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
    masks = masks.to(device, non_blocking=True).bool()
    return {"boxes": boxes.float(), "labels": labels, "masks": masks}
