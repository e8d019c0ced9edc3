"""Number formats of training: half precision with its loss scale, and what float32 means."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch

from tensormask.config import CfgNode
from tensormask.modeling.build import autocast_dtype
from tensormask.utils.errors import UserError

_FLOAT32_PRECISIONS = ("", "highest", "high", "medium")
# Below this scale float16 does not underflow any more: gradients that are not finite are an issue.
_MIN_SCALE = 1.0

Autocast = Callable[[], AbstractContextManager]


def build_autocast(cfg: CfgNode, device: torch.device) -> tuple[Autocast, torch.amp.GradScaler]:
    """The context for forward pass and losses that `SOLVER.AMP` asks for, and the loss scaler.

    bfloat16 has float32's range and needs no scaler, so only float16's is enabled; a disabled one
    hands everything through.

    Raises:
        ValueError: an unknown `SOLVER.AMP.DTYPE`, or a GPU that does not have it.
    """
    dtype = autocast_dtype("SOLVER.AMP", cfg.SOLVER.AMP)
    if dtype == torch.bfloat16 and device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError(
                "SOLVER.AMP.DTYPE is 'bfloat16', which this GPU does not have: set it to 'float16'"
            )
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return autocast, scaler


def may_skip(scaler: torch.amp.GradScaler) -> bool:
    """Whether gradients that are not finite mean that the scale was too large, not an issue."""
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
        raise UserError(
            f"FLOAT32_PRECISION is {precision!r}; it must be one of {_FLOAT32_PRECISIONS}"
        )
    torch.set_float32_matmul_precision(precision or "highest")
    torch.backends.cudnn.allow_tf32 = precision != "highest"
