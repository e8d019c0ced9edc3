"""Precision of training: autocast to half precision, loss scaling, and TF32."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch

from tensormask.config import CfgNode
from tensormask.modeling.build import autocast_dtype
from tensormask.utils.errors import UserError

_FLOAT32_PRECISIONS = ("", "highest", "high", "medium")
# At this loss scale, scaling is not the reason for a gradient that is not finite.
_MIN_SCALE = 1.0

Autocast = Callable[[], AbstractContextManager]


def build_autocast(cfg: CfgNode, device: torch.device) -> tuple[Autocast, torch.amp.GradScaler]:
    """Build the autocast context for forward pass and losses, and the loss scaler (`SOLVER.AMP`).

    The scaler is enabled for float16 only, since bfloat16 has float32's range. A disabled scaler
    changes nothing.

    Raises:
        UserError: an unknown `SOLVER.AMP.DTYPE`, or one that the GPU does not support.
    """
    dtype = autocast_dtype("SOLVER.AMP", cfg.SOLVER.AMP)
    if dtype == torch.bfloat16 and device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError(
                "SOLVER.AMP.DTYPE 'bfloat16' is not supported by this GPU: set it to 'float16'"
            )
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return autocast, scaler


def may_skip(scaler: torch.amp.GradScaler) -> bool:
    """Return whether a gradient that is not finite means that the loss scale is too large."""
    return scaler.is_enabled() and scaler.get_scale() > _MIN_SCALE


def set_float32_precision(precision: str) -> None:
    """Set the precision of float32 matrix products and convolutions on a GPU (`FLOAT32_PRECISION`).

    "highest" is float32; "high" allows TF32, which has 10 bits of mantissa, in matrix products and
    convolutions; "medium" allows less. "" is PyTorch's default: TF32 in convolutions only.

    Raises:
        UserError: another value.
    """
    if precision not in _FLOAT32_PRECISIONS:
        raise UserError(f"FLOAT32_PRECISION is {precision!r}; give one of {_FLOAT32_PRECISIONS}")
    torch.set_float32_matmul_precision(precision or "highest")
    torch.backends.cudnn.allow_tf32 = precision != "highest"
