"""The CUDA kernels, compiled for the CPU and run thread by thread, against the reference."""

import ctypes
import math
import mmap
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tensormask.layers import paste_masks
from tensormask.layers import swap_align2nat_reference as reference
from tensormask.layers.masks import _packed

SOURCE = Path(__file__).parent / "cuda_on_cpu.cpp"
PAD = -6.0
# (N, side, H, W, lambda): odd and even sides and ratios, sizes that are not multiples of lambda or
# smaller than a window, rows of whole vectors, several parts of the channels.
CASES = [
    *((1, 1, 1, 1, 1), (2, 3, 5, 8, 1), (1, 2, 5, 8, 1), (2, 3, 7, 9, 2), (1, 2, 6, 8, 2)),
    *((1, 3, 8, 12, 3), (1, 2, 9, 16, 3), (1, 5, 4, 20, 4), (1, 6, 3, 5, 7), (1, 3, 40, 33, 16)),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("kernels") / "cuda_on_cpu.so"
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    # Python dies at a 16-byte access that is not aligned, as a kernel would, and at an overflow.
    options += [
        "-fsanitize=alignment,signed-integer-overflow",
        "-fsanitize-undefined-trap-on-error",
    ]
    subprocess.run([compiler, *options, str(SOURCE), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def call(kernels, name, case, tensor, *arguments):
    """Call a kernel on a tensor."""
    sizes = (ctypes.c_int64 * 5)(*case)
    strides = tensor.stride() if tensor.dim() == 4 else (tensor.stride(0), 0, *tensor.stride()[1:])
    name = f"{name}_{str(tensor.dtype).removeprefix('torch.')}"
    launch(kernels, name, sizes, (ctypes.c_int64 * 4)(*strides), tensor, *arguments)


def launch(kernels, name, *arguments):
    """Call an exported function; tensors are passed by their addresses."""
    function = ctypes.CFUNCTYPE(None)(ctypes.c_void_p.in_dll(kernels, name).value)
    types = {
        bool: ctypes.c_bool,
        int: ctypes.c_int64,
        float: ctypes.c_double,
        torch.Tensor: lambda x: ctypes.c_void_p(x.data_ptr()),
    }
    function(*(types.get(type(a), lambda a: a)(a) for a in arguments))
    assert ctypes.c_int.in_dll(kernels, "num_errors").value == 0


def in_both_orders(kernels, launch_into, shape, dtype):
    """Return a result that does not depend on the order of threads, with nothing around it written.

    Args:
        launch_into: writes a contiguous tensor of the shape and dtype.
    """
    results = []
    for last_first in (0, 1):
        ctypes.c_int.in_dll(kernels, "last_thread_first").value = last_first
        whole = torch.full((math.prod(shape) + 128,), 77, dtype=dtype)
        before, result, behind = whole.split([64, len(whole) - 128, 64])
        launch_into(result)
        assert (before == 77).all()
        assert (behind == 77).all()
        results.append(result)
    assert torch.equal(*(result.view(torch.uint8) for result in results))
    return results[0].view(shape)


def backward_at(kernels, case, grad, windows, columns=0):
    """Return the gradient of the input; a block takes as many columns as fit, or a number."""
    n, side, height, width, _ = case
    arguments = "backward_at", case, grad, windows, len(windows)
    return in_both_orders(
        kernels,
        lambda out: call(kernels, *arguments, out, columns),
        (n, side * side, height, width),
        grad.dtype,
    )


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def nans(*shape, dtype=torch.float64):
    return torch.full(shape, float("nan"), dtype=dtype)


def output_shape(case):
    n, side, height, width, ratio = case
    return n, (side * ratio) ** 2, -(-height // ratio), -(-width // ratio)


def some_windows(case):
    """Return windows on the grid, more than a block has threads; some are neighbors, some equal."""
    n, _, height, width = output_shape(case)
    generator = torch.Generator().manual_seed(1)
    columns = [torch.randint(0, end, (70,), generator=generator) for end in (n, height, width)]
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("directly", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_dense_forward(kernels, case, directly, dtype):
    n, side, height, width, ratio = case
    x = random(n, side * side, height, width, dtype=dtype)
    expected = reference.swap_align2nat(x, ratio, PAD)
    for layout in (x, x.contiguous(memory_format=torch.channels_last)):
        out = nans(*output_shape(case), dtype=dtype)
        call(kernels, "forward", case, layout, out, PAD, directly)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("directly", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_dense_backward(kernels, case, directly):
    n, side, height, width, ratio = case
    x = random(n, side * side, height, width).requires_grad_()
    grad = random(*output_shape(case), seed=2)
    (expected,) = torch.autograd.grad(reference.swap_align2nat(x, ratio, PAD), x, grad)
    for layout in (grad, grad.contiguous(memory_format=torch.channels_last)):
        out = nans(*x.shape)
        call(kernels, "backward", case, layout, out, directly)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("case", CASES)
def test_at_windows(kernels, case):
    n, side, height, width, ratio = case
    windows = some_windows(case)
    x = random(n, side * side, height, width).requires_grad_()
    expected = reference.swap_align2nat_at(x, windows, ratio, PAD)
    out = nans(*expected.shape)
    call(kernels, "forward_at", case, x.detach(), windows, len(windows), out, PAD)
    torch.testing.assert_close(out, expected)
    grad = random(*expected.shape, seed=2).bfloat16().double()
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for columns in (0, 5):
            for layout in (grad.to(dtype), grad.to(dtype).mT.contiguous().mT):
                out = backward_at(kernels, case, layout, windows, columns)
                torch.testing.assert_close(out, expected_grad.to(dtype))


def test_rows_without_windows_get_no_gradient(kernels):
    """One window of two images, whose masks reach a part of the rows and of the columns."""
    case = (2, 3, 20, 24, 2)
    windows = torch.tensor([[1, 7, 9]])
    x = random(2, 9, 20, 24, dtype=torch.float32).requires_grad_()
    grad = random(1, 6, 6, dtype=torch.float32, seed=2)
    expected = reference.swap_align2nat_at(x, windows, 2, PAD)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    out = backward_at(kernels, case, grad, windows)
    torch.testing.assert_close(out, expected_grad)
    assert (out != 0).float().mean() < 0.05
    assert not backward_at(kernels, case, grad[:0], windows[:0]).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", [(1, 3, 6, 9, 1), (1, 3, 9, 12, 3), (1, 4, 12, 9, 2)])
def test_a_bad_gradient_reaches_the_values_that_were_read(kernels, case, bad):
    _, side, height, width, ratio = case
    windows = torch.tensor([[0, 1, 1], [0, 1, 2], [0, 2, 1], [0, 1, 1]])
    for pixel in range(side * ratio):
        masks = torch.zeros(4, side * ratio, side * ratio, dtype=torch.float64)
        masks[0, pixel, pixel] = 1
        x = torch.zeros(1, side**2, height, width, dtype=torch.float64, requires_grad=True)
        read = torch.autograd.grad(reference.swap_align2nat_at(x, windows, ratio, PAD), x, masks)
        masks[0, pixel, pixel] = bad
        assert torch.equal(~backward_at(kernels, case, masks, windows).isfinite(), read[0] != 0)


def test_windows_outside_of_the_grid_read_padding_and_get_no_gradient(kernels):
    case = (1, 3, 7, 9, 2)
    windows = torch.tensor([[-1, 0, 0], [1, 0, 0], [0, -1, 0], [0, 4, 0], [0, 0, -9], [0, 0, 5]])
    x, masks = random(1, 9, 7, 9), nans(6, 6, 6)
    call(kernels, "forward_at", case, x, windows, 6, masks, PAD)
    assert (masks == PAD).all()
    assert not backward_at(kernels, case, random(6, 6, 6), windows).any()


# Boxes inside of a frame of 40x50, across its borders, around it, outside, tiny, without a width,
# at whole pixels, the wrong way round, and not a number.
BOXES = torch.tensor(
    [
        *([3.3, 4.1, 20.7, 30.2], [-9.5, 20.0, 14.2, 55.1], [-70.0, -60.0, 90.0, 110.0]),
        *([60.0, 3.0, 80.0, 20.0], [10.2, 10.3, 10.9, 11.1], [5.0, 2.0, 5.0, 30.0]),
        *([8.0, 8.0, 38.0, 23.0], [40.0, 30.0, 10.0, 5.0], [float("nan"), 0.0, 9.0, 9.0]),
    ]
)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("size", [(40, 50), (33, 97), (3, 5), (20, 64)])
def test_paste(kernels, size, rows, dtype):
    """Masks of unequal sizes; every byte of the frames is written, and none behind them."""
    shapes = [(15, 15), (30, 30), (4, 7), (1, 1), (2, 1), (9, 30), (15, 15), (3, 3), (5, 5)]
    masks = [random(*shape, dtype=getattr(torch, dtype)).sigmoid() for shape in shapes]
    values, layout, boxes, largest = _packed(masks, BOXES)
    expected = paste_masks(masks, boxes, size)
    numbers = (len(masks), largest, rows, *size)
    pasted = in_both_orders(
        kernels,
        lambda out: launch(kernels, f"paste_{dtype}", values, layout, boxes, *numbers, out),
        expected.shape,
        torch.uint8,
    )
    assert pasted.max() <= 1
    assert torch.equal(pasted == 1, expected)


@pytest.fixture
def only_block(kernels):
    """Return a function that chooses the first block to run."""
    first = (ctypes.c_uint * 3).in_dll(kernels, "first_block")

    def choose(*block):
        first[:] = block

    yield choose
    choose(0, 0, 0)


def large(*shape, dtype):
    """Return zeros of more than 2^31 values, which take no memory before they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def test_backward_at_windows_of_a_large_map(kernels, only_block):
    """Blocks for the last row of locations, of an image that is the first or the last of 40."""
    window = torch.tensor([[0, 99, 167]])
    grad = random(1, 60, 60).bfloat16()
    rows = []
    for n in (1, 40):
        case = (n, 15, 400, 672, 4)
        out = large(n, 15, 15, 400, 672, dtype=torch.bfloat16)
        only_block(399, 15 + 8, n - 1)  # the second half of the columns, the 9th row of channels
        window[0, 0] = n - 1
        call(kernels, "backward_at", case, grad, window, 1, out, 0)
        rows.append(out[-1, 8, :, 399].clone())
    assert rows[0].any()
    assert torch.equal(*rows)


def test_paste_into_many_frames(kernels, only_block):
    count, height, width = 2100, 800, 1344
    frames = large(count, height, width, dtype=torch.uint8)
    boxes = torch.tensor([[-2e3, -2e3, 4e3, 4e3]]).repeat(count, 1)
    layout = torch.tensor([[0, 1, 1]]).repeat(count, 1)
    only_block(count * 50 - 1, 0, 0)
    launch(
        kernels, "paste_float32", torch.ones(1), layout, boxes, count, 1, 16, height, width, frames
    )
    assert frames[-1, -16:].all()
    assert not frames[-1, :-16].any()
