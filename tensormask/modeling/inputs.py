"""The input of the model: checks of images and targets, and the size of a padded batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tensormask.layers.masks import to_device
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


def batch_images(
    images: Sequence[Tensor],
    mean: Tensor,
    std: Tensor,
    *,
    bgr: bool,
    divisor: int,
    channels_last: bool,
) -> Tensor:
    """Return the normalized images (N, 3, height, width), padded with 0 at right and bottom.

    They are normalized in at least float32. The batch has the device and dtype of ``mean``.
    """
    if len(images) == 0:
        raise UserError("there are no images: give a list of at least one")
    for image in images:
        check_image(image)
    dtype = torch.promote_types(mean.dtype, torch.float32)
    heights, widths = zip(*map(size_of, images), strict=True)
    size = padded_size(max(heights), max(widths), divisor)
    batch = mean.new_zeros(len(images), 3, *size)
    if channels_last:
        batch = batch.contiguous(memory_format=torch.channels_last)
    for n, image in enumerate(images):
        is_uint8 = image.dtype == torch.uint8
        if not image.requires_grad:
            image = to_device(image, mean.device)
        image = image.to(mean.device, dtype)
        image = image if is_uint8 else image * 255
        image = image.flip(0) if bgr else image
        batch[n, :, : image.shape[1], : image.shape[2]] = (image - mean) / std
    return batch


def check_image(image: Tensor) -> None:
    """Raise UserError unless an image has a valid shape, dtype and range."""
    if not isinstance(image, Tensor):
        raise UserError(f"an image must be a tensor (3, H, W), RGB, got {type(image).__name__}")
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


def check_length(name: str, values: Sequence[Any], images: Sequence[Tensor]) -> None:
    """Raise UserError unless there is a value for each image."""
    if len(values) != len(images):
        raise UserError(
            f"{name} must have one entry per image: got {len(values)} for {len(images)} images"
        )


def checked_target(
    target: dict[str, Tensor],
    image: Tensor,
    num_classes: int,
    device: torch.device,
    *,
    with_masks: bool = True,
) -> dict[str, Tensor]:
    """Return the target after checking its parts against each other and the image.

    Floating masks are True above 0.5. The masks are moved to the model's device. Boxes and labels
    are moved to the CPU, where windows are assigned while a GPU runs the backbone.
    """
    names = ("boxes", "labels", "masks") if with_masks else ("boxes", "labels")
    if not isinstance(target, Mapping) or not all(
        isinstance(target.get(name), Tensor) for name in names
    ):
        given = list(target) if isinstance(target, Mapping) else type(target).__name__
        raise UserError(
            f"a target must be a dict with the tensors {', '.join(names)}, got {given}; an image "
            "without objects has a target with empty ones"
        )
    boxes, labels = target["boxes"].cpu(), target["labels"].cpu()
    num_objects, shapes = len(boxes), [tuple(x.shape) for x in (boxes, labels)]
    if shapes != [(num_objects, 4), (num_objects,)]:
        raise UserError(f"boxes must be (K, 4) and labels (K,), got {shapes[0]} and {shapes[1]}")
    if labels.dtype != torch.int64:
        raise UserError(f"labels must be int64, got {labels.dtype}")
    if num_objects and (labels.min() < 0 or labels.max() >= num_classes):
        raise UserError(
            f"labels must be in 0..{num_classes - 1}, got {labels.min()}..{labels.max()}: "
            "set MODEL.TENSOR_MASK.NUM_CLASSES to the number of classes of the data"
        )
    if not (boxes[:, 2:] > boxes[:, :2]).all():
        raise UserError("boxes must have x0 < x1 and y0 < y1: leave out objects without area")
    checked = {"boxes": boxes.float(), "labels": labels}
    if with_masks:
        masks = target["masks"]
        if masks.shape != (num_objects, *size_of(image)):
            raise UserError(
                f"masks must be (K, H, W) = {(num_objects, *size_of(image))} like the boxes and "
                f"the image, got {tuple(masks.shape)}"
            )
        masks = to_device(masks, device)
        checked["masks"] = masks > 0.5 if masks.is_floating_point() else masks.bool()
    return checked
