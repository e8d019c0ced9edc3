"""Winograd's convolutions against PyTorch's: values, gradients, and when each is used."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from tensormask.layers import _native, op_backend, winograd

pytestmark = pytest.mark.skipif("cpu" not in _native.DEVICES, reason="no compiled op")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use Winograd's algorithm for small inputs and few channels too, few tiles at once."""
    for name in ("_MIN_LOCATIONS", "_MIN_CHANNELS", "_MIN_LARGER_CHANNELS"):
        monkeypatch.setattr(winograd, name, 1)
    monkeypatch.setattr(winograd, "_TILES_AT_ONCE", 6)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Collect the inputs of Winograd's algorithm."""
    inputs = []
    convolve = winograd._convolve

    def spy(x: Tensor, *args: object) -> Tensor:
        inputs.append(x)
        return convolve(x, *args)

    monkeypatch.setattr(winograd, "_convolve", spy)
    return inputs


def case(shape: tuple[int, ...], out_channels: int, dtype: torch.dtype) -> list[Tensor]:
    """Return a seeded input, half of it 0 as after a ReLU, a weight and a bias."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=dtype).relu()
    weight = torch.randn(out_channels, shape[1], 3, 3, generator=generator, dtype=dtype)
    bias = torch.randn(out_channels, generator=generator, dtype=dtype)
    return [x, weight, bias]


def results(function, inputs: list[Tensor], padding: int) -> list[Tensor]:
    """Return a convolution's result, and its gradients for a seeded gradient of the result."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    result = function(*inputs, (1, 1), (padding, padding))
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    return [result, *torch.autograd.grad(result, inputs, grad.to(result.dtype))]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(
    "shape, out_channels",
    [
        ((1, 3, 4, 4), 5),  # a tile
        ((1, 1, 3, 3), 1),
        ((2, 4, 9, 7), 3),  # the last tiles extend beyond the input
        ((3, 2, 30, 5), 8),  # several chunks of an image, the last with fewer rows
        ((5, 3, 6, 6), 2),  # several images in a chunk, the last chunk with fewer
        ((1, 2, 5, 40), 2),  # a row of tiles is more than a chunk
        ((2, 40, 8, 8), 17),  # a cache line of channels, and a rest
    ],
)
def test_equals_the_direct_convolution_and_its_gradients(
    calls: list[Tensor],
    shape: tuple[int, ...],
    out_channels: int,
    padding: int,
    layout: torch.memory_format,
) -> None:
    x, *parameters = case(shape, out_channels, torch.float64)
    inputs = [x.contiguous(memory_format=layout), *parameters]
    actual = results(winograd.conv2d, inputs, padding)
    assert len(calls) == 2  # forward, and the gradient of x
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in zip(actual, results(F.conv2d, inputs, padding), strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_rounding_is_within_1e_5_of_the_largest_result() -> None:
    """In float32, with the channels of the heads."""
    x, weight, bias = case((1, 256, 48, 40), 256, torch.float32)
    inputs = [x, weight * 0.01, bias]
    exact = results(F.conv2d, [tensor.double() for tensor in inputs], 1)
    actual = results(winograd.conv2d, inputs, 1)
    for name, ours, expected in zip(("result", "x", "weight", "bias"), actual, exact, strict=True):
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max(), name


@pytest.mark.usefixtures("everywhere")
def test_computes_only_the_gradients_needed(calls: list[Tensor]) -> None:
    x, weight, _ = case((1, 2, 8, 8), 3, torch.float32)
    weight.requires_grad_()
    winograd.conv2d(x, weight, None, (1, 1), (1, 1)).sum().backward()
    assert len(calls) == 1  # no gradient of x
    assert weight.grad is not None
    assert x.grad is None


@pytest.mark.usefixtures("everywhere")
def test_a_relu_may_overwrite_the_result() -> None:
    conv = winograd.Conv2d(3, 4, 3, padding=1)
    direct = nn.Conv2d(3, 4, 3, padding=1)
    direct.load_state_dict(conv.state_dict())
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    grads = []
    for module in (conv, direct):
        F.relu(module(x), inplace=True).square().sum().backward()
        grads.append(module.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_same_bits_each_time() -> None:
    inputs = case((2, 128, 40, 52), 160, torch.float32)
    first, again = (results(winograd.conv2d, inputs, 1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


LARGE = {"shape": (1, 128, 40, 40), "out": 128, "kernel": 3, "stride": 1, "padding": 1}


@pytest.mark.parametrize(
    "change, used",
    [
        ({}, True),
        ({"padding": 0}, True),
        ({"out": 32}, True),
        ({"out": 31}, False),
        ({"shape": (1, 32, 40, 40)}, True),
        ({"shape": (1, 31, 40, 40)}, False),
        ({"shape": (1, 127, 40, 40), "out": 127}, False),
        ({"shape": (1, 128, 38, 38)}, False),
        ({"shape": (6, 128, 16, 16)}, True),
        ({"stride": 2}, False),
        ({"padding": 2}, False),
        ({"kernel": 1, "padding": 0}, False),
    ],
)
def test_is_used_where_it_is_faster(
    calls: list[Tensor], change: dict[str, object], used: bool
) -> None:
    shape, *options = (LARGE | change).values()
    conv = winograd.Conv2d(shape[1], *options)
    with torch.no_grad():
        conv(torch.zeros(shape))
    assert len(calls) == used


def test_is_not_used_in_other_precisions_or_with_the_reference(calls: list[Tensor]) -> None:
    x = torch.zeros(LARGE["shape"])
    conv = winograd.Conv2d(128, 128, 3, padding=1)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(x).dtype == torch.bfloat16
        with op_backend("reference"):
            conv(x)
        conv.bfloat16()(x.bfloat16())
        assert not calls
        conv.float()(x)
        assert len(calls) == 1


def test_wrong_channels_and_an_image_without_a_batch_are_pytorchs() -> None:
    conv = winograd.Conv2d(128, 128, 3, padding=1)
    with pytest.raises(RuntimeError, match="to have 128 channels, but got 127 channels"):
        conv(torch.zeros(1, 127, 40, 40))
    with torch.no_grad():
        assert conv(torch.zeros(128, 40, 40)).shape == (128, 40, 40)


def test_ignores_the_default_device(calls: list[Tensor]) -> None:
    conv = winograd.Conv2d(128, 128, 3, padding=1)
    x = torch.zeros(LARGE["shape"])
    with torch.no_grad(), torch.device("meta"):
        assert conv(x).device.type == "cpu"
    assert len(calls) == 1


def forward_mode(conv: nn.Module, x: Tensor, of: str) -> Tensor:
    """The tangent of the result where one input of the convolution, named ``of``, has a tangent."""
    inputs = {"x": x, **{name: p.detach() for name, p in conv.named_parameters()}}
    with forward_ad.dual_level():
        inputs[of] = forward_ad.make_dual(inputs[of], torch.ones_like(inputs[of]))
        result = torch.func.functional_call(conv, inputs, (inputs.pop("x"),))
        return forward_ad.unpack_dual(result).tangent


TRANSFORMS = {
    "vmap": lambda conv, x: torch.func.vmap(conv)(torch.stack([x, -x])),
    "grad": lambda conv, x: torch.func.grad(lambda x: conv(x).square().sum())(x),
    "jvp": lambda conv, x: torch.func.jvp(conv, (x,), (x + 1,))[1],
    "forward mode, x": lambda conv, x: forward_mode(conv, x, "x"),
    "forward mode, weight": lambda conv, x: forward_mode(conv, x, "weight"),
    "forward mode, bias": lambda conv, x: forward_mode(conv, x, "bias"),
    "symbolic_trace": lambda conv, x: fx.symbolic_trace(nn.Sequential(conv))(x),
    "make_fx": lambda conv, x: make_fx(conv)(x)(x),
    "jit.trace": lambda conv, x: torch.jit.trace(conv, x, check_trace=False)(x),
    "export": lambda conv, x: torch.export.export(conv, (x,)).module()(x),
    "export, strict": lambda conv, x: torch.export.export(conv, (x,), strict=True).module()(x),
    "compile": lambda conv, x: torch.compile(conv, backend="eager", fullgraph=True)(x),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_and_traces_get_pytorchs_convolution(calls: list[Tensor], transform) -> None:
    conv = winograd.Conv2d(128, 128, 3, padding=1)
    direct = nn.Conv2d(128, 128, 3, padding=1)
    direct.load_state_dict(conv.state_dict())
    x = torch.randn(LARGE["shape"], generator=torch.Generator().manual_seed(0))
    assert torch.equal(transform(conv, x), transform(direct, x))
    assert not calls


def test_fake_tensors_get_a_shape(calls: list[Tensor]) -> None:
    with FakeTensorMode(), torch.no_grad():
        assert winograd.Conv2d(128, 128, 3)(torch.empty(LARGE["shape"])).shape == (1, 128, 38, 38)
    assert not calls


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("padding", [0, 1])
def test_batches_of_gradients(padding: int) -> None:
    inputs = [tensor.requires_grad_() for tensor in case((2, 3, 6, 7), 4, torch.float64)]
    batches = []
    for function in (winograd.conv2d, F.conv2d):
        result = function(*inputs, (1, 1), (padding, padding))
        grads = torch.stack([result.detach(), torch.ones_like(result)])
        batches.append(torch.autograd.grad(result, inputs, grads, is_grads_batched=True))
    torch.testing.assert_close(*batches)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(1, 4, 8, 8)}, "channels_last"),
        ({"x": torch.zeros(4, 8, 8)}, "channels_last"),
        ({"out": torch.zeros(36, 1, 2, 2, 3)}, r"\(36, images, rows, columns, 4\)"),
        ({"out": torch.zeros(35, 1, 2, 2, 4)}, r"\(36, images, rows, columns, 4\)"),
        ({"out": torch.zeros(36, 1, 2, 2, 4, dtype=torch.float64)}, "the same dtype"),
        ({"image": -1}, "negative"),
        ({"row": -4}, "negative"),
    ],
)
def test_the_operators_check_their_arguments(change: dict[str, object], message: str) -> None:
    x = torch.zeros(1, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    options = {"x": x, "image": 0, "row": 0, "out": torch.zeros(36, 1, 2, 2, 4)} | change
    x, image, row, out = options.values()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.tensormask.winograd_input(x, 1, image, row, out=out)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.tensormask.winograd_grad(x, image, row, out=out)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.tensormask.winograd_output(out, None, image, row, out=x)


def test_the_bias_must_fit() -> None:
    x = torch.zeros(1, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    products, bias = torch.zeros(36, 1, 2, 2, 4), torch.zeros(3)
    with pytest.raises(RuntimeError, match="bias"):
        torch.ops.tensormask.winograd_output(products, bias, 0, 0, out=x)


def test_a_library_of_older_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _native._load() == (_native.LIBRARY, "")
    monkeypatch.setattr(_native, "_NEWEST_OP", "of_a_later_version")
    library, reason = _native._load()
    assert library is None
    assert "built from older sources" in reason
