"""Detection of NaN and infinity in losses, gradients and weights, and of their origin.

Losses and the gradient norm are always checked, as they are read in every iteration. With
`SOLVER.DETECT_ANOMALY`, every tensor between modules is checked, to find the module of origin.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from os import PathLike
from typing import Any

from torch import Tensor, nn

from tensormask.utils.errors import UserError


class NonFiniteError(FloatingPointError):
    """A number is NaN or infinite; the weights are still those before the iteration."""


def check_losses(losses: Mapping[str, float], iteration: int, batch: list[dict]) -> None:
    """Raise NonFiniteError if a loss is NaN or infinite."""
    if all(math.isfinite(value) for value in losses.values()):
        return
    raise NonFiniteError(
        f"Loss is not finite at iteration {iteration}: "
        + ", ".join(f"{name} {value:g}" for name, value in losses.items())
        + _advice(batch)
    )


def gradients_error(model: nn.Module, iteration: int, batch: list[dict]) -> NonFiniteError:
    """Make the error for a gradient norm that is not finite."""
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    where = _not_finite(gradients) or "no single parameter, but in the norm of all"
    return NonFiniteError(
        f"Gradient is not finite at iteration {iteration}, for {where}" + _advice(batch)
    )


def _advice(batch: list[dict]) -> str:
    return (
        f". The batch: {', '.join(sample.get('file_name', '?') for sample in batch)}. "
        "SOLVER.DETECT_ANOMALY True finds the module of origin. "
        "Decrease SOLVER.BASE_LR, increase SOLVER.WARMUP_ITERS or clip the gradients "
        "(SOLVER.CLIP_GRADIENTS.ENABLED True)"
    )


def check_weights(model: nn.Module, where: str | PathLike[str]) -> None:
    """Raise UserError if a weight is NaN or infinite; `where` names the file in the message."""
    if names := _not_finite(model.state_dict()):
        raise UserError(f"Not finite in {where}: {names}; use other weights")


def _not_finite(tensors: Mapping[str, Tensor]) -> str:
    names = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def watch_modules(model: nn.Module) -> None:
    """Add hooks to a model that raise NonFiniteError at the first number that is not finite.

    They check, in this order, images, weights, the outputs of modules, and in the backward pass the
    gradients of these outputs. The error names the image, weight or module.
    """
    model.register_forward_pre_hook(_check_inputs, with_kwargs=True)
    for name, module in model.named_modules():
        module.register_forward_hook(partial(_check_output, name or "the model itself"))


def _check_inputs(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    for index, image in enumerate(args[0] if args else kwargs["images"]):
        if image.is_floating_point() and not image.isfinite().all():
            raise NonFiniteError(f"Image {index} of the batch is not finite")
    for name, value in model.named_parameters():
        if not value.isfinite().all():
            raise NonFiniteError(f"The weight {name} is not finite before the iteration")


def _check_output(name: str, module: nn.Module, args: tuple, output: Any) -> None:
    for tensor in _floating(output):
        if not tensor.isfinite().all():
            raise NonFiniteError(
                f"The output of {name} ({type(module).__name__}, {_count(tensor)}) is the first "
                "that is not finite"
            )
        if tensor.requires_grad:
            tensor.register_hook(partial(_check_gradient, name))


def _check_gradient(name: str, gradient: Tensor) -> None:
    if not gradient.isfinite().all():
        raise NonFiniteError(
            f"The gradient of the output of {name} ({_count(gradient)}) is the first that is not "
            "finite: its origin is in the modules after this one"
        )


def _count(tensor: Tensor) -> str:
    bad = int(tensor.numel() - tensor.isfinite().sum())
    return f"{bad} of {tensor.numel()} numbers of shape {tuple(tensor.shape)}, {tensor.dtype}"


def _floating(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        yield from _floating(list(value.values()))
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for item in value:
            yield from _floating(item)
