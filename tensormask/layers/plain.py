"""Which modules fast paths may compute from their parameters, instead of calling them.

A fast path knows what a convolution of `torch.nn` computes. It knows nothing about a subclass, a
wrapper (LoRA, quantization), a parametrization, another ``forward``, or hooks that wait for a call.
"""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from tensormask.layers.winograd import Conv2d


def is_plain(module: nn.Module | None, *types: type[nn.Module]) -> bool:
    """Return whether a module is of exactly one of the types, and a call does only what they do.

    Example:
        >>> relu = nn.ReLU()
        >>> is_plain(relu, nn.ReLU), is_plain(relu, nn.GELU)
        (True, False)
        >>> hook = relu.register_forward_hook(lambda module, inputs, output: None)
        >>> is_plain(relu, nn.ReLU)
        False
    """
    return (
        module is not None
        and type(module) in types
        and "forward" not in module.__dict__
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or torch_module._has_any_global_hook()
        )
    )


def is_plain_conv(module: nn.Module) -> bool:
    """Return whether `layers.winograd.conv2d` computes the same as a call of the module."""
    if not is_plain(module, nn.Conv2d, Conv2d):
        return False
    conv = cast(nn.Conv2d, module)
    return (
        type(conv.weight) in (Tensor, nn.Parameter)  # not quantized, sharded, ...
        and (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, "zeros")
    )


def plain_tower(layers: Sequence[nn.Module]) -> list[nn.Conv2d] | None:
    """Return the convolutions of plain 3x3 convolutions with ReLUs in between, or None.

    Convolutions have stride 1 and padding 1. A ReLU may be last.
    """
    convs = [cast(nn.Conv2d, layer) for layer in layers[::2]]
    known = all(map(is_plain_conv, convs)) and all(is_plain(x, nn.ReLU) for x in layers[1::2])
    shape = (3, 3), (1, 1), (1, 1)
    if known and all((conv.kernel_size, conv.stride, conv.padding) == shape for conv in convs):
        return convs
    return None
