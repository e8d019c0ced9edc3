"""The parts of a model fit together: made so by `build_parts`, or checked."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from tensormask.config.detectron2 import HEAD_SWITCHES
from tensormask.layers.norm import LevelNorms
from tensormask.modeling.backbone import ResNet
from tensormask.modeling.fpn import FPN
from tensormask.modeling.head import ClassBoxHead
from tensormask.modeling.inference import check_score_threshold
from tensormask.modeling.inputs import SIZE_DIVISOR
from tensormask.modeling.mask_head import MaskHead
from tensormask.modeling.query import num_query_levels
from tensormask.modeling.trunks import build_trunk
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError, unknown_name


def build_parts(
    *,
    depth: int = 50,
    num_stages: int = 4,
    trunk: str = "",
    num_classes: int = 80,
    head: str | None = "bipyramid",
    upscale: float = 1.0,
    upscale_mode: str = "bilinear",
    mask_unit: int = 0,
    backbone: nn.Module | None = None,
    norm: str = "FrozenBN",
    freeze_at: int = 2,
    stride_in_1x1: bool = True,
    windows: Windows | None = None,
    fpn_channels: int = 256,
    fpn_norm: str = "",
    fuse: str = "avg",
    with_boxes: bool = True,
    mask_iou: bool = False,
    cls_channels: int = 256,
    bbox_channels: int = 128,
    mask_channels: int = 128,
    num_convs: int = 4,
    head_norm: str = "",
    init: str = "normal",
    checkpointed: bool = False,
    query_levels: Sequence[str] = (),
    query_threshold: float | None = None,
) -> tuple[nn.Module, FPN, ClassBoxHead, MaskHead | None, Windows]:
    """Return the first arguments of `TensorMask`. The defaults make the paper's R-50 with FPN.

    Args:
        depth, num_stages, norm, freeze_at, stride_in_1x1: of the `ResNet`.
        trunk: another backbone than a ResNet of this depth, see `trunks.build_trunk`.
        num_classes: without background.
        head: "simple_natural", "simple_aligned", "upscale_natural", "upscale_aligned" or
            "bipyramid"; None for a model without masks.
        upscale, upscale_mode: of an upscale head, see `MaskHead`.
        mask_unit: of the bipyramid, see `MaskHead`.
        backbone: used instead of a ResNet; see `TensorMask`.
        windows: by default the paper's, of 11 and 15 times the stride, on the levels of the
            backbone and two coarser ones.
        fpn_channels, fpn_norm, fuse: of the `FPN`.
        with_boxes, mask_iou, cls_channels, bbox_channels, num_convs, init, checkpointed: of the
            `ClassBoxHead`; the last three also of the `MaskHead`.
        head_norm: of the towers of both heads, see `head.conv_tower`.
        mask_channels: of the tower of the `MaskHead`.
        query_levels: names of levels, such as ("p3",), whose class towers say where the finest
            level is computed in inference, see `query.Query`; () for no query.
        query_threshold: of the `Query`; None for the one in its weights.

    Raises:
        UserError: an option is invalid, or contradicts another.
    """
    if backbone is None:
        options: dict[str, Any] = {"norm": norm, "freeze_at": freeze_at}
        options["stride_in_1x1"] = stride_in_1x1
        if trunk:
            backbone = build_trunk(trunk, **options)
        else:
            backbone = ResNet(depth, num_stages=num_stages, **options)
    said: list[Any] = [getattr(backbone, name, None) for name in ("out_channels", "strides")]
    try:
        channels, strides = (list(map(int, numbers)) for numbers in said)
    except TypeError:
        raise UserError(
            "the backbone needs the attributes out_channels and strides, each a list with a number "
            f"for each of its feature maps, fine to coarse; got {said[0]} and {said[1]}"
        ) from None
    if windows is None:
        windows = Windows.of_strides([*strides, 2 * strides[-1], 4 * strides[-1]])
    fpn = FPN(
        channels,
        fpn_channels,
        levels=(windows.levels[0], windows.levels[-1]),
        in_strides=strides,
        norm=fpn_norm,
        fuse=fuse,
    )
    towers: dict[str, Any] = {
        "num_convs": num_convs,
        "norm": head_norm,
        "init": init,
        "checkpointed": checkpointed,
    }
    class_box_head = ClassBoxHead(
        fpn_channels,
        windows.num_sizes,
        num_classes,
        with_boxes=with_boxes,
        mask_iou=mask_iou,
        cls_channels=cls_channels,
        bbox_channels=bbox_channels,
        num_levels=len(windows.strides),
        query=num_query_levels(query_levels, windows, head_norm) if query_levels else 0,
        query_threshold=query_threshold,
        **towers,
    )
    mask_head = None
    if head is not None:
        _check_head(head, upscale, upscale_mode)
        aligned, bipyramid = HEAD_SWITCHES[head]
        mask_head = MaskHead(
            fpn_channels,
            windows.mask_sizes,
            windows.strides,
            aligned=aligned,
            bipyramid=bipyramid,
            upscale=upscale,
            upscale_mode=upscale_mode,
            mask_unit=mask_unit,
            channels=mask_channels,
            **towers,
        )
    return backbone, fpn, class_box_head, mask_head, windows


def _check_head(head: str, upscale: float, upscale_mode: str) -> None:
    """Raise UserError for an unknown head, one that upscales by 1, or another one that upscales."""
    if head not in HEAD_SWITCHES:
        raise UserError(unknown_name("a mask head", str(head), list(HEAD_SWITCHES)))
    upscales = head.startswith("upscale_")
    if upscales and upscale <= 1:
        raise UserError(
            f"the head (MODEL.TENSOR_MASK.HEAD) is {head!r}, and MODEL.TENSOR_MASK.UPSCALE_LAMBDA "
            f"is {upscale}, which does not upscale: set it to 1.5, 3 or 5"
        )
    if not upscales and (upscale, upscale_mode) != (1, "bilinear"):
        raise UserError(
            "MODEL.TENSOR_MASK.UPSCALE_LAMBDA and UPSCALE_MODE are options of the heads "
            f"upscale_natural and upscale_aligned, but the head is {head!r}: set "
            "MODEL.TENSOR_MASK.HEAD to one of them, or leave UPSCALE_LAMBDA at 1 and UPSCALE_MODE "
            "at 'bilinear'"
        )


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
# The strides and channels of the feature maps that a part returns.
_FEATURES = {
    "backbone": ("backbone.strides", "backbone.out_channels"),
    "fpn": ("windows.strides", "head.in_channels"),
}


def check_model(model: Any) -> None:
    """Raise UserError if an option of a `TensorMask` is invalid, or parts contradict each other.

    A part of another type need not say anything; `as_levels` checks its output.
    """
    check_score_threshold(model.score_threshold)
    if model.nms_on not in ("boxes", "masks"):
        raise UserError(f"nms_on must be 'boxes' or 'masks', got {model.nms_on!r}")
    if model.channel_order not in ("RGB", "BGR"):
        raise UserError(f"channel_order must be 'RGB' or 'BGR', got {model.channel_order!r}")
    if model.size_divisor < 1 or model.size_divisor % SIZE_DIVISOR:
        raise UserError(
            f"size_divisor (MODEL.SIZE_DIVISOR) must be a multiple of {SIZE_DIVISOR}, "
            f"got {model.size_divisor}"
        )
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
    if model.mask_head is None and getattr(model.head, "mask_iou", False):
        raise UserError(
            "MODEL.TENSOR_MASK.MASK_IOU_ON predicts the IoU of masks, but the model has no mask "
            "head (MODEL.MASK_ON is False): set MASK_IOU_ON to False or MASK_ON to True"
        )
    if model.criterion.quality_loss is not None and not model.head.with_boxes:
        raise UserError(
            "quality_loss (MODEL.TENSOR_MASK.CLS_LOSS 'quality' and 'varifocal') needs boxes, but "
            "the model has no box head (BOX_ON is False): set CLS_LOSS to 'focal_star' or BOX_ON "
            "to True"
        )
    if model.query_sample:
        _check_query_sample(model)
    coarsest = max(_said(model, "backbone.strides") or [1])
    if model.size_divisor % coarsest:
        raise UserError(
            f"size_divisor must be a multiple of the backbone's coarsest stride, {coarsest}, got "
            f"{model.size_divisor}"
        )
    for fact, places in _FACTS.items():
        said = {place: value for place in places if (value := _said(model, place)) is not None}
        if any(value != next(iter(said.values())) for value in said.values()):
            texts = " and ".join(f"{place} is {value}" for place, value in said.items())
            raise UserError(f"the parts of the model differ in the {fact}: {texts}")


def _check_query_sample(model: Any) -> None:
    key = "query_sample (MODEL.TENSOR_MASK.QUERY_SAMPLE)"
    if not 0 < model.query_sample <= 1:
        raise UserError(f"{key} must be a share in 0..1, got {model.query_sample}")
    if getattr(model.head, "query", None) is None:
        raise UserError(f"{key} needs a query: set MODEL.TENSOR_MASK.QUERY_ON to True, or it to 0")
    if any(isinstance(module, LevelNorms) for module in model.head.cls_subnet):
        raise UserError(
            f"{key} trains on a part of the finest level, but the batch norm of the towers "
            "(MODEL.TENSOR_MASK.NORM 'BN') needs all of it: set NORM to '' or 'LN', or it to 0"
        )


def _said(model: Any, place: str) -> Any:
    """Return an attribute of a part, sequences as lists; None if it is missing."""
    value = reduce(lambda part, name: getattr(part, name, None), place.split("."), model)
    return list(value) if hasattr(value, "__iter__") else value


def as_levels(
    model: Any, part: str, features: Tensor | Sequence[Tensor] | Mapping[str, Tensor], batch: Tensor
) -> list[Tensor]:
    """Return the feature maps of a part as a list.

    Args:
        model: a `TensorMask`.
        part: "backbone" or "fpn".
        features: its output for a batch of images (N, 3, height, width), fine to coarse.

    Raises:
        UserError: the maps have other strides or channels than the model's attributes say.
    """
    if isinstance(features, Tensor):
        features = [features]
    levels = list(features.values() if isinstance(features, Mapping) else features)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return levels
    strides_at, channels_at = _FEATURES[part]
    strides, channels = _said(model, strides_at), _said(model, channels_at)
    height, width = batch.shape[-2:]
    if strides is not None:
        actual = [tuple(x.shape[-2:]) for x in levels]
        expected = [(-(-height // stride), -(-width // stride)) for stride in strides]
        if actual != expected:
            raise UserError(
                f"for images of {height} x {width} px, {part} returned feature maps of (H, W) = "
                f"{actual}, but {strides_at} {strides} give {expected}"
            )
    if channels is not None:
        wanted = [channels] * len(levels) if isinstance(channels, int) else channels
        returned = [x.shape[1] for x in levels]
        if returned != wanted:
            raise UserError(
                f"{part} returned feature maps of {returned} channels, but {channels_at} is "
                f"{channels}"
            )
    return levels
