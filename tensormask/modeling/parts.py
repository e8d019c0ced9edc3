"""Make the parts of a model so that they fit together. Each fact is given once."""

from typing import Any, NamedTuple

from torch import nn

from tensormask.config.detectron2 import HEAD_SWITCHES
from tensormask.modeling.backbone import ResNet
from tensormask.modeling.fpn import FPN
from tensormask.modeling.head import ClassBoxHead
from tensormask.modeling.mask_head import MaskHead
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError, unknown_name


class Parts(NamedTuple):
    """The parts of a `TensorMask`, in the order of its arguments."""

    backbone: nn.Module
    fpn: FPN
    head: ClassBoxHead
    mask_head: MaskHead | None
    windows: Windows


def build_parts(
    *,
    depth: int = 50,
    num_classes: int = 80,
    head: str | None = "bipyramid",
    upscale: float = 1.0,
    upscale_mode: str = "bilinear",
    backbone: nn.Module | None = None,
    norm: str = "FrozenBN",
    freeze_at: int = 2,
    stride_in_1x1: bool = True,
    windows: Windows | None = None,
    fpn_channels: int = 256,
    fpn_norm: str = "",
    fuse: str = "avg",
    with_boxes: bool = True,
    cls_channels: int = 256,
    bbox_channels: int = 128,
    mask_channels: int = 128,
    num_convs: int = 4,
    init: str = "normal",
    checkpointed: bool = False,
) -> Parts:
    """Return parts that fit together. The defaults are those of the paper's R-50 with FPN.

    Args:
        depth, norm, freeze_at, stride_in_1x1: of the `ResNet`.
        num_classes: without background.
        head: "simple_natural", "simple_aligned", "upscale_natural", "upscale_aligned" or
            "bipyramid"; None for a model without masks.
        upscale, upscale_mode: of an upscale head, see `MaskHead`.
        backbone: used instead of a ResNet; see `TensorMask`.
        windows: by default the paper's, of 11 and 15 times the stride, on the levels of the
            backbone and two coarser ones.
        fpn_channels, fpn_norm, fuse: of the `FPN`.
        with_boxes, cls_channels, bbox_channels, num_convs, init, checkpointed: of the
            `ClassBoxHead`; the last three also of the `MaskHead`.
        mask_channels: of the tower of the `MaskHead`.

    Raises:
        UserError: an option is invalid, or contradicts another.
    """
    if backbone is None:
        backbone = ResNet(depth, norm=norm, freeze_at=freeze_at, stride_in_1x1=stride_in_1x1)
    channels, strides = (getattr(backbone, name, None) for name in ("out_channels", "strides"))
    if channels is None or strides is None:
        raise UserError(
            "the backbone needs the attributes out_channels and strides, each a list with a number "
            f"for each of its feature maps, fine to coarse; got {channels} and {strides}"
        )
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
    class_box_head = ClassBoxHead(
        fpn_channels,
        windows.num_sizes,
        num_classes,
        with_boxes=with_boxes,
        cls_channels=cls_channels,
        bbox_channels=bbox_channels,
        num_convs=num_convs,
        init=init,
        checkpointed=checkpointed,
    )
    mask_head = None
    if head is not None:
        mask_head = make_mask_head(
            head,
            fpn_channels,
            windows,
            upscale=upscale,
            upscale_mode=upscale_mode,
            channels=mask_channels,
            num_convs=num_convs,
            init=init,
            checkpointed=checkpointed,
        )
    return Parts(backbone, fpn, class_box_head, mask_head, windows)


def make_mask_head(
    head: str,
    in_channels: int,
    windows: Windows,
    *,
    upscale: float,
    upscale_mode: str,
    **options: Any,
) -> MaskHead:
    """Return the mask head of a name, see `build_parts`; other options are those of `MaskHead`.

    Raises:
        UserError: there is no such head, a head that upscales does not, or another one does.
    """
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
    aligned, bipyramid = HEAD_SWITCHES[head]
    return MaskHead(
        in_channels,
        windows.mask_sizes,
        windows.strides,
        aligned=aligned,
        bipyramid=bipyramid,
        upscale=upscale,
        upscale_mode=upscale_mode,
        **options,
    )
