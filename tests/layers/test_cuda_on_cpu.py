"""The CUDA kernels, compiled for the CPU and run thread by thread, against the reference."""

import ctypes
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
    subprocess.run([compiler, *options, str(SOURCE), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def call(kernels, name, case, tensor, *arguments):
    """Call a kernel on a tensor; tensors are passed by their addresses."""
    sizes = (ctypes.c_int64 * 5)(*case)
    strides = tensor.stride() if tensor.dim() == 4 else (tensor.stride(0), 0, *tensor.stride()[1:])
    pointer = f"{name}_{str(tensor.dtype).removeprefix('torch.')}"
    function = ctypes.CFUNCTYPE(None)(ctypes.c_void_p.in_dll(kernels, pointer).value)
    types = {bool: ctypes.c_bool, int: ctypes.c_int64, float: ctypes.c_double}
    converted = [
        types[type(a)](a) if type(a) in types else ctypes.c_void_p(a.data_ptr())
        for a in (tensor, *arguments)
    ]
    function(sizes, (ctypes.c_int64 * 4)(*strides), *converted)


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
        for columns in (0, 5):  # of a block: as many as fit into shared memory, or few
            out = nans(*x.shape, dtype=dtype)
            call(kernels, "backward_at", case, grad.to(dtype), windows, len(windows), out, columns)
            torch.testing.assert_close(out, expected_grad.to(dtype))


def test_rows_without_windows_get_no_gradient(kernels):
    """One window of two images, whose masks reach a part of the rows and of the columns."""
    case = (2, 3, 20, 24, 2)
    windows = torch.tensor([[1, 7, 9]])
    x = random(2, 9, 20, 24, dtype=torch.float32).requires_grad_()
    grad = random(1, 6, 6, dtype=torch.float32, seed=2)
    expected = reference.swap_align2nat_at(x, windows, 2, PAD)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    out = nans(*x.shape, dtype=torch.float32)
    call(kernels, "backward_at", case, grad, windows, 1, out, 0)
    torch.testing.assert_close(out, expected_grad)
    assert (out != 0).float().mean() < 0.05


def test_windows_outside_of_the_grid_read_padding_and_get_no_gradient(kernels):
    case = (1, 3, 7, 9, 2)
    windows = torch.tensor([[-1, 0, 0], [1, 0, 0], [0, -1, 0], [0, 4, 0], [0, 0, -9], [0, 0, 5]])
    x, masks = random(1, 9, 7, 9), nans(6, 6, 6)
    call(kernels, "forward_at", case, x, windows, 6, masks, PAD)
    assert (masks == PAD).all()
    out = nans(*x.shape)
    call(kernels, "backward_at", case, random(6, 6, 6), windows, 6, out, 0)
    assert (out == 0).all()


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
    out = torch.full((expected.numel() + 64,), 255, dtype=torch.uint8)
    function = ctypes.CFUNCTYPE(None)(ctypes.c_void_p.in_dll(kernels, f"paste_{dtype}").value)
    numbers = (len(masks), largest, rows, *size)
    function(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (values, layout, boxes)),
        *map(ctypes.c_int64, numbers),
        ctypes.c_void_p(out.data_ptr()),
    )
    pasted, behind = out.split([expected.numel(), 64])
    assert (behind == 255).all()
    assert pasted.max() <= 1
    assert torch.equal(pasted.view(expected.shape) == 1, expected)
