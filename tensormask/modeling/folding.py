"""Frozen batch norms, folded into the convolutions before them.

On a GPU, what does not change is computed once: scale and bias of a norm, and their product with
the weight of a convolution that is not being trained. A change of a tensor is recognized by
PyTorch's version counter and by its storage, so that `load_state_dict`, averaging, `nn.Module.to`,
optimizers and every other change in place take effect in the next call. Only writes through
``tensor.data``, which PyTorch does not count either, are not seen.

The results are not part of the modules: they are in no copy, file or state dict.
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef

from tensormask.layers._transforms import is_traced

# On a CPU, folding takes 2 % of the time of inference, and the products would need memory.
_CACHED_ON: tuple[str, ...] = ("cuda",)


class _Entry(NamedTuple):
    key: tuple[Any, ...]
    # Keep the addresses of the storages in the key from being used again.
    storages: list[StorageWeakRef]
    results: tuple[Tensor, Tensor]


# By convolution. An entry is replaced as a whole: threads may read and write at the same time.
_entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()


def fold(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the convolution that computes ``norm(conv(x))``.

    Args:
        conv: a plain `nn.Conv2d` without bias.
        norm: a plain `torchvision.ops.FrozenBatchNorm2d`.

    On a GPU within `torch.autocast`, they have its dtype where that saves a conversion.
    """
    weight, grad = conv.weight, torch.is_grad_enabled()
    trained = grad and weight.requires_grad
    # Not by their names, whose lookup takes half of the time until a kept result is returned.
    statistics = [*norm._buffers.values(), *norm._parameters.values()]
    sources = statistics if trained else [*statistics, weight]
    device = weight.device
    if (
        device.type not in _CACHED_ON
        or _is_recorded()
        or any(x.is_inference() for x in sources)  # such tensors have no version counter
        or (grad and any(x.requires_grad for x in statistics))
    ):
        return _folded(norm, weight)
    dtype = None
    if torch.is_autocast_enabled(device.type) and weight.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    # Another stream would have to wait for the results.
    stream = torch.cuda.is_initialized() and torch.cuda.current_stream(device)
    # Read before anything is computed: what changes meanwhile is computed again in the next call.
    states = [(x.untyped_storage()._cdata, x._version, x.stride()) for x in sources]
    key = dtype, stream, norm.eps, *states
    entry = _entries.get(conv)
    if entry is None or entry.key != key:
        if not all(map(_shows_changes, sources)):
            return _folded(norm, weight)
        storages = [StorageWeakRef(x.untyped_storage()) for x in sources]
        with torch.inference_mode(False), torch.no_grad():  # training may use them as well
            factor, bias = _scale_and_bias(norm) if trained else _folded(norm, weight)
            if dtype is not None:
                factor, bias = factor if trained else factor.to(dtype), bias.to(dtype)
        _entries[conv] = entry = _Entry(key, storages, (factor, bias))
    factor, bias = entry.results
    return (_scaled(weight, factor) if trained else factor), bias


def _folded(norm: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    scale, bias = _scale_and_bias(norm)
    return _scaled(weight, scale), bias


def _scale_and_bias(norm: Any) -> tuple[Tensor, Tensor]:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    return weight * scale[:, None, None, None]


def _is_recorded() -> bool:
    """Return whether more than reverse-mode autograd records what is computed."""
    return (
        is_traced()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def _shows_changes(x: Tensor) -> bool:
    """Return whether every change of a tensor changes its version or its storage."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and not torch._C._functorch.is_legacy_batchedtensor(x)
        # Else another tensor, with a counter of its own, may share the memory.
        and x.untyped_storage().nbytes() == x.numel() * x.element_size()
    )
