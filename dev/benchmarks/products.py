"""The convolutions and matrix products of a model and nothing else: the floor of its time."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tensormask.layers import op_backend

_aten = torch.ops.aten
_POSITION = {_aten.convolution: 0, _aten.addmm: 1, _aten.mm: 0}  # of the activation


class Product(NamedTuple):
    """One convolution or matrix product, without its activation."""

    call: Callable[[Tensor], Tensor]  # with memory in place of the activation's
    dtype: torch.dtype
    extent: int  # elements from the first to the last of the activation
    flops: int  # two per multiplication with addition


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if (packet := function.overloadpacket) in _POSITION:
            i = _POSITION[packet]
            before, after, size, stride = args[:i], args[i + 1 :], args[i].shape, args[i].stride()

            def call(memory: Tensor) -> Tensor:
                return function(*before, memory.as_strided(size, stride), *after, **kwargs)

            extent = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
            flops = flop_registry[packet](*args, **kwargs, out_val=result)
            self.products.append(Product(call, args[i].dtype, extent, flops))
        return result


def record_products(call: Callable[[], object]) -> list[Product]:
    """Return the products that a call computes, in order, with PyTorch's own convolutions."""
    with torch.no_grad(), op_backend("reference"), _Recorder() as recorder:
        call()
    return recorder.products


def replay(products: list[Product], device: str) -> Callable[[], None]:
    """Return a function that computes recorded products, all from one random buffer per dtype."""
    buffers = {
        dtype: torch.randn(max(p.extent for p in products if p.dtype == dtype), device=device)
        for dtype in {p.dtype for p in products}
    }
    buffers = {dtype: buffer.to(dtype) for dtype, buffer in buffers.items()}

    @torch.inference_mode()
    def run() -> None:
        for product in products:
            product.call(buffers[product.dtype])

    return run
