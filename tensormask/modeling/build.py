"""From a config to a model: the only reader of the keys of the model's parts."""

from collections.abc import Callable

import torch

from tensormask.config.node import HEAD_SWITCHES
from tensormask.modeling.backbone import ResNet
from tensormask.modeling.fpn import FPN
from tensormask.modeling.head import ClassBoxHead
from tensormask.modeling.mask_head import MaskHead
from tensormask.modeling.tensormask import TensorMask
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")


def build_model(cfg) -> TensorMask:
    """A `TensorMask` from a config (see config.py), on ``cfg.MODEL.DEVICE``, with fresh weights.

    Raises:
        ValueError: the config is no TensorMask, or asks for what does not exist.
    """
    model, head = cfg.MODEL, cfg.MODEL.TENSOR_MASK
    if model.META_ARCHITECTURE != "TensorMask":
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {model.META_ARCHITECTURE!r}: this is no TensorMask. "
            "Start from configs/tensormask_R_50_FPN_1x.yaml, or base yours on Base-TensorMask.yaml"
        )
    stages = ["res2", "res3", "res4", "res5"]
    for key, value in (
        ("MODEL.RESNETS.OUT_FEATURES", model.RESNETS.OUT_FEATURES),
        ("MODEL.FPN.IN_FEATURES", model.FPN.IN_FEATURES),
    ):
        if list(value) != stages:
            raise UserError(f"{key} must be {stages}, got {list(value)}")
    windows = build_windows(cfg)
    backbone = ResNet(
        model.RESNETS.DEPTH,
        norm=model.RESNETS.NORM,
        freeze_at=model.BACKBONE.FREEZE_AT,
        stride_in_1x1=model.RESNETS.STRIDE_IN_1X1,
    )
    fpn = FPN(
        backbone.out_channels,
        model.FPN.OUT_CHANNELS,
        levels=(windows.levels[0], windows.levels[-1]),
        norm=model.FPN.NORM,
        fuse=model.FPN.FUSE_TYPE,
    )
    class_box_head = ClassBoxHead(
        model.FPN.OUT_CHANNELS,
        windows.num_sizes,
        head.NUM_CLASSES,
        with_boxes=head.BOX_ON,
        cls_channels=head.CLS_CHANNELS,
        bbox_channels=head.BBOX_CHANNELS,
        num_convs=head.NUM_CONVS,
        init=head.INIT,
        checkpointed=head.CHECKPOINT_ACTIVATIONS,
    )
    tensormask = TensorMask(
        backbone,
        fpn,
        class_box_head,
        build_mask_head(cfg, windows) if model.MASK_ON else None,
        windows,
        num_classes=head.NUM_CLASSES,
        pixel_mean=model.PIXEL_MEAN,
        pixel_std=model.PIXEL_STD,
        channel_order=cfg.INPUT.FORMAT,
        size_divisor=model.SIZE_DIVISOR,
        channels_last=model.CHANNELS_LAST,
        autocast_dtype=autocast_dtype("TEST.AMP", cfg.TEST.AMP),
        box_weights=head.BBOX_REG_WEIGHTS,
        focal_alpha=head.FOCAL_LOSS_ALPHA,
        focal_gamma=head.FOCAL_LOSS_GAMMA,
        mask_loss_weight=head.MASK_LOSS_WEIGHT,
        mask_positive_weight=head.POSITIVE_WEIGHT,
        score_threshold=head.SCORE_THRESH_TEST,
        num_candidates=head.TOPK_CANDIDATES_TEST,
        nms_on=head.NMS_ON,
        nms_threshold=head.NMS_THRESH_TEST,
        num_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
    ).to(resolve_device(model.DEVICE))
    if model.COMPILE:
        compile_dense_parts(tensormask, model.COMPILE)
    return tensormask


def compile_dense_parts(model: TensorMask, mode: str, backend: str | Callable = "inductor") -> None:
    """Compile what is the same for every image of a size: backbone, pyramid, class and box head.

    Each new size is compiled anew, for a minute or so. Names of weights stay as they are.

    Args:
        mode: of `torch.compile`. "reduce-overhead" replays CUDA graphs.
        backend: of `torch.compile`.

    Raises:
        ValueError: there is no such mode.
    """
    if mode not in COMPILE_MODES:
        raise UserError(
            f"MODEL.COMPILE must be empty or one of {', '.join(COMPILE_MODES)}, got {mode!r}"
        )
    # Sizes up to 1333 px, upright and lying.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 512)
    options = {"mode": mode} if backend == "inductor" else {"backend": backend}
    for part in (model.backbone, model.fpn, model.head):
        part.compile(dynamic=False, **options)
    model.dense_boxes = True  # the same work for every image


def autocast_dtype(key: str, options) -> torch.dtype | None:
    """The dtype of an ``AMP`` group of the config; None where it is off.

    Raises:
        ValueError: its DTYPE is another than bfloat16 or float16.
    """
    if options.DTYPE not in ("bfloat16", "float16"):
        raise UserError(f"{key}.DTYPE is {options.DTYPE!r}; it must be 'bfloat16' or 'float16'")
    return getattr(torch, options.DTYPE) if options.ENABLED else None


def build_mask_head(cfg, windows: Windows) -> MaskHead:
    """The mask head of a config's model.

    Raises:
        ValueError: there is no such head, or what is said of it does not go together.
    """
    options = cfg.MODEL.TENSOR_MASK
    _check_head(options)
    return MaskHead(
        cfg.MODEL.FPN.OUT_CHANNELS,
        windows.mask_sizes,
        windows.strides,
        aligned=options.ALIGNED_ON,
        bipyramid=options.BIPYRAMID_ON,
        upscale=options.UPSCALE_LAMBDA,
        upscale_mode=options.UPSCALE_MODE,
        channels=options.MASK_CHANNELS,
        num_convs=options.NUM_CONVS,
        init=options.INIT,
        checkpointed=options.CHECKPOINT_ACTIVATIONS,
    )


def _check_head(options) -> None:
    """Raise ValueError unless HEAD, detectron2's switches and the upscaling go together."""
    head, switches = options.HEAD, (options.ALIGNED_ON, options.BIPYRAMID_ON)
    if head != "auto" and head not in HEAD_SWITCHES:
        raise UserError(
            f"MODEL.TENSOR_MASK.HEAD must be one of auto, {', '.join(HEAD_SWITCHES)}, got {head!r}"
        )
    if head != "auto" and switches != HEAD_SWITCHES[head]:
        raise UserError(
            "MODEL.TENSOR_MASK.HEAD is {!r}, which has ALIGNED_ON {} and BIPYRAMID_ON {}, but they "
            "are {} and {}: leave the two out, or set HEAD to 'auto' to let them decide".format(
                head, *HEAD_SWITCHES[head], *switches
            )
        )
    upscales = head.startswith("upscale_")
    if upscales and options.UPSCALE_LAMBDA <= 1:
        raise UserError(
            f"MODEL.TENSOR_MASK.HEAD is {head!r}, and MODEL.TENSOR_MASK.UPSCALE_LAMBDA is "
            f"{options.UPSCALE_LAMBDA}, which upscales nothing: set it to 1.5, 3 or 5"
        )
    if not upscales and (options.UPSCALE_LAMBDA, options.UPSCALE_MODE) != (1, "bilinear"):
        raise UserError(
            "MODEL.TENSOR_MASK.UPSCALE_LAMBDA and UPSCALE_MODE are of the heads upscale_natural "
            f"and upscale_aligned, but MODEL.TENSOR_MASK.HEAD is {head!r}: set it to one of them, "
            "or leave UPSCALE_LAMBDA at 1 and UPSCALE_MODE at 'bilinear'"
        )


def build_windows(cfg) -> Windows:
    """The windows of a config's model.

    Raises:
        ValueError: levels that are no neighbours, windows that are not square or do not fit.
    """
    names, anchors = cfg.MODEL.TENSOR_MASK.IN_FEATURES, cfg.MODEL.ANCHOR_GENERATOR
    levels = [int(name.removeprefix("p")) for name in names]
    if not levels or levels != list(range(levels[0], levels[0] + len(levels))):
        raise UserError(
            "MODEL.TENSOR_MASK.IN_FEATURES must be neighbouring levels, fine to coarse, "
            f"got {names}"
        )
    if [list(ratios) for ratios in anchors.ASPECT_RATIOS] != [[1.0]]:
        raise UserError(
            "TensorMask's windows are square: MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS must be [[1.0]]"
        )
    return Windows(
        strides=tuple(2**level for level in levels),
        sizes=tuple(tuple(sizes) for sizes in anchors.SIZES),
    )


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU where there is one, else the CPU.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"MODEL.DEVICE is {name!r} and no GPU is available: set it to 'cpu' or 'auto'"
        )
    return device
