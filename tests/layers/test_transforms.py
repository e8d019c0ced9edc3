"""Every differentiable operator under every transform of PyTorch, compiled and in plain PyTorch.

An operator is compared with the same function, as a matrix or a formula.
"""

import functools
import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, func, nn
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tensormask import layers
from tensormask.layers import representation, winograd
from tensormask.layers.norm import LayerNorm2d
from tensormask.layers.window_masks import window_masks
from tensormask.modeling import box_losses, losses, quality_losses

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


def masks_at_windows(x: Tensor) -> Tensor:
    weight, bias = torch.linspace(-1, 1, 9 * 4).view(9, 4), torch.linspace(0, 1, 9)
    return window_masks(x, weight.to(x), bias.to(x), WINDOWS, 1, 2)


def normalized(x: Tensor) -> Tensor:
    centered = x - x.mean(1, keepdim=True)
    return centered / (centered.square().mean(1, keepdim=True) + 1e-5).sqrt()


def as_4d(function: Function) -> Function:
    return lambda x: function(x.unflatten(1, (2, 2)))


# Operators that are affine in x: name, function, shape of x.
BOTH_BACKENDS = {
    "swap_align2nat": (lambda x: layers.SwapAlign2Nat(3, 1.5)(x), LOGITS),
    "swap_align2nat_at": (lambda x: layers.swap_align2nat_at(x, WINDOWS, 2), LOGITS),
    "conv2d": (convolution, IMAGE.shape),
    "conv2d, weight": (convolution_of_weights, WEIGHT.shape),
    "window_masks": (masks_at_windows, LOGITS),
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
NORMS = {
    dtype: LayerNorm2d(4).to(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)
}
QUALITY = torch.zeros(LOGITS).index_put(INDEX, torch.tensor([0.25, 0.5]))
LOSSES = {
    "focal_loss_star": (
        lambda x: losses.focal_loss_star([x, x[:, 1]], [INDEX, tuple(i[:0] for i in INDEX[:3])]),
        lambda x: (
            -((0.7 - 0.4 * TARGET.to(x)) * F.logsigmoid(torch.where(TARGET, x, -x) * 3)).sum() / 3
            - 0.7 * F.logsigmoid(-x[:, 1] * 3).sum() / 3
        ),
        LOGITS,
    ),
    "quality_focal_loss": (
        lambda x: quality_losses.quality_focal_loss([x], [INDEX], [torch.tensor([0.25, 0.5])]),
        lambda x: (
            (x.sigmoid() - QUALITY.to(x)).square()
            * F.binary_cross_entropy_with_logits(x, QUALITY.to(x), reduction="none")
        ).sum(),
        LOGITS,
    ),
    "layer_norm": (lambda x: NORMS[x.dtype](x), normalized, LOGITS),
    "box_loss": (
        lambda x: box_losses.box_loss(x, torch.ones(2, 4).to(x)),
        lambda x: (x - 1).abs().sum(),
        (2, 4),
    ),
    "dice_loss": (
        lambda x: losses.dice_loss(x, MASKS),
        lambda x: sum(
            1 - (2 * m[MASKS[0]].sum() + 1) / (m.sum() + MASKS[0].sum() + 1) for m in x.sigmoid()
        ),
        (2, 2, 2),
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
        (y,) = torch.autograd.grad(
            scalar(f)(x) if y is x else y.sin().sum(), x, create_graph=times > 1
        )
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


SLOW = ("linearize", "jvp of jvp", "functional.hessian")


@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(transform, id=name, marks=[pytest.mark.slow] * (name in SLOW))
        for name, transform in TRANSFORMS.items()
    ],
)
def test_table(operator, transform: Callable[[Function, Tensor], Tensor]) -> None:
    function, formula, x = operator
    assert_close(transform(function, x), transform(formula, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["backward", "grad", "vmap of jvp"])
@pytest.mark.slow
def test_compile(operator, name: str) -> None:
    """In one graph: forward and backward, and transforms inside of the graph."""
    function, formula, x = operator
    transform = TRANSFORMS[name]
    torch._dynamo.reset()
    compile_ = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    if transform is backward:
        actual = backward(compile_(function), x)
    else:
        actual = compile_(lambda x: transform(function, x))(x)
    assert_close(actual, transform(formula, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", BOTH_BACKENDS | ONE_BACKEND)
@pytest.mark.slow
def test_export(name: str, backend: str) -> None:
    """With any size of the feature maps, or any number of boxes."""
    function, _, x = case(name)
    if name == "conv2d, weight":
        pytest.skip("its input is a weight")
    dims = (2, 3) if x.dim() == 4 else (0,)
    sizes = [[size + more * (d in dims) for d, size in enumerate(x.shape)] for more in (3, 8)]
    large, larger = (torch.randn(size, dtype=x.dtype) for size in sizes)
    module = nn.Module()
    module.forward = function
    with layers.op_backend(backend):
        dynamic = (dict.fromkeys(dims, torch.export.Dim.DYNAMIC),)
        program = torch.export.export(module, (large,), dynamic_shapes=dynamic).module()
        assert_close(program(larger), function(larger))


@pytest.mark.parametrize("backend", ["native", "reference", "representation"])
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (2, -1)])
def test_vmap_over_windows(in_dims, backend: str) -> None:
    """Batches of feature maps, of windows, or of both, and their gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 4, 3, 4, dtype=torch.float64, generator=generator)
    windows = torch.randint(2, (3, 5, 3), generator=generator)

    def masks(x: Tensor, windows: Tensor) -> Tensor:
        if backend == "representation":
            return layers.up_align2nat_at(x, windows, 2)
        return layers.swap_align2nat_at(x, windows, 2)

    def gradient(x: Tensor, windows: Tensor) -> Tensor:
        return func.grad(lambda x: masks(x, windows).square().sum())(x)

    pairs = zip(
        [x[0]] * 3 if in_dims[0] is None else x,
        [windows[0]] * 3 if in_dims[1] is None else windows,
        strict=True,
    )
    arguments = [
        tensor[0] if dim is None else tensor.movedim(0, dim)
        for tensor, dim in zip((x, windows), in_dims, strict=True)
    ]
    with layers.op_backend("auto" if backend == "representation" else backend):
        pairs = list(pairs)
        for function in (masks, gradient):
            expected = torch.stack([function(*pair) for pair in pairs])
            assert_close(func.vmap(function, in_dims)(*arguments), expected)
        with pytest.raises(ValueError, match=r"window .* is outside of the grid"):
            func.vmap(masks, (None, 0))(x[0], windows + 2)


class Dtypes(TorchDispatchMode):
    """Collect the dtypes of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.found |= {t.dtype for t in pytree.tree_leaves(result) if isinstance(t, Tensor)}
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_float64_tensors(operator, dtype: torch.dtype) -> None:
    """MPS has none. Forward and backward."""
    function, _, x = operator
    x = x.to(dtype).requires_grad_()
    with Dtypes() as dtypes:
        y = function(x)
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.float64 not in dtypes.found
    assert dtype in dtypes.found


def test_masks_without_gradients() -> None:
    """Results that are bool have no gradient, and no transform gives a wrong one."""
    masks, box = torch.rand(1, 4, 4, requires_grad=True), torch.tensor([[0.0, 0, 8, 8]])
    pasted = layers.paste_masks(masks, box.requires_grad_(), (8, 8))
    cropped = layers.crop_masks(masks.detach() > 0.5, torch.tensor([0]), box, 4)
    assert not pasted.requires_grad
    assert not cropped.requires_grad
    with pytest.raises(RuntimeError, match="vmap"):
        func.vmap(lambda masks: layers.paste_masks(masks, box, (8, 8)))(masks[None])
