"""Frozen batch norms in convolutions: computed once, and again after every change of a tensor.

What is kept on a GPU is kept on the CPU here.
"""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.testing import assert_close
from torchvision.ops import FrozenBatchNorm2d

from tensormask.modeling import folding
from tensormask.modeling.backbone import conv_norm

X = torch.randn(2, 3, 8, 9, generator=torch.Generator().manual_seed(0))
FROZEN = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.BACKBONE.FREEZE_AT", 5]


class Layer(nn.Module):
    """A convolution and its norm; `expected` computes them one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 5, 3, bias=False), FrozenBatchNorm2d(5)
        for buffer in self.norm.buffers():
            nn.init.uniform_(buffer, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(self.conv, self.norm, x)

    def expected(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@pytest.fixture(autouse=True)
def count(monkeypatch) -> dict[str, int]:
    """Keep results on the CPU as well; count what is computed."""
    counts = {"_scale_and_bias": 0, "_scaled": 0}

    def counted(name: str, function):
        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    for name in counts:
        monkeypatch.setattr(folding, name, counted(name, getattr(folding, name)))
    monkeypatch.setattr(folding, "_CACHED_ON", ("cpu",))
    return counts


def state(layer: Layer, factor: float) -> dict[str, Tensor]:
    return {name: factor * value for name, value in layer.state_dict().items()}


@torch.no_grad()
def assign_twice(layer: Layer) -> None:
    """The third tensor often has the address of the first, and no version is counted."""
    for _ in range(2):
        layer.conv.weight.data = layer.conv.weight.data * 0.5


@torch.inference_mode()
def in_inference_mode(layer: Layer) -> None:
    layer.conv.weight.mul_(2)
    layer.norm.running_mean.add_(1)


def step(layer: Layer, **options) -> None:
    layer(X).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.01, **options).step()


def share_and_change(layer: Layer) -> None:
    """The weight becomes a view of other memory, as in a flat buffer of all parameters."""
    flat = torch.cat([layer.conv.weight.detach().flatten(), torch.ones(3)])
    layer.conv.weight.data = flat[:-3].view_as(layer.conv.weight)
    assert_close(layer(X), layer.expected(X))
    flat.mul_(3)


CHANGES = {
    "load_state_dict": lambda x: x.load_state_dict(state(x, 1.5)),
    "assigned by load_state_dict": lambda x: x.load_state_dict(state(x, 1.5), assign=True),
    "load_state_dict in inference mode": torch.inference_mode()(
        lambda x: x.load_state_dict(state(x, 1.5))
    ),
    "mul_": lambda x: x.conv.weight.detach().mul_(2),
    "foreach": lambda x: torch._foreach_lerp_(
        [t.detach() for t in x.state_dict().values()], [*state(x, 2.0).values()], 0.5
    ),
    "in inference mode": in_inference_mode,
    "running_var": lambda x: x.norm.running_var.mul_(4),
    "bias": lambda x: x.norm.bias.fill_(3),
    "one value": lambda x: x.norm.weight[2:3].zero_(),
    "eps": lambda x: setattr(x.norm, "eps", 0.5),
    "data assigned twice": assign_twice,
    "new parameter": lambda x: setattr(x.conv, "weight", nn.Parameter(x.conv.weight * 2)),
    "new buffer": lambda x: setattr(x.norm, "bias", x.norm.bias + 1),
    "parameter of the norm": lambda x: setattr(
        x.norm, "weight", nn.Parameter(x.norm.weight * 2, requires_grad=False)
    ),
    "optimizer": step,
    "fused optimizer": lambda x: step(x, fused=True),
    "memory of another tensor": share_and_change,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_change_takes_effect(change: str, mode, count) -> None:
    layer = Layer().eval()
    with mode():
        for _ in range(2):
            assert_close(layer(X), layer.expected(X))
    CHANGES[change](layer)
    count.update(dict.fromkeys(count, 0))
    with mode():
        results = [layer(X) for _ in range(3)]
        assert all(torch.equal(result, results[0]) for result in results)
        assert_close(results[0], layer.expected(X))
        if change != "memory of another tensor":
            assert count["_scale_and_bias"] <= 1
            assert count["_scaled"] <= (3 if mode is torch.enable_grad else 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, count) -> None:
    """Of the model, and of autocast, which comes and goes."""
    layer = Layer()
    with torch.no_grad():
        assert layer(X).dtype == torch.float32
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                scale, bias = folding._scale_and_bias(layer.norm)
                weight = folding._scaled(layer.conv.weight, scale)
                assert torch.equal(layer(X), nn.functional.conv2d(X, weight, bias))
            assert_close(layer(X), layer.expected(X))
        layer.to(dtype)
        assert layer(X.to(dtype)).dtype == dtype


def test_train_mode_differentiates_and_keeps_the_scale(count) -> None:
    layer = Layer()
    with torch.inference_mode():
        layer(X)  # what is kept is no inference tensor
    count.update(dict.fromkeys(count, 0))
    x = X.clone().requires_grad_()
    for _ in range(2):
        wanted = x, layer.conv.weight
        grads = [torch.autograd.grad(f(x).square().sum(), wanted) for f in (layer, layer.expected)]
        assert_close(*grads, rtol=1e-4, atol=1e-4)
    assert count == {"_scale_and_bias": 1, "_scaled": 2}
    layer.requires_grad_(False)
    torch.autograd.grad(layer(x).sum(), x)
    torch.autograd.grad(layer(x).sum(), x)
    assert count == {"_scale_and_bias": 2, "_scaled": 3}


def test_a_norm_with_a_parameter_is_trained() -> None:
    layer = Layer()
    layer.conv.requires_grad_(False)
    layer.norm.weight = nn.Parameter(layer.norm.weight)
    for _ in range(2):
        with torch.no_grad():
            layer(X)
        step(layer)  # would fail without a gradient
        assert_close(layer(X), layer.expected(X))


def test_tensors_without_a_version_counter() -> None:
    with torch.inference_mode():
        layer = Layer()
        for factor in (1.0, 2.0):
            layer.conv.weight.mul_(factor)
            assert_close(layer(X), layer.expected(X))


def test_transforms() -> None:
    """Values of `torch.func` and tangents are not kept, and kept values are not used for them."""
    layer = Layer()
    weight = layer.conv.weight.detach().clone()

    def call(weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"conv.weight": weight}, (X,))

    with torch.no_grad(), forward_ad.dual_level():
        once, twice, none = call(weight), call(2 * weight), call(0 * weight)
        assert_close(
            torch.func.vmap(call)(torch.stack([weight, 2 * weight])), torch.stack([once, twice])
        )
        call(weight)
        dual = call(forward_ad.make_dual(weight, weight))
        assert_close(forward_ad.unpack_dual(dual).tangent, once - none, rtol=1e-4, atol=1e-4)


def test_a_compiled_model_takes_no_constants() -> None:
    layer = Layer().eval().requires_grad_(False)
    layer(X)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for _ in range(2):
        assert_close(compiled(X), layer.expected(X))
        layer.norm.bias.add_(1)
    torch._dynamo.reset()


@pytest.mark.usefixtures("nothing_left_behind")
def test_copies_files_and_threads(count) -> None:
    """Nothing is kept in a model, and eight threads get the same bits as one."""
    model = tiny.with_detections(tiny.build(opts=FROZEN))
    images = [tiny.make_image(32, 64, seed) for seed in range(2)]
    before = pickle.dumps(model)
    with torch.inference_mode():
        expected = [model([image])[0] for image in images]
    assert count["_scaled"] == 20  # each layer once
    assert pickle.dumps(model) == before
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = copy.deepcopy(model), pickle.loads(before), torch.load(file, weights_only=False)

    def detect(job) -> dict[str, Tensor]:
        with torch.inference_mode():
            return job[0]([job[1]])[0]

    jobs = [(each, image) for each in (model, *copies) for image in images]
    with ThreadPoolExecutor(8) as threads:
        for result, one in zip(threads.map(detect, jobs), expected * 4, strict=True):
            assert all(torch.equal(result[name], value) for name, value in one.items())
