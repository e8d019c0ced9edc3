"""Build a model from a config: the only reader of the config keys of the model's parts."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tensormask.config import CfgNode, get_cfg
from tensormask.config.detectron2 import HEAD_SWITCHES
from tensormask.modeling.assigners import Assigner, make_assigner
from tensormask.modeling.criterion import QualityLoss
from tensormask.modeling.losses import focal_loss_star, mask_loss
from tensormask.modeling.quality_losses import quality_focal_loss, varifocal_loss
from tensormask.modeling.tensormask import TensorMask
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError, unknown_name

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
# More than all sizes up to 1344 px in steps of 32, in training and in inference: 2 * 42 * 42.
_MAX_COMPILED_SIZES = 4096


def build_model(
    cfg: CfgNode, *, sum_over_ranks: Callable[[Tensor], Tensor] | None = None
) -> TensorMask:
    """Return a `TensorMask` on ``cfg.MODEL.DEVICE``, with random weights.

    Args:
        cfg: see `tensormask.get_cfg` and config/defaults.py.
        sum_over_ranks: of `TensorMask`.

    Raises:
        UserError: the config is not of a TensorMask, or an option is invalid.

    Example:
        >>> from tensormask import model_zoo
        >>> cfg = model_zoo.get_config("tensormask_R_50_FPN_1x")
        >>> cfg.MODEL.DEVICE = "cpu"
        >>> build_model(cfg).windows.mask_sizes
        [11, 15]
    """
    given, cfg = cfg, get_cfg()  # a value that was set by attribute can have another type
    cfg.merge_from_other_cfg({key: given[key] for key in ("INPUT", "MODEL", "TEST")})
    model, head = cfg.MODEL, cfg.MODEL.TENSOR_MASK
    if model.META_ARCHITECTURE != "TensorMask":
        raise UserError(
            f"MODEL.META_ARCHITECTURE must be 'TensorMask', got {model.META_ARCHITECTURE!r}: start "
            "from configs/tensormask_R_50_FPN_1x.yaml, or set _BASE_ to Base-TensorMask.yaml"
        )
    num_stages = _num_stages(model)
    device = resolve_device(model.DEVICE)
    tensormask = TensorMask.build(
        depth=model.RESNETS.DEPTH,
        num_stages=num_stages,
        trunk=model.BACKBONE.TRUNK,
        norm=model.RESNETS.NORM,
        freeze_at=model.BACKBONE.FREEZE_AT,
        stride_in_1x1=model.RESNETS.STRIDE_IN_1X1,
        fpn_channels=model.FPN.OUT_CHANNELS,
        fpn_norm=model.FPN.NORM,
        fuse=model.FPN.FUSE_TYPE,
        windows=build_windows(cfg),
        num_classes=head.NUM_CLASSES,
        with_boxes=head.BOX_ON,
        mask_iou=head.MASK_IOU_ON and model.MASK_ON,
        head=_head_name(head) if model.MASK_ON else None,
        upscale=head.UPSCALE_LAMBDA,
        upscale_mode=head.UPSCALE_MODE,
        mask_unit=head.MASK_UNIT,
        cls_channels=head.CLS_CHANNELS,
        bbox_channels=head.BBOX_CHANNELS,
        mask_channels=head.MASK_CHANNELS,
        num_convs=head.NUM_CONVS,
        head_norm=head.NORM,
        init=head.INIT,
        checkpointed=head.CHECKPOINT_ACTIVATIONS,
        query_levels=head.QUERY_LEVELS if head.QUERY_ON else (),
        query_threshold=_query_threshold(head.QUERY_THRESH),
        pixel_mean=model.PIXEL_MEAN,
        pixel_std=model.PIXEL_STD,
        channel_order=cfg.INPUT.FORMAT,
        size_divisor=model.SIZE_DIVISOR,
        channels_last=use_channels_last(model.CHANNELS_LAST, device),
        autocast_dtype=autocast_dtype("TEST.AMP", cfg.TEST.AMP),
        assigner=build_assigner(cfg),
        box_weights=head.BBOX_REG_WEIGHTS,
        cls_loss=functools.partial(
            focal_loss_star, alpha=head.FOCAL_LOSS_ALPHA, gamma=head.FOCAL_LOSS_GAMMA
        ),
        quality_loss=_quality_loss(head.CLS_LOSS),
        box_loss_weight=head.BBOX_REG_LOSS_WEIGHT,
        mask_loss=functools.partial(mask_loss, positive_weight=head.POSITIVE_WEIGHT),
        mask_loss_weight=head.MASK_LOSS_WEIGHT,
        dice_loss_weight=head.DICE_LOSS_WEIGHT,
        mask_iou_loss_weight=head.MASK_IOU_LOSS_WEIGHT,
        score_threshold=head.SCORE_THRESH_TEST,
        num_candidates=head.TOPK_CANDIDATES_TEST,
        nms_on=head.NMS_ON,
        nms_threshold=head.NMS_THRESH_TEST,
        class_agnostic_nms=cfg.TEST.CLASS_AGNOSTIC_NMS,
        num_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        query_sample=head.QUERY_SAMPLE,
        sum_over_ranks=sum_over_ranks,
    ).to(device)
    if model.COMPILE:
        compile_dense_parts(tensormask, model.COMPILE)
    return tensormask


def compile_dense_parts(model: TensorMask, mode: str, backend: str | Callable = "inductor") -> None:
    """Compile the backbone, the pyramid, and the class and box head.

    Each new input size is compiled again, which takes about a minute. Names of weights do not
    change.

    Args:
        model: compiled in place.
        mode: of `torch.compile`. "reduce-overhead" replays CUDA graphs.
        backend: of `torch.compile`.

    Raises:
        UserError: the mode does not exist.
    """
    if mode not in COMPILE_MODES:
        raise UserError(
            f"MODEL.COMPILE must be empty or one of {', '.join(COMPILE_MODES)}, got {mode!r}"
        )
    options = {"mode": mode} if backend == "inductor" else {"backend": backend}
    for part in (model.backbone, model.fpn, model.head):
        part.compile(dynamic=False, **options)
        assert part._compiled_call_impl is not None
        part._compiled_call_impl = _with_recompile_limits(part._compiled_call_impl)


def _with_recompile_limits(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Raise PyTorch's limits on compilations during calls: beyond them it runs uncompiled."""

    def call(*args: Any, **kwargs: Any) -> Any:
        config = torch._dynamo.config
        limits = {
            name: max(getattr(config, name), _MAX_COMPILED_SIZES)
            for name in ("recompile_limit", "accumulated_recompile_limit")
        }
        with config.patch(limits):
            return compiled(*args, **kwargs)

    return call


def autocast_dtype(key: str, options: CfgNode) -> torch.dtype | None:
    """Return the dtype of an ``AMP`` group of the config; None if it is disabled.

    Raises:
        UserError: its DTYPE is neither bfloat16 nor float16.
    """
    if options.DTYPE not in ("bfloat16", "float16"):
        raise UserError(f"{key}.DTYPE must be 'bfloat16' or 'float16', got {options.DTYPE!r}")
    return getattr(torch, options.DTYPE) if options.ENABLED else None


def _num_stages(model: CfgNode) -> int:
    """Return the number of stages of the backbone of ``cfg.MODEL``.

    Raises:
        UserError: they are not the first ones, or the pyramid has others.
    """
    stages = ["res2", "res3", "res4", "res5"]
    given = list(model.RESNETS.OUT_FEATURES)
    if not given or given != stages[: len(given)]:
        raise UserError(f"MODEL.RESNETS.OUT_FEATURES must be {stages}, or its start, got {given}")
    if model.BACKBONE.TRUNK and given != stages:
        raise UserError(
            f"MODEL.RESNETS.OUT_FEATURES must be {stages} with MODEL.BACKBONE.TRUNK, got {given}"
        )
    if list(model.FPN.IN_FEATURES) != given:
        raise UserError(
            f"MODEL.FPN.IN_FEATURES must be those of MODEL.RESNETS.OUT_FEATURES, {given}, got "
            f"{list(model.FPN.IN_FEATURES)}"
        )
    return len(given)


def _head_name(options: CfgNode) -> str:
    """Return the head of a config: HEAD, or that of detectron2's switches.

    Raises:
        UserError: there is no such head, or HEAD contradicts the switches.
    """
    head, switches = options.HEAD, (options.ALIGNED_ON, options.BIPYRAMID_ON)
    if head == "auto":
        if switches == (False, True):
            raise UserError(
                "the tensor bipyramid needs aligned masks: set MODEL.TENSOR_MASK.ALIGNED_ON to "
                "True, or BIPYRAMID_ON to False"
            )
        return next(name for name, values in HEAD_SWITCHES.items() if values == switches)
    if head not in HEAD_SWITCHES:
        raise UserError(
            f"MODEL.TENSOR_MASK.HEAD must be one of auto, {', '.join(HEAD_SWITCHES)}, got {head!r}"
        )
    if switches != HEAD_SWITCHES[head]:
        raise UserError(
            "MODEL.TENSOR_MASK.HEAD is {!r}, which has ALIGNED_ON {} and BIPYRAMID_ON {}, but they "
            "are {} and {}: remove the two, or set HEAD to 'auto' to use them".format(
                head, *HEAD_SWITCHES[head], *switches
            )
        )
    return head


def _query_threshold(value: float) -> float | None:
    """Return QUERY_THRESH, None for -1; UserError if it is no score."""
    if value != -1 and not 0 <= value < 1:
        raise UserError(
            "MODEL.TENSOR_MASK.QUERY_THRESH must be a score in 0..1, below 1, or -1 for the one in "
            f"the checkpoint, got {value}"
        )
    return None if value == -1 else value


def _quality_loss(name: str) -> QualityLoss | None:
    """Return the loss of classes of a name, None for FL*; UserError if there is none."""
    losses = {"focal_star": None, "quality": quality_focal_loss, "varifocal": varifocal_loss}
    if name not in losses:
        raise UserError(
            unknown_name("a loss of classes (MODEL.TENSOR_MASK.CLS_LOSS)", name, losses)
        )
    return losses[name]


def build_windows(cfg: CfgNode) -> Windows:
    """Return the windows of a config's model.

    Raises:
        UserError: the levels are not consecutive, or the windows are not square, or invalid.
    """
    names, anchors = cfg.MODEL.TENSOR_MASK.IN_FEATURES, cfg.MODEL.ANCHOR_GENERATOR
    levels = [int(name.removeprefix("p")) for name in names]
    if not levels or levels != list(range(levels[0], levels[0] + len(levels))):
        raise UserError(
            f"MODEL.TENSOR_MASK.IN_FEATURES must be consecutive levels, fine to coarse, got {names}"
        )
    if [list(ratios) for ratios in anchors.ASPECT_RATIOS] != [[1.0]]:
        raise UserError(
            "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS must be [[1.0]], because the windows are square, "
            f"got {anchors.ASPECT_RATIOS}"
        )
    return Windows(
        strides=tuple(2**level for level in levels),
        sizes=tuple(tuple(sizes) for sizes in anchors.SIZES),
    )


def build_assigner(cfg: CfgNode) -> Assigner:
    """Return the assigner of a config's model.

    Raises:
        UserError: its name or a number is invalid.
    """
    head = cfg.MODEL.TENSOR_MASK
    return make_assigner(head.ASSIGNMENT, head.ASSIGN_RADIUS, head.ASSIGN_TOPK)


def use_channels_last(value: bool | str, device: torch.device) -> bool:
    """Return whether `MODEL.CHANNELS_LAST` True, False or "auto" is on for a device."""
    if value == "auto":  # tensor cores came with compute capability 7.0
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    return bool(value)


def resolve_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is the GPU if one is available, else the CPU.

    Raises:
        UserError: no device has this name, or no GPU is available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"MODEL.DEVICE is {name!r}: set it to 'auto', 'cpu' or 'cuda:0'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"MODEL.DEVICE is {name!r} and no GPU is available: set it to 'cpu' or 'auto'"
        )
    return device
