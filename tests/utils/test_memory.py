"""Errors that mean out of memory become one that says so; freed memory is returned."""

import ctypes
import errno
import os

import cv2
import numpy as np
import pytest
import torch

from tensormask.commands.benchmark import _status_kib
from tensormask.utils.memory import (
    OutOfMemory,
    explain_out_of_memory,
    is_out_of_memory,
    return_freed_memory,
)

CPU = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"
ERRORS = [
    MemoryError(),
    np._core._exceptions._ArrayMemoryError((2**40,), np.dtype("f4")),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\nmore lines"),
    RuntimeError(CPU),
    RuntimeError("[...] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("could not create a primitive"),  # oneDNN, of a convolution
    RuntimeError("could not create a memory object"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("MPS backend out of memory (MPS allocated: 6.7 GB"),
    cv2.error("OpenCV(5.0) alloc.cpp: error: (-4:Insufficient memory) Failed to allocate 9 bytes"),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__}")
def test_errors_of_all_allocators(error):
    assert is_out_of_memory(error)
    wrapped = ValueError("an image cannot be read")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)
    with pytest.raises(OutOfMemory) as caught, explain_out_of_memory("a test", "Lower it."):
        raise error
    assert str(caught.value).startswith("Out of memory in a test (")
    assert str(caught.value).endswith("). Lower it.")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not match"),
        RuntimeError("could not create a primitive descriptor for a convolution"),
        ValueError("out of memory lane is not a class"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        KeyError("memory"),
    ],
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, explain_out_of_memory("a test", "Lower it."):
        raise error
    assert caught.value is error


def test_memory_of_the_failed_functions_is_free_again():
    class Large:
        alive = 0

        def __init__(self):
            Large.alive += 1

        def __del__(self):
            Large.alive -= 1

    def fails():
        activations = [Large() for _ in range(3)]
        raise MemoryError(len(activations))

    with pytest.raises(OutOfMemory) as caught, explain_out_of_memory("a test", ""):
        fails()
    assert isinstance(caught.value.__cause__, MemoryError)  # it refers to the failed functions
    assert Large.alive == 0


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_freed_memory_is_returned() -> None:
    blocks = [np.ones(60_000, np.uint8) for _ in range(2000)]  # 120 MB, not mapped one by one
    kept = blocks[::50]
    del blocks
    before = _status_kib("VmRSS")
    return_freed_memory()
    assert _status_kib("VmRSS") < before - 80_000
    assert all(block.all() for block in kept)
