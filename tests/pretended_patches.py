"""What a pretended GPU changes in PyTorch beside its modes, see `pretended_cuda.py`."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._tensor
import torch.functional
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from tensormask.layers import _constants, _native

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class _Autocast(torch.autocast):
    """The CPU's autocast instead of CUDA's."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda device="cpu": function("cpu" if device == "cuda" else device)


def patches(storages: Any, functions: Any) -> Iterator[tuple[Any, str, Any]]:
    """Yield (module or class, name, new value) of what does not go through the modes."""
    constants = {"is_available": True, "device_count": 1, "current_device": 0, "synchronize": None}
    constants |= {"is_bf16_supported": True, "get_device_capability": (9, 0)}
    for name, value in constants.items():
        yield torch.cuda, name, lambda *args, value=value, **options: value
    yield torch, "autocast", _Autocast
    yield torch.amp, "autocast", _Autocast
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        yield torch, name, _on_cpu(getattr(torch, name))
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        if hasattr(torch.optim.Optimizer, name):
            yield torch.optim.Optimizer, name, lambda *args: None
    # Functions in Python would hide from a mode what they call.
    for module in (torch.nn.functional, torch.functional, torch._tensor):
        for name in vars(module):
            if name.startswith("has_torch_function"):
                yield module, name, lambda *args: False
    if _native.LIBRARY:
        yield _native, "DEVICES", _native.DEVICES | {"cuda"}
    # Constants of an earlier block are not on this block's GPU.
    yield _constants, "_on_gpu", functools.lru_cache(maxsize=64)(_constants._on_gpu.__wrapped__)
    # The modes here are no reason for slower paths, see `layers._transforms.is_eager`.
    yield torch._C, "_len_torch_dispatch_stack", lambda: 0
    # The engine of autograd removes the mode that answers for devices.
    apply = BackwardCFunction.apply

    def apply_with_mode(self: Any, *grads: Any) -> Any:
        with functions:
            return apply(self, *grads)

    yield BackwardCFunction, "apply", apply_with_mode

    class Recomputation(torch.utils.checkpoint._recomputation_hook):
        def __enter__(self) -> Any:
            functions.__enter__()
            return super().__enter__()

        def __exit__(self, *error: Any) -> Any:
            functions.__exit__(*error)
            return super().__exit__(*error)

    yield torch.utils.checkpoint, "_recomputation_hook", Recomputation
    deepcopy = Tensor.__deepcopy__  # of a storage, which is no operation

    def copied(x: Tensor, memo: dict[int, Any]) -> Tensor:
        return storages.add(deepcopy(x, memo)) if storages.on_cuda(x) else deepcopy(x, memo)

    yield Tensor, "__deepcopy__", copied
    group = torch._C._group_tensors_by_device_and_dtype

    def group_tensors(lists: Any, with_indices: bool = False) -> Any:
        device = CUDA if storages.any_on_cuda(lists) else CPU
        groups = group(lists, with_indices)
        return {(device, dtype): value for (_, dtype), value in groups.items()}

    yield torch._C, "_group_tensors_by_device_and_dtype", group_tensors
