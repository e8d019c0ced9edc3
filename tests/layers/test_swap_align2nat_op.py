"""The compiled op: equal to the reference, usable with PyTorch's tools, loading, and errors."""

import asyncio
import importlib.util
import logging
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tensormask.layers import (
    SwapAlign2Nat,
    _native,
    op_backend,
    swap_align2nat,
    swap_align2nat_at,
)
from tensormask.utils import env

pytestmark = pytest.mark.skipif(
    "TENSORMASK_WITHOUT_EXT" in os.environ, reason="TENSORMASK_WITHOUT_EXT: nothing is compiled"
)
reference = importlib.import_module("tensormask.layers.swap_align2nat_reference")
ops = torch.ops.tensormask


def random_windows(x: torch.Tensor, lambda_val: int, count: int) -> torch.Tensor:
    """Return rows (n, y, x) anywhere on the grid, some of them twice."""
    limits = (x.shape[0], *(math.ceil(extent / lambda_val) for extent in x.shape[2:]))
    return torch.stack([torch.randint(limit, (count,)) for limit in limits], 1)


def test_the_op_is_compiled() -> None:
    """Otherwise the other tests would compare the reference with itself."""
    assert _native.REASON == ""
    assert {"cpu", "meta"} <= _native.DEVICES
    assert _native.use_native("cpu")


@settings(max_examples=60, deadline=None)
@given(
    side=st.integers(1, 5),
    lambda_val=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16, 24]),
    height=st.integers(1, 40),
    width=st.integers(1, 70),
    pad_val=st.sampled_from([-6.0, 0.0, 2.5]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference(
    side, lambda_val, height, width, pad_val, dtype, channels_last, seed
) -> None:
    """Forward and backward, dense and at windows. The reference computes in float64."""
    torch.manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, side**2, height, width).to(dtype).to(memory_format=layout)
    exact = x.double().requires_grad_()
    # The result is rounded once, after sums of up to 16 terms as large as the padding.
    half = dtype in (torch.float16, torch.bfloat16)
    eps = torch.finfo(dtype).eps
    close = {"rtol": 2 * eps, "atol": (8 if half else 64) * eps}

    dense = ops.swap_align2nat(x, lambda_val, pad_val)
    expected = reference.swap_align2nat(exact, lambda_val, pad_val)
    assert dense.is_contiguous()
    assert_close(dense.double(), expected, **close)
    grad = torch.randn(dense.shape).to(dtype).to(memory_format=layout)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    grad_x = ops.swap_align2nat_backward(grad, lambda_val, height, width)
    assert_close(grad_x.double(), expected_grad, **close)

    windows = random_windows(x, lambda_val, 7)
    masks = ops.swap_align2nat_at(x, windows, lambda_val, pad_val)
    expected = reference.swap_align2nat_at(exact, windows, lambda_val, pad_val)
    assert_close(masks.double(), expected, **close)
    grad = torch.randn(masks.shape).to(dtype)
    grad = grad.mT.contiguous().mT if channels_last else grad
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    grad_x = ops.swap_align2nat_at_backward(grad, windows, lambda_val, 2, height, width)
    # A sum of up to 7 windows, with up to 4 values each.
    assert_close(grad_x.double(), expected_grad, rtol=close["rtol"], atol=4 * close["atol"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_preserved(dtype: torch.dtype) -> None:
    """lambda = 1 of 2x2 masks averages equal numbers: outputs are bit-identical to inputs."""
    numbers = torch.arange(2**16).to(torch.int32).to(torch.uint16).view(dtype)
    numbers = numbers[~(numbers.isfinite() & (numbers.abs() > 2**15))]
    x = numbers.view(-1, 1, 1, 1).repeat(1, 4, 4, 4)  # an image per number, four equal channels
    inside = ops.swap_align2nat(x, 1, 0.0)[:, :, 1:3, 1:3]
    assert_close(inside, x[:, :, 1:3, 1:3], rtol=0, atol=0, equal_nan=True)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    threads = torch.get_num_threads()
    for side, lambda_val in ((15, 1), (4, 2), (3, 3), (5, 8)):
        x = torch.randn(2, side**2, 21, 34, dtype=torch.float64)
        windows = random_windows(x, lambda_val, 50)
        y = torch.randn_like(ops.swap_align2nat(x, lambda_val, 0.0))
        masks = torch.randn_like(ops.swap_align2nat_at(x, windows, lambda_val, 0.0))
        results = []
        for num_threads in (1, 1, 2, 3):
            torch.set_num_threads(num_threads)
            dense = ops.swap_align2nat(x, lambda_val, 0.0)
            grad = ops.swap_align2nat_backward(y, lambda_val, 21, 34)
            at = ops.swap_align2nat_at(x, windows, lambda_val, 0.0)
            grad_at = ops.swap_align2nat_at_backward(masks, windows, lambda_val, 2, 21, 34)
            results.append([dense, grad, at, grad_at])
        torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


def test_out_is_written_in_place() -> None:
    x = torch.randn(1, 9, 8, 6)
    expected = ops.swap_align2nat(x, 2, -6.0)
    out = torch.full_like(expected, torch.nan)
    ops.swap_align2nat.out(x, 2, -6.0, out=out)
    assert torch.equal(out, expected)
    grad_x = torch.full_like(x, torch.nan)
    ops.swap_align2nat_backward.out(expected, 2, 8, 6, out=grad_x)
    assert torch.equal(grad_x, ops.swap_align2nat_backward(expected, 2, 8, 6))
    with pytest.raises(RuntimeError, match="out must be a contiguous"):
        ops.swap_align2nat.out(x, 2, -6.0, out=torch.empty(1, 36, 4, 4))


def test_opcheck() -> None:
    x = torch.randn(2, 9, 6, 7, requires_grad=True)
    windows = random_windows(x, 2, 5)
    dense = torch.randn(2, 36, 3, 4, requires_grad=True)
    masks = torch.randn(5, 6, 6, requires_grad=True)
    for op, arguments in (
        (ops.swap_align2nat.default, (x, 2, -6.0)),
        (ops.swap_align2nat_backward.default, (dense, 2, 6, 7)),
        (ops.swap_align2nat_at.default, (x, windows, 2, -6.0)),
        (ops.swap_align2nat_at_backward.default, (masks, windows, 2, 2, 6, 7)),
    ):
        results = torch.library.opcheck(op, arguments)
        assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize(
    "backend, lambda_val, sizes",
    [("native", 2, [(6, 8, 3), (9, 5, 4)]), ("reference", 1, [(3, 4, 2)])],  # the latter: few taps
)
def test_compile(backend: str, lambda_val: int, sizes: list[tuple[int, int, int]]) -> None:
    """In one graph, forward and backward. The compiled op also supports dynamic shapes."""

    def both(x: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        dense, masks = swap_align2nat(x, lambda_val), swap_align2nat_at(x, windows, lambda_val)
        return dense.sigmoid().sum() + masks.square().sum()

    torch._dynamo.reset()
    dynamic = backend == "native"
    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with op_backend(backend):
        for height, width, count in sizes:
            x = torch.randn(2, 4, height, width, requires_grad=True)
            windows = random_windows(x, lambda_val, count)
            expected = both(x, windows)
            assert_close(compiled(x, windows), expected)
            assert_close(
                torch.autograd.grad(compiled(x, windows), x)[0], torch.autograd.grad(expected, x)[0]
            )


def test_in_a_graph_the_kernel_checks_windows() -> None:
    """In eager mode they are checked before the call."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, windows: swap_align2nat_at(x, windows, 2), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(RuntimeError, match=r"window \(n, y, x\) = \[0, 9, 0\] is outside"):
        compiled(torch.zeros(1, 9, 6, 8), torch.tensor([[0, 9, 0]]))


def test_export() -> None:
    class Both(torch.nn.Module):
        def forward(self, x, windows):
            return swap_align2nat(x, 2), swap_align2nat_at(x, windows, 2)

    x = torch.randn(1, 9, 6, 8)
    height, width, count = (torch.export.Dim(name, min=2, max=64) for name in "hwk")
    program = torch.export.export(
        Both(),
        (x, random_windows(x, 2, 3)),
        dynamic_shapes=({2: 2 * height, 3: 2 * width}, {0: count}),
    )
    x = torch.randn(1, 9, 12, 10)
    windows = random_windows(x, 2, 5)
    assert_close(program.module()(x, windows), Both()(x, windows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(1, 9, 6, 8)
    with torch.autocast("cpu", dtype):
        assert swap_align2nat(x, 2).dtype == torch.float32
        assert swap_align2nat(x.to(dtype), 2).dtype == dtype
        assert swap_align2nat_at(x.to(dtype), random_windows(x, 2, 2), 2).dtype == dtype


BAD_CALLS = [
    (torch.zeros(1, 8, 4, 4), 1, None, "a square"),
    (torch.zeros(1, 0, 4, 4), 1, None, "a square"),
    (torch.zeros(9, 4, 4), 1, None, "(N, V*U, H, W)"),
    (torch.zeros(1, 9, 4, 4, dtype=torch.int32), 1, None, "a floating tensor"),
    (torch.zeros(1, 9, 4, 4).to(torch.float8_e4m3fn), 1, None, "float8_e4m3fn"),
    (torch.zeros(1, 9, 4, 4, dtype=torch.complex64), 1, None, "complex64"),
    (torch.zeros(1, 9, 4, 4), 0, None, "lambda_val"),
    (torch.zeros(1, 9, 4, 4), -3, None, "lambda_val"),
    (torch.zeros(1, 9, 4, 4), 2, torch.zeros(1, 2, dtype=torch.int64), "(K, 3)"),
    (torch.zeros(1, 9, 4, 4), 2, torch.zeros(3, dtype=torch.int64), "(K, 3)"),
    (torch.zeros(1, 9, 4, 4), 2, torch.zeros(1, 3, dtype=torch.int32), "int64"),
    (torch.zeros(1, 9, 4, 4), 2, torch.tensor([[0, 0, 0], [0, 2, 0]]), "outside"),
    (torch.zeros(1, 9, 4, 4), 2, torch.tensor([[0, 0, 0], [1, 0, 0]]), "outside"),
    (torch.zeros(1, 9, 4, 4), 2, torch.tensor([[0, 0, -1]]), "outside"),
    (torch.zeros(1, 9, 4, 4), 2, torch.zeros(1, 3, dtype=torch.int64, device="meta"), "on meta"),
]


@pytest.mark.parametrize("x, lambda_val, windows, part", BAD_CALLS)
def test_messages_are_equal_everywhere(x, lambda_val, windows, part: str) -> None:
    """Of the public function on each backend, of the kernel itself, and of the fake kernel."""

    def message(function, *arguments) -> str:
        with pytest.raises((ValueError, RuntimeError)) as info:
            function(*arguments)
        return str(info.value).split(" (originally from")[0]

    # Bad input is an error of both operations.
    calls = [] if windows is not None else [(swap_align2nat, ops.swap_align2nat, (x, lambda_val))]
    windows = torch.zeros(1, 3, dtype=torch.int64) if windows is None else windows
    calls += [(swap_align2nat_at, ops.swap_align2nat_at, (x, windows, lambda_val))]
    messages = set()
    for function, op, arguments in calls:
        for backend in ("native", "reference"):
            with op_backend(backend), pytest.raises(ValueError) as info:
                function(*arguments)
            messages.add(str(info.value))
        messages.add(message(op, *arguments, -6.0))
        if windows.device.type == "cpu" and part != "outside":
            fakes = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
            messages.add(message(op, *fakes, -6.0))
    (only,) = messages
    assert part in only


@pytest.mark.parametrize(
    "shape, size",
    [
        *(((1, 36, 2, 2), (5, 4)), ((1, 37, 2, 2), (4, 4))),
        *(((1, 1, 2, 2), (4, 4)), ((36, 2, 2), (4, 4))),
    ],
)
def test_gradients_of_wrong_shapes(shape, size) -> None:
    messages = set()
    for device in ("cpu", "meta"):
        with pytest.raises((ValueError, RuntimeError), match="grad") as info:
            ops.swap_align2nat_backward(torch.zeros(shape, device=device), 2, *size)
        messages.add(str(info.value))
    assert len(messages) == 1, messages


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 6), (1, 5, 5), (1, 1, 1)])
def test_gradients_of_masks_of_wrong_shapes(shape) -> None:
    messages = set()
    for device in ("cpu", "meta"):
        grad, windows = torch.zeros(shape, device=device), torch.zeros(1, 3, dtype=torch.int64)
        with pytest.raises((ValueError, RuntimeError), match="grad") as info:
            ops.swap_align2nat_at_backward(grad, windows.to(device), 2, 1, 4, 4)
        messages.add(str(info.value))
    assert len(messages) == 1, messages


def test_the_module_shows_its_arguments() -> None:
    assert repr(SwapAlign2Nat(2)) == "SwapAlign2Nat(lambda_val=2, pad_val=-6.0)"


def test_op_backend_chooses(monkeypatch, caplog) -> None:
    x = torch.randn(1, 9, 4, 4)
    calls = []
    monkeypatch.setattr(
        reference, "swap_align2nat", lambda *a: calls.append(a) or torch.zeros(1, 36, 2, 2)
    )
    for backend in ("reference", "native"):
        with op_backend(backend):
            swap_align2nat(x, 2)
        assert len(calls) == 1
    with pytest.raises(ValueError, match="one of auto, native, reference, got 'cuda'"):
        op_backend("cuda").__enter__()

    # Without a compiled op: a warning, once; an error with the backend "native".
    missing = {"LIBRARY": None, "REASON": "it was not built", "DEVICES": frozenset()}
    for name, value in {**missing, "_warned_devices": set()}.items():
        monkeypatch.setattr(_native, name, value)
    with caplog.at_level(logging.WARNING):
        swap_align2nat(x, 2)
        swap_align2nat(x, 2)
    assert len(calls) == 3
    assert [record.message.count("it was not built") for record in caplog.records] == [1]
    with op_backend("native"), pytest.raises(RuntimeError, match="it was not built"):
        swap_align2nat(x, 2)
    assert "plain PyTorch: it was not built" in env.describe()


def test_op_backend_is_of_a_thread_and_of_a_task() -> None:
    """Two threads that leave their choices in the order of entering, and two tasks of asyncio."""
    entered = threading.Barrier(2), threading.Event()

    def choose(backend: str, last: bool) -> list[bool]:
        used = []
        with op_backend(backend):
            entered[0].wait(10)
            used.append(_native.use_native("cpu"))
            if last:
                entered[1].wait(10)
        entered[1].set()
        return [*used, _native.use_native("cpu")]

    async def switch(backend: str) -> bool:
        with op_backend(backend):
            await asyncio.sleep(0)
            return _native.use_native("cpu")

    async def both() -> list[bool]:
        return await asyncio.gather(switch("reference"), switch("native"))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(choose, ("reference", "native"), (False, True))
    assert (first, second) == ([False, True], [True, True])
    assert asyncio.run(both()) == [False, True]


def test_compiled_autograd() -> None:
    x = torch.randn(1, 9, 4, 5, requires_grad=True)
    y = swap_align2nat(x, 2).sin().sum() + swap_align2nat_at(x, random_windows(x, 2, 2), 2).sum()
    (expected,) = torch.autograd.grad(y, x, retain_graph=True)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward()
    assert_close(x.grad, expected)


@pytest.mark.skipif(torch.__version__ < "2.14", reason="a compiled function keeps its first choice")
def test_a_compiled_function_follows_op_backend() -> None:
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(
        lambda x: swap_align2nat(x, 1),
        fullgraph=True,
        backend=lambda graph, _: graphs.append(graph) or graph,
    )
    for backend in ("native", "reference", "native"):
        with op_backend(backend):
            compiled(torch.zeros(1, 1, 3, 3))
    assert ["tensormask" in graph.code for graph in graphs] == [True, False]


def test_the_environment_chooses_at_import(monkeypatch) -> None:
    def import_again():
        spec = importlib.util.spec_from_file_location("native_again", _native.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    monkeypatch.setenv("TENSORMASK_OP", "reference")
    assert not import_again().use_native("cpu")
    monkeypatch.delenv("TENSORMASK_OP")
    assert import_again().use_native("cpu")
    monkeypatch.setenv("TENSORMASK_OP", "fast")
    with pytest.raises(ValueError, match=r"TENSORMASK_OP.*, got 'fast'"):
        import_again()


def test_a_broken_library_has_a_reason(tmp_path, monkeypatch) -> None:
    """A file that is not a library for this machine raises no error at import."""
    (tmp_path / "_C.abi3.so").write_bytes(b"no library")
    monkeypatch.setattr(_native.build, "PACKAGE", tmp_path)
    monkeypatch.setenv("TENSORMASK_CACHE", str(tmp_path / "cache"))
    library, reason = _native._load()
    assert library is None
    assert "_C.abi3.so does not load with PyTorch" in reason
    (tmp_path / "_C.abi3.so").unlink()
    assert "run 'tensormask build-ops'" in _native._load()[1]
