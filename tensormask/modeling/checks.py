"""Checks that the parts of a model fit together."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from tensormask.modeling.inputs import SIZE_DIVISOR
from tensormask.utils.errors import UserError

# What several parts of a TensorMask say, and where: attributes of the model.
_FACTS = {
    "strides of the backbone's features": ("backbone.strides", "fpn.in_strides"),
    "channels of the backbone's features": ("backbone.out_channels", "fpn.in_channels"),
    "strides of the pyramid": ("fpn.strides", "windows.strides", "mask_head.strides"),
    "channels of the pyramid": ("fpn.out_channels", "head.in_channels", "mask_head.in_channels"),
    "number of windows at a location": ("windows.num_sizes", "head.num_sizes"),
    "sides of the masks": ("windows.mask_sizes", "mask_head.mask_sizes"),
    "number of classes": ("head.num_classes", "num_classes"),
}


def check_parts(model: Any) -> None:
    """Raise UserError if the parts or options of a `TensorMask` contradict each other.

    A part of another type need not say anything; `as_levels` checks its output.
    """
    if model.nms_on == "boxes" and not model.head.with_boxes:
        raise UserError(
            "MODEL.TENSOR_MASK.NMS_ON is 'boxes', but the model has no box head (BOX_ON is "
            "False): set NMS_ON to 'masks' or BOX_ON to True"
        )
    if model.nms_on == "masks" and model.mask_head is None:
        raise UserError(
            "MODEL.TENSOR_MASK.NMS_ON is 'masks', but the model has no mask head "
            "(MODEL.MASK_ON is False): set NMS_ON to 'boxes' or MASK_ON to True"
        )
    coarsest = max(getattr(model.backbone, "strides", (1,)))
    if model.size_divisor % coarsest:
        raise UserError(
            f"size_divisor must be a multiple of the backbone's coarsest stride, {coarsest}, got "
            f"{model.size_divisor}"
        )
    for fact, places in _FACTS.items():
        said = {}
        for place in places:
            value = reduce(lambda part, name: getattr(part, name, None), place.split("."), model)
            if value is not None:
                said[place] = list(value) if isinstance(value, Sequence) else value
        if any(value != next(iter(said.values())) for value in said.values()):
            texts = " and ".join(f"{place} is {value}" for place, value in said.items())
            raise UserError(f"the parts of the model differ in the {fact}: {texts}")


def as_levels(
    part: str,
    features: Sequence[Tensor] | Mapping[str, Tensor],
    batch: Tensor,
    source: str,
    strides: Sequence[int] | None,
    channels: Sequence[int] | int | None,
) -> list[Tensor]:
    """Return the feature maps of a part as a list.

    Args:
        part: its name, "backbone" or "fpn".
        features: its output for a batch of images, fine to coarse.
        batch: the images (N, 3, height, width).
        source: of the strides, such as "windows.strides".
        strides, channels: that the maps must have; None for any.

    Raises:
        UserError: the maps have others.
    """
    levels = list(features.values() if isinstance(features, Mapping) else features)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return levels
    height, width = batch.shape[-2:]
    if strides is not None:
        actual = [tuple(x.shape[-2:]) for x in levels]
        expected = [(-(-height // stride), -(-width // stride)) for stride in strides]
        if actual != expected:
            raise UserError(
                f"for images of {height} x {width} px, {part} returned feature maps of (H, W) = "
                f"{actual}, but {source} {list(strides)} give {expected}"
            )
    if channels is not None:
        wanted = [channels] * len(levels) if isinstance(channels, int) else list(channels)
        returned = [x.shape[1] for x in levels]
        if returned != wanted:
            raise UserError(
                f"{part} returned feature maps of {returned} channels, but its out_channels are "
                f"{wanted}"
            )
    return levels


def check_options(nms_on: str, channel_order: str, size_divisor: int) -> None:
    """Raise UserError if an option of `TensorMask` has an invalid value."""
    if nms_on not in ("boxes", "masks"):
        raise UserError(f"nms_on must be 'boxes' or 'masks', got {nms_on!r}")
    if channel_order not in ("RGB", "BGR"):
        raise UserError(f"channel_order must be 'RGB' or 'BGR', got {channel_order!r}")
    if size_divisor < 1 or size_divisor % SIZE_DIVISOR:
        raise UserError(
            f"size_divisor (MODEL.SIZE_DIVISOR) must be a multiple of {SIZE_DIVISOR}, "
            f"got {size_divisor}"
        )
