"""Small constant tensors, copied to a GPU once: the host waits for every such copy."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tensormask.layers._transforms import is_traced

Numbers = Sequence["float | Numbers"]


def constant(values: Numbers, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``torch.tensor(values)``; on a GPU a shared one, which must not be changed.

    Example:
        >>> constant((1, 2), torch.float32, torch.device("cpu"))
        tensor([1., 2.])
    """
    transformed = torch._C._are_functorch_transforms_active()
    if device.type == "cpu" or transformed or is_traced() or torch.jit.is_tracing():
        return torch.tensor(values, dtype=dtype, device=device)
    return _on_gpu(_hashable(values), dtype, device)


def _hashable(values: Any) -> Any:
    return values if isinstance(values, int | float) else tuple(map(_hashable, values))


@functools.cache  # for good: a CUDA graph may read them
def _on_gpu(values: Numbers, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # training may use it as well
        return torch.tensor(values, dtype=dtype, device=device)
