"""Which modules fast paths may compute from their parameters, instead of calling them.

A fast path knows what a convolution of `torch.nn` computes. It knows nothing about a subclass, a
wrapper (LoRA, quantization), a parametrization, another ``forward``, or hooks that wait for a call.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torchvision.ops import FrozenBatchNorm2d

from tensormask.layers.norm import LayerNorm2d, LevelNorms, is_local
from tensormask.layers.winograd import Conv2d, conv2d


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


class Kernel(NamedTuple):
    """Weight (C', C, 3, 3) and bias of a convolution of stride 1 and padding 1."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return conv2d(x, *self, padding=(1, 1))


class PlainLayer(NamedTuple):
    """A plain 3x3 convolution of stride 1 and padding 1, and the norm of its result."""

    conv: nn.Conv2d | Kernel
    norm: nn.Module | None = None


def plain_tower(layers: Sequence[nn.Module], level: int = 0) -> list[PlainLayer] | None:
    """Return the convolutions and norms of a plain tower, or None.

    Such a tower has 3x3 convolutions of stride 1 and padding 1, each with a norm or none, and ReLUs
    in between. A ReLU may be last. Norms must be local: a result depends on its location only.

    Args:
        level: of the feature map, for `LevelNorms`.
    """
    tower: list[PlainLayer] = []
    rest = list(layers)
    while rest:
        conv = cast(nn.Conv2d, rest.pop(0))
        shape = (3, 3), (1, 1), (1, 1)
        if not is_plain_conv(conv) or (conv.kernel_size, conv.stride, conv.padding) != shape:
            return None
        norm = None if not rest or type(rest[0]) is nn.ReLU else rest.pop(0)
        if norm is not None:
            norm = _plain_norm(norm, level)
            if norm is None:
                return None
        if rest and not is_plain(rest.pop(0), nn.ReLU):
            return None
        tower.append(PlainLayer(conv, norm))
    return tower


def _plain_norm(norm: nn.Module, level: int) -> nn.Module | None:
    """Return the norm of a level if it is plain and local."""
    if isinstance(norm, LevelNorms) and is_plain(norm, LevelNorms):
        norm = norm[level]
    plain = is_plain(norm, LayerNorm2d, nn.BatchNorm2d, FrozenBatchNorm2d)
    return norm if plain and is_local(norm) else None
