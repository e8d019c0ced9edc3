"""A model's convolutions and fully connected layers run alone: the floor of what it can take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tensormask.layers import op_backend

_aten = torch.ops.aten
# The position of the argument that is an activation; what else they take are weights.
_PRODUCTS = {_aten.convolution: 0, _aten.addmm: 1, _aten.mm: 0}


class Product(NamedTuple):
    """One call of a convolution or a product of matrices."""

    function: Any
    args: tuple  # of the call; None where the activation was
    kwargs: dict[str, Any]
    position: int  # of the activation
    size: tuple[int, ...]  # of the activation, and its stride and dtype
    stride: tuple[int, ...]
    dtype: torch.dtype
    flops: int  # two per multiplication with addition


def record_products(call: Callable[[], object]) -> list[Product]:
    """The convolutions and products of matrices that a call makes, in order.

    `call` is run without gradients and with PyTorch's own convolutions. Weights are kept as they
    are, of activations the shapes.
    """
    with torch.no_grad(), op_backend("reference"), _Recorder() as recorder:
        call()
    return recorder.products


def replay(products: list[Product], device: str | torch.device) -> Callable[[], None]:
    """A function that runs recorded products on random numbers that are there already.

    All read one buffer, which is as large as the largest activation.
    """
    buffers: dict[torch.dtype, Tensor] = {}
    for dtype in {product.dtype for product in products}:
        length = max(_extent(p) for p in products if p.dtype == dtype)
        buffers[dtype] = torch.randn(length, device=device).to(dtype)
    calls = []
    for product in products:
        args = list(product.args)
        args[product.position] = buffers[product.dtype].as_strided(product.size, product.stride)
        calls.append((product.function, args, product.kwargs))

    @torch.inference_mode()
    def run() -> None:
        for function, args, kwargs in calls:
            function(*args, **kwargs)

    return run


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        packet = function.overloadpacket
        if packet in _PRODUCTS:
            position = _PRODUCTS[packet]
            x = args[position]
            others = (*args[:position], None, *args[position + 1 :])
            flops = flop_registry[packet](*args, **kwargs, out_val=result)
            self.products.append(
                Product(
                    function, others, kwargs, position, tuple(x.shape), x.stride(), x.dtype, flops
                )
            )
        return result


def _extent(product: Product) -> int:
    """Elements of memory from the first to the last of the activation."""
    return 1 + sum((n - 1) * s for n, s in zip(product.size, product.stride, strict=True))
