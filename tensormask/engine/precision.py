"""Number formats, memory layout and compilation: what makes the same training faster."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormask.config import CfgNode

logger = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_FLOAT32_PRECISIONS = ("", "highest", "high", "medium")
# Below this scale float16 does not underflow any more: gradients that are not finite are a fault.
_MIN_SCALE = 1.0

Autocast = Callable[[], AbstractContextManager]


def build_autocast(cfg: CfgNode, device: torch.device) -> tuple[Autocast, torch.amp.GradScaler]:
    """The context for forward pass and losses that `SOLVER.AMP` asks for, and the loss scaler.

    bfloat16 has float32's range and needs no scaler, so only float16's is enabled; a disabled one
    hands everything through.

    Raises:
        ValueError: an unknown `SOLVER.AMP.DTYPE`, or a GPU that does not have it.
    """
    amp = cfg.SOLVER.AMP
    if amp.DTYPE not in _DTYPES:
        raise ValueError(f"SOLVER.AMP.DTYPE is {amp.DTYPE!r}; it must be 'bfloat16' or 'float16'")
    if amp.ENABLED and amp.DTYPE == "bfloat16" and device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError(
                "SOLVER.AMP.DTYPE is 'bfloat16', which this GPU does not have: set it to 'float16'"
            )
    autocast = partial(torch.autocast, device.type, _DTYPES[amp.DTYPE], enabled=amp.ENABLED)
    scaler = torch.amp.GradScaler(device.type, enabled=amp.ENABLED and amp.DTYPE == "float16")
    return autocast, scaler


def may_skip(scaler: torch.amp.GradScaler) -> bool:
    """Whether gradients that are not finite mean that the scale was too large, not a fault."""
    return scaler.is_enabled() and scaler.get_scale() > _MIN_SCALE


def set_float32_precision(precision: str) -> None:
    """Choose the precision of float32 products (`FLOAT32_PRECISION`, detectron2's key).

    "highest" is float32 all through; "high" lets a GPU take TF32, of 10 bits, in products of
    matrices and in convolutions, and "medium" lets it take less still. "" leaves PyTorch's choice:
    TF32 in convolutions only.

    Raises:
        ValueError: another word.
    """
    if precision not in _FLOAT32_PRECISIONS:
        raise ValueError(
            f"FLOAT32_PRECISION is {precision!r}; it must be one of {_FLOAT32_PRECISIONS}"
        )
    torch.set_float32_matmul_precision(precision or "highest")
    torch.backends.cudnn.allow_tf32 = precision != "highest"


def use_channels_last(model: nn.Module) -> None:
    """Lay the convolutions' weights out as (N, H, W, C); what they put out follows them."""
    model.to(memory_format=torch.channels_last)


def compile_model(model: nn.Module, size_divisor: int, backend: str = "inductor") -> None:
    """Compile the backbone's stages, the pyramid and the towers of a `TensorMask`, in place.

    Each new size of the input is compiled anew, which takes minutes, so batches are padded in
    training to multiples of `size_divisor` pixels: larger ones mean fewer sizes and more padding.
    Names of weights stay as they are. Evaluation runs uncompiled and unpadded, see
    `torch.compiler.set_stance`.

    Raises:
        ValueError: `size_divisor` is no multiple of 32, to which the model pads already.
    """
    if size_divisor < 32 or size_divisor % 32:
        raise ValueError(
            f"SOLVER.COMPILE.SIZE_DIVISOR is {size_divisor}; it must be a multiple of 32 px, "
            "such as 128"
        )
    # Sizes up to 1333 px upright and lying, and the levels of the pyramid that share their towers.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 512)
    model.backbone.register_forward_pre_hook(partial(_pad, size_divisor=size_divisor))
    parts = [*model.backbone.children(), model.fpn, model.head]
    if model.mask_head is not None:
        # At windows, whose number changes from batch to batch, the mask head stays as it is.
        parts.append(model.mask_head.mask_subnet)
    for part in parts:
        part.compile(backend=backend, dynamic=False)
    logger.info("Compiling; the first iteration of each input size takes long")


def _pad(module: nn.Module, args: tuple[Tensor], *, size_divisor: int) -> tuple[Tensor] | None:
    if not module.training:
        return None
    height, width = args[0].shape[-2:]
    return (F.pad(args[0], (0, -width % size_divisor, 0, -height % size_divisor)),)
