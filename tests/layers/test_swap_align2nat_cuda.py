"""The CUDA kernels against the CPU kernels and the reference. These tests need a GPU.

`make gpu-test` runs this file as a script, on machines without pytest. `--small` leaves out tests
that are slow under compute-sanitizer.
"""

import importlib
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "dev"))
import benchmarks  # noqa: F401 (makes tensormask importable without all its packages)

from tensormask.layers import _native
from tensormask.layers._native import op_backend
from tensormask.layers.swap_align2nat import swap_align2nat, swap_align2nat_at

reference = importlib.import_module("tensormask.layers.swap_align2nat_reference")
ops = torch.ops.tensormask
try:
    import pytest
except ModuleNotFoundError:
    pass
else:
    pytestmark = [
        pytest.mark.cuda,
        pytest.mark.skipif("cuda" not in _native.DEVICES, reason=_native.why_not("cuda") or "-"),
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    ]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# side, lambda, height, width: odd and even, multiples or not, rows of whole 16 bytes or not.
CASES = (
    *((3, 1, 7, 9), (4, 1, 8, 16), (15, 1, 20, 40), (3, 2, 7, 9), (5, 2, 16, 24)),
    *((3, 3, 10, 11), (4, 5, 23, 31), (11, 8, 40, 64), (15, 32, 40, 64)),
    *((2, 300, 33, 20), (1, 1, 1, 1), (15, 2, 12, 500)),  # the last is wider than a block
)
LARGE = ((15, 1, 200, 336), (15, 4, 200, 336), (15, 32, 200, 336), (11, 8, 200, 333))


def random_windows(x: torch.Tensor, lambda_val: int, count: int) -> torch.Tensor:
    limits = (x.shape[0], -(-x.shape[2] // lambda_val), -(-x.shape[3] // lambda_val))
    return torch.stack([torch.randint(limit, (count,)) for limit in limits], 1)


def all_four(x: torch.Tensor, windows: torch.Tensor, lambda_val: int, grads=None) -> tuple:
    """Run forward and backward, dense and at windows, with random gradients if none are given."""
    height, width = x.shape[2:]
    dense = ops.swap_align2nat(x, lambda_val, -6.0)
    masks = ops.swap_align2nat_at(x, windows, lambda_val, -6.0)
    grads = grads or (torch.randn_like(dense), torch.randn_like(masks))
    back = ops.swap_align2nat_backward(grads[0], lambda_val, height, width)
    back_at = ops.swap_align2nat_at_backward(
        grads[1], windows, lambda_val, x.shape[0], height, width
    )
    return (dense, masks, back, back_at), grads


def compare_with_cpu(side: int, lambda_val: int, height: int, width: int, dtype) -> None:
    x = torch.randn(2, side**2, height, width).to(dtype)
    windows = random_windows(x, lambda_val, 9)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        expected, grads = all_four(x, windows, lambda_val)
        cuda = [grad.cuda().contiguous(memory_format=layout) for grad in grads[:1]]
        masks = grads[1].cuda()
        cuda.append(masks if layout == torch.contiguous_format else masks.mT.contiguous().mT)
        got, _ = all_four(x.cuda(), windows.cuda(), lambda_val, cuda)
        eps = torch.finfo(dtype).eps
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=2 * eps, atol=32 * eps)


def test_equals_the_cpu() -> None:
    for case in CASES:
        for dtype in DTYPES:
            compare_with_cpu(*case, dtype)


def test_equals_the_cpu_at_full_size() -> None:
    for case in LARGE:
        compare_with_cpu(*case, torch.float32)
        compare_with_cpu(*case, torch.float16)


def test_equals_the_reference_on_the_gpu() -> None:
    for side, lambda_val, height, width in CASES:
        x = torch.randn(1, side**2, height, width, device="cuda", dtype=torch.float64)
        windows = random_windows(x, lambda_val, 5).cuda()
        expected = reference.swap_align2nat(x, lambda_val, -6.0)
        torch.testing.assert_close(swap_align2nat(x, lambda_val), expected)
        expected = reference.swap_align2nat_at(x, windows, lambda_val, -6.0)
        torch.testing.assert_close(swap_align2nat_at(x, windows, lambda_val), expected)


def test_pasted_masks() -> None:
    """Frames whose rows are whole 16 bytes or not; boxes inside, across the border and outside."""
    sides = torch.tensor([15, 30, 11, 480, 1]).repeat(6)
    layout = torch.stack([(sides**2).cumsum(0) - sides**2, sides, sides], dim=1)
    values = torch.rand(int((sides**2).sum()))
    for height, width in ((800, 1344), (333, 517), (20, 7)):
        corner = torch.rand(len(sides), 2) * torch.tensor([width, height]) * 1.2 - 30
        boxes = torch.cat([corner, corner + torch.rand(len(sides), 2) * 400], dim=1)
        for dtype in (torch.float32, torch.float64):
            arguments = values.to(dtype), layout, boxes.to(dtype)
            expected = ops.paste_masks(*arguments, 480, height, width)
            pasted = ops.paste_masks(*(x.cuda() for x in arguments), 480, height, width).cpu()
            # The GPU multiplies and adds in one step: probabilities of 1/2 are rounded otherwise.
            assert (pasted != expected).sum() <= 2 + 1e-5 * expected.numel()


def test_many_windows_and_images() -> None:
    """More windows than a block has threads, many of them equal; more images than a grid has."""
    for x in (torch.randn(2, 9, 20, 30), torch.randn(70_000, 1, 2, 3)):
        windows = random_windows(x, 2, 10_000)
        expected, grads = all_four(x, windows, 2)
        got, _ = all_four(x.cuda(), windows.cuda(), 2, [grad.cuda() for grad in grads])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-3)


def test_bad_gradients() -> None:
    """NaN and infinity reach only the values that the pixel of the mask is computed from."""
    for side, lambda_val in ((3, 1), (3, 3), (4, 2)):
        windows = torch.tensor([[0, 1, 1], [0, 1, 2], [0, 1, 1]], device="cuda")
        grad = torch.zeros(3, side * lambda_val, side * lambda_val, device="cuda")
        results = []
        for value in (1.0, float("nan"), float("inf")):
            grad[0, lambda_val, lambda_val] = value
            results.append(ops.swap_align2nat_at_backward(grad, windows, lambda_val, 1, 12, 12))
        assert results[0].any()
        for bad in results[1:]:
            assert torch.equal(~bad.isfinite(), results[0] != 0)


def test_on_a_gpu_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        return
    x = torch.randn(1, 9, 8, 10)
    windows = random_windows(x, 2, 9)
    expected, grads = all_four(x, windows, 2)
    device = torch.device("cuda", 1)
    got, _ = all_four(x.to(device), windows.to(device), 2, [grad.to(device) for grad in grads])
    for a, b in zip(got, expected, strict=True):
        assert a.device == device
        torch.testing.assert_close(a.cpu(), b)


def test_two_runs_give_the_same_bits() -> None:
    for side, lambda_val, height, width in (CASES[4], CASES[7], (15, 4, 100, 168)):
        x = torch.randn(2, side**2, height, width, device="cuda")
        windows = random_windows(x, lambda_val, 80).cuda()
        first, grads = all_four(x, windows, lambda_val)
        for _ in range(3):
            again, _ = all_four(x, windows, lambda_val, grads)
            assert all(map(torch.equal, first, again))


def test_memory_that_does_not_begin_at_16_bytes() -> None:
    """Views into larger tensors, which do not allow 16-byte accesses."""
    whole = torch.randn(1, 9, 9, 19, device="cuda", dtype=torch.float16)
    x = whole[:, :, 1:, 3:]
    expected = ops.swap_align2nat(x.contiguous(), 2, -6.0)
    assert torch.equal(ops.swap_align2nat(x, 2, -6.0), expected)
    grad = torch.randn(1, 36, 5, 12, device="cuda")[:, :, 1:, 3:-1]
    expected = ops.swap_align2nat_backward(grad.contiguous(), 2, 8, 16)
    assert torch.equal(ops.swap_align2nat_backward(grad, 2, 8, 16), expected)


def test_gradients() -> None:
    x = torch.randn(1, 4, 3, 4, dtype=torch.float64, device="cuda", requires_grad=True)
    windows = random_windows(x, 2, 5).cuda()
    for function in (lambda x: swap_align2nat(x, 2), lambda x: swap_align2nat_at(x, windows, 2)):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def test_other_streams_and_graphs() -> None:
    """On a stream that waits for its input, and captured: all work runs on the current stream."""
    x = torch.randn(1, 225, 100, 168, device="cuda")
    windows = random_windows(x, 4, 20).cuda()
    expected, grads = all_four(x, windows, 4)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        got, _ = all_four(late, windows, 4, grads)
    stream.synchronize()
    assert all(map(torch.equal, expected, got))

    graph = torch.cuda.CUDAGraph()
    fixed = torch.zeros_like(x)
    with torch.cuda.graph(graph):
        got, _ = all_four(fixed, windows, 4, grads)
    fixed.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, expected, got))


def test_compile() -> None:
    def both(x, windows):
        return swap_align2nat(x, 2).sigmoid().sum() + swap_align2nat_at(x, windows, 2).sum()

    compiled = torch.compile(both, fullgraph=True)
    for height in (6, 9):
        x = torch.randn(2, 9, height, 8, device="cuda", requires_grad=True)
        windows = random_windows(x, 2, 3).cuda()
        expected = both(x, windows)
        # Terms of the sums cancel, and a compiled kernel adds them in another order.
        torch.testing.assert_close(compiled(x, windows), expected, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(
            torch.autograd.grad(compiled(x, windows), x)[0], torch.autograd.grad(expected, x)[0]
        )


def test_opcheck() -> None:
    x = torch.randn(2, 9, 6, 7, device="cuda", requires_grad=True)
    windows = random_windows(x, 2, 5).cuda()
    torch.library.opcheck(ops.swap_align2nat.default, (x, 2, -6.0))
    torch.library.opcheck(ops.swap_align2nat_at.default, (x, windows, 2, -6.0))


def test_empty_tensors_and_errors() -> None:
    no_windows = torch.zeros(0, 3, dtype=torch.int64, device="cuda")
    x = torch.zeros(0, 9, 4, 6, device="cuda", requires_grad=True)
    (swap_align2nat(x, 2).sum() + swap_align2nat_at(x, no_windows, 2).sum()).backward()
    assert x.grad.shape == x.shape
    full = torch.zeros(1, 9, 4, 6, device="cuda", requires_grad=True)
    swap_align2nat_at(full, no_windows, 2).sum().backward()
    assert not full.grad.any()
    for arguments, words in (
        ((torch.zeros(1, 8, 4, 4, device="cuda"), 2), "square"),
        ((torch.zeros(1, 9, 4, 4, device="cuda", dtype=torch.int32), 2), "floating"),
        ((torch.zeros(1, 9, 4, 4, device="cuda"), 0), "lambda_val"),
        ((full, no_windows.cpu(), 2), "windows are on cpu, x is on cuda:0"),
    ):
        function = swap_align2nat if len(arguments) == 2 else swap_align2nat_at
        op = ops.swap_align2nat if len(arguments) == 2 else ops.swap_align2nat_at
        messages = set()
        for call in (lambda: function(*arguments), lambda: op(*arguments, -6.0)):  # noqa: B023
            try:
                call()
            except (ValueError, RuntimeError) as error:
                messages.add(str(error))
        assert len(messages) == 1, messages
        assert words in messages.pop()


def test_autocast_leaves_the_dtype() -> None:
    x = torch.randn(1, 9, 6, 8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16), op_backend("native"):
        assert swap_align2nat(x, 2).dtype == torch.float32
        assert swap_align2nat(x.bfloat16(), 2).dtype == torch.bfloat16


def main() -> int:
    """Run every test of this file, on machines without pytest."""
    if "cuda" not in _native.DEVICES or not torch.cuda.is_available():
        print(_native.why_not("cuda") or "PyTorch sees no GPU", file=sys.stderr)
        return 1
    long = ("full_size", "compile", "test_gradients", "opcheck", "graphs", "many_windows")
    failed = 0
    for name, test in list(globals().items()):
        if not name.startswith("test_"):
            continue
        if "--small" in sys.argv and any(word in name for word in long):
            continue
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            test()
        except Exception as error:
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
        else:
            print(f"passed {name} ({time.perf_counter() - start:.1f} s)", flush=True)
    print(f"{torch.cuda.get_device_name()}: {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
