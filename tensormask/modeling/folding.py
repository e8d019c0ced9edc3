"""Frozen batch norms, folded into the convolutions before them.

On a GPU, what does not change is computed once: scale and bias of a norm, and their product with
the weight of a convolution that is not being trained. A change of a tensor is recognized by
PyTorch's version counter and by its storage, so that `load_state_dict`, averaging, `nn.Module.to`,
optimizers and every other change in place take effect in the next call. Only writes through
``tensor.data``, which PyTorch does not count either, are not seen.

The results are not part of the modules: they are in no copy, file or state dict.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tensormask.layers._transforms import is_traced, is_transformed

# On a CPU, folding takes 2 % of the time of inference, and the products would need memory.
_CACHED_ON: tuple[str, ...] = ("cuda",)


class _Entry(NamedTuple):
    key: tuple[Any, ...]
    # Keep the addresses of the storages in the key from being used again.
    storages: list[StorageWeakRef]
    results: tuple[Tensor, ...]


# An entry is replaced as a whole: threads may read and write at the same time.
_Cache = WeakKeyDictionary[nn.Module, _Entry]
_of_norms: _Cache = WeakKeyDictionary()
_of_convs: _Cache = WeakKeyDictionary()


def fold(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the convolution that computes ``norm(conv(x))``.

    Args:
        conv: a plain `nn.Conv2d` without bias.
        norm: a plain `torchvision.ops.FrozenBatchNorm2d`.

    On a GPU within `torch.autocast`, they have its dtype where that saves a conversion.
    """
    sources = norm.weight, norm.bias, norm.running_mean, norm.running_var
    device = conv.weight.device
    if device.type not in _CACHED_ON or not _can_cache(conv.weight, *sources):
        scale, bias = _scale_and_bias(norm)
        return _scaled(conv.weight, scale), bias
    dtype, trained = None, torch.is_grad_enabled() and conv.weight.requires_grad
    if torch.is_autocast_enabled(device.type) and conv.weight.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    # Another stream would have to wait for the results.
    options = dtype, torch.cuda.is_initialized() and torch.cuda.current_stream(device)

    def scale_and_bias() -> tuple[Tensor, Tensor]:
        scale, bias = _scale_and_bias(norm)
        return scale, bias.to(dtype or bias.dtype)

    scale, bias = _cached(_of_norms, norm, (*options, norm.eps), sources, scale_and_bias)
    if trained:
        _of_convs.pop(conv, None)
        return _scaled(conv.weight, scale), bias

    def product() -> tuple[Tensor]:
        weight = _scaled(conv.weight, scale)
        return (weight.to(dtype or weight.dtype),)

    return _cached(_of_convs, conv, options, (conv.weight, scale), product)[0], bias


def _scale_and_bias(norm: Any) -> tuple[Tensor, Tensor]:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    return weight * scale[:, None, None, None]


def _can_cache(weight: Tensor, *statistics: Tensor) -> bool:
    """Return whether every change of the tensors shows, and nothing but autograd records."""
    tensors = weight, *statistics
    return (
        not (is_traced() or torch.jit.is_tracing())
        and not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
        and not is_transformed(*tensors)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in statistics))
        and all(
            type(x) in (Tensor, nn.Parameter)
            and not x.is_inference()  # has no version counter
            # Else another tensor, with a counter of its own, may share the memory.
            and x.untyped_storage().nbytes() == x.numel() * x.element_size()
            and not torch._C._functorch.is_legacy_batchedtensor(x)
            for x in tensors
        )
    )


def _cached(
    cache: _Cache,
    module: nn.Module,
    options: tuple[Any, ...],
    sources: Sequence[Tensor],
    compute: Callable[[], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """Return ``compute()``, or what it returned for the module with the same sources."""
    storages = [x.untyped_storage() for x in sources]
    # Read before anything is computed: what changes meanwhile is computed again in the next call.
    states = [
        (storage._cdata, x.data_ptr(), x._version, x.dtype, x.stride())
        for x, storage in zip(sources, storages, strict=True)
    ]
    key = *options, *states
    entry = cache.get(module)
    if entry is None or entry.key != key:
        with torch.inference_mode(False), torch.no_grad():  # training may use them as well
            entry = _Entry(key, list(map(StorageWeakRef, storages)), compute())
        cache[module] = entry
    return entry.results
