"""Every differentiable operator under every transform of PyTorch, compiled and in plain PyTorch.

An operator is compared with the same function, as a matrix or a formula.
"""

import functools
import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, func
from torch.autograd import forward_ad
from torch.testing import assert_close

from tensormask import layers
from tensormask.layers import representation, winograd
from tensormask.modeling import losses

Function = Callable[[Tensor], Tensor]

WINDOWS = torch.tensor([[0, 0, 1], [0, 1, 1], [0, 1, 1]])
LOGITS = (1, 4, 3, 4)  # masks of 2x2 pixels
WEIGHT, IMAGE, BIAS = (
    torch.randn(s, generator=torch.Generator().manual_seed(3))
    for s in ((3, 2, 3, 3), (1, 2, 4, 5), (3,))
)
INDEX = (torch.tensor([0, 0]), torch.tensor([3, 1]), torch.tensor([0, 2]), torch.tensor([1, 3]))
MASKS = torch.tensor([[[True, False], [True, True]]]).expand(2, 2, 2)


def convolution(x: Tensor) -> Tensor:
    return winograd.conv2d(x, WEIGHT.to(x), BIAS.to(x), padding=(1, 1))


def convolution_of_weights(weight: Tensor) -> Tensor:
    return winograd.conv2d(IMAGE.to(weight), weight, padding=(0, 0))


def as_4d(function: Function) -> Function:
    return lambda x: function(x.unflatten(1, (2, 2)))


# Operators that are affine in x: name, function, shape of x.
BOTH_BACKENDS = {
    "swap_align2nat": (lambda x: layers.swap_align2nat(x, 2), LOGITS),
    "swap_align2nat_at": (lambda x: layers.swap_align2nat_at(x, WINDOWS, 2), LOGITS),
    "SwapAlign2Nat": (layers.SwapAlign2Nat(3, 1.5), LOGITS),
    "conv2d": (convolution, IMAGE.shape),
    "conv2d, weight": (convolution_of_weights, WEIGHT.shape),
}
ONE_BACKEND = {
    "align2nat": (as_4d(lambda x: layers.align2nat(x, 0.5)), LOGITS),
    "nat2align": (as_4d(layers.nat2align), LOGITS),
    "up_bilinear": (as_4d(lambda x: layers.up_bilinear(x, 1.5)), LOGITS),
    "up_nearest": (as_4d(lambda x: layers.up_nearest(x, 2)), LOGITS),
    "up_align2nat": (as_4d(lambda x: layers.up_align2nat(x, 2)), LOGITS),
    "up_align2nat_at": (lambda x: layers.up_align2nat_at(x, WINDOWS, 2), LOGITS),
    "subsample": (as_4d(lambda x: layers.subsample(x, 2)), LOGITS),
    "composition": (as_4d(lambda x: representation.swap_align2nat(x, 2)), LOGITS),
    "mask_boxes": (lambda x: layers.mask_boxes(torch.eye(2)[None] - 0.5, x), (1, 4)),
}
# Others: name, function, the formula, shape of x.
TARGET = torch.zeros(LOGITS, dtype=torch.bool).index_put(INDEX, torch.tensor(True))
LOSSES = {
    "focal_loss_star": (
        lambda x: losses.focal_loss_star([x, x[:, 1]], [INDEX, tuple(i[:0] for i in INDEX[:3])]),
        lambda x: (
            -((0.7 - 0.4 * TARGET.to(x)) * F.logsigmoid(torch.where(TARGET, x, -x) * 3)).sum() / 3
            - 0.7 * F.logsigmoid(-x[:, 1] * 3).sum() / 3
        ),
        LOGITS,
    ),
    "box_loss": (
        lambda x: losses.box_loss(x, torch.ones(2, 4).to(x)),
        lambda x: (x - 1).abs().sum(),
        (2, 4),
    ),
    "mask_loss": (
        lambda x: losses.mask_loss(x, MASKS),
        lambda x: -(1.5 * MASKS * F.logsigmoid(x) + ~MASKS * F.logsigmoid(-x)).sum() / 4,
        (2, 2, 2),
    ),
}
CASES = [
    *((name, backend) for name in BOTH_BACKENDS for backend in ("native", "reference")),
    *((name, "auto") for name in (*ONE_BACKEND, *LOSSES)),
]


@functools.cache
def case(name: str) -> tuple[Function, Function, Tensor]:
    """Return an operator, the function that it is, and an input, float64."""
    shape = (LOSSES.get(name) or (BOTH_BACKENDS | ONE_BACKEND)[name])[-1]
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if name in LOSSES:
        return *LOSSES[name][:2], x
    operator = (BOTH_BACKENDS | ONE_BACKEND)[name][0]
    with layers.op_backend("reference"), torch.no_grad():
        zero = operator(torch.zeros_like(x))
        ones = torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
        matrix = torch.stack([(operator(one) - zero).flatten() for one in ones], dim=1)
    return operator, lambda x: (matrix @ x.flatten()).view(zero.shape) + zero, x


@pytest.fixture(autouse=True)
def winograd_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_MIN_LOCATIONS", "_MIN_CHANNELS", "_MIN_LARGER_CHANNELS"):
        monkeypatch.setattr(winograd, name, 1)


@pytest.fixture(params=CASES, ids=", ".join)
def operator(request):
    name, backend = request.param
    if backend == "native" and "TENSORMASK_WITHOUT_EXT" in os.environ:
        pytest.skip("TENSORMASK_WITHOUT_EXT: nothing is compiled")
    with layers.op_backend(backend):
        yield case(name)


def scalar(f: Function) -> Function:
    """A function of ``f`` with first and second derivatives that depend on x."""
    return lambda x: f(x).square().sum() / 2 + f(x).sin().sum()


def batch(x: Tensor, dim: int) -> Tensor:
    return torch.stack([x, 0.5 - x], dim)


def dual(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


def backward(f: Function, x: Tensor, times: int = 1) -> Tensor:
    y = x = x.detach().requires_grad_()
    for _ in range(times):
        (y,) = torch.autograd.grad(scalar(f)(x) if y is x else y.sin().sum(), x, create_graph=True)
    return y.detach()


def batched_gradients(f: Function, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    y = f(x)
    grads = torch.stack([torch.ones_like(y), y.detach().cos()])
    return torch.autograd.grad(y, x, grads, is_grads_batched=True)[0]


TRANSFORMS = {
    "grad": lambda f, x: func.grad(scalar(f))(x),
    "vjp": lambda f, x: (lambda y, pull: pull(y.cos())[0])(*func.vjp(f, x)),
    "jvp": lambda f, x: func.jvp(f, (x,), (x.cos(),))[1],
    "linearize": lambda f, x: func.linearize(f, x)[1](x.cos()),
    "jacrev": lambda f, x: func.jacrev(f)(x),
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "hessian": lambda f, x: func.hessian(scalar(f))(x),
    "jacrev of jacrev": lambda f, x: func.jacrev(func.jacrev(scalar(f)))(x),
    "jvp of jvp": lambda f, x: dual_of_dual(scalar(f), x),
    "vmap": lambda f, x: func.vmap(f)(batch(x, 0)),
    "vmap, dims 1 and -1": lambda f, x: (
        func.vmap(f, 1)(batch(x, 1)) + func.vmap(f, -1)(batch(x, -1))
    ),
    "vmap of vmap": lambda f, x: func.vmap(func.vmap(f, 1))(batch(batch(x, 1), 0)),
    "vmap of grad": lambda f, x: func.vmap(func.grad(scalar(f)), 1)(batch(x, 1)),
    "vmap of jvp": lambda f, x: func.vmap(lambda x: func.jvp(f, (x,), (x.cos(),))[1])(batch(x, 0)),
    "grad of vmap": lambda f, x: func.grad(lambda x: func.vmap(scalar(f))(batch(x, 0)).sum())(x),
    "dual numbers": dual,
    "dual numbers of grad": lambda f, x: dual(func.grad(scalar(f)), x),
    "backward": backward,
    "double backward": functools.partial(backward, times=2),
    "triple backward": functools.partial(backward, times=3),
    "forward over backward": lambda f, x: dual(
        lambda x: torch.autograd.grad(scalar(f)(x), x)[0], x.detach().requires_grad_()
    ),
    "batched gradients": batched_gradients,
    "functional.hessian": lambda f, x: torch.autograd.functional.hessian(
        scalar(f), x, vectorize=True
    ),
}


def dual_of_dual(f: Function, x: Tensor) -> Tensor:
    return func.jvp(lambda x: func.jvp(f, (x,), (x.sin(),))[1], (x,), (x.cos(),))[1]


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_table(operator, transform: Callable[[Function, Tensor], Tensor]) -> None:
    function, formula, x = operator
    assert_close(transform(function, x), transform(formula, x), rtol=1e-9, atol=1e-9)
