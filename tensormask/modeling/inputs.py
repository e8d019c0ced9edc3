"""What the model is given: images and targets, checked, and the size that they are padded to."""

import torch
from torch import Tensor

from tensormask.utils.errors import UserError

# res5 has this stride: inputs are padded to a multiple of it, so that the pyramid's levels fit each
# other.
SIZE_DIVISOR = 32


def padded_size(height: int, width: int, divisor: int = SIZE_DIVISOR) -> tuple[int, int]:
    """The size in pixels that a batch of images of at most this size has in the network."""
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def check_image(image: Tensor) -> None:
    if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise UserError(f"an image must be (3, H, W), RGB, got shape {tuple(image.shape)}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise UserError(f"an image must be uint8 or floating, got {image.dtype}")
    # Elsewhere the look would wait for the device.
    if image.is_floating_point() and image.device.type == "cpu" and image.max() > 2:
        raise UserError(
            f"a floating image must be in 0..1, got a value of {image.max():.4g}: "
            "divide it by 255, or give it as uint8"
        )


def checked_target(
    target: dict[str, Tensor], image: Tensor, num_classes: int, device: torch.device
) -> dict[str, Tensor]:
    """The target once its parts fit each other and the image.

    The masks are then on the model's device. Boxes and labels are on the CPU, where windows are
    assigned while a GPU is busy with the image; given on a GPU, it is waited for.
    """
    boxes, labels, masks = target["boxes"].cpu(), target["labels"].cpu(), target["masks"]
    num_objects, size = len(boxes), tuple(image.shape[-2:])
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
