"""Whether more than reverse-mode autograd follows a call, which not every fast path supports."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def is_transformed(*inputs: Tensor) -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation follows the call."""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():  # cannot trace the next lines
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in inputs)


def is_traced() -> bool:
    """Whether a graph is being made, by `torch.compile`, `torch.export` or make_fx."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY))


def is_eager(*inputs: Tensor) -> bool:
    """Whether the inputs hold values, and nothing but reverse-mode autograd records the call."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not is_transformed(*inputs)
        and torch._C._len_torch_dispatch_stack() == 0  # make_fx, FakeTensorMode, ...
        and all(type(x) in (Tensor, nn.Parameter) for x in inputs)  # not fx.Proxy, FakeTensor, ...
        and not any(map(torch._C._functorch.is_legacy_batchedtensor, inputs))  # is_grads_batched
    )


def is_wrapped(x: Tensor) -> bool:
    """Whether a tensor is an argument of a function that `torch.func` transforms."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def any_true(x: Tensor) -> bool:
    """Return whether any value is True, in any element of a batch of `torch.func.vmap`."""
    while is_wrapped(x):
        x = torch._C._functorch.get_unwrapped(x)
    return bool(x.any())


def differentiate(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> tuple[Any, ...]:
    """Return the gradients of inputs that need them, to be differentiated again.

    It is for the backward pass of a `torch.autograd.Function`: ``function`` computes its forward
    pass in operations that have all derivatives, and ``grad`` is the gradient of the result.
    """
    with torch.enable_grad():
        y = function(*inputs)
    needed = [each for each in inputs if each.requires_grad]
    grads = iter(torch.autograd.grad(y, needed, grad, create_graph=True))
    return tuple(next(grads) if each.requires_grad else None for each in inputs)
