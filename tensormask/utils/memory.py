"""Errors that mean out of memory, one error that says so, and returning freed memory."""

import ctypes
import errno
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import torch

from tensormask.utils.errors import shorten

# In the messages of PyTorch's CPU, CUDA and MPS allocators, its libraries, OpenCV and the system.
# oneDNN says of a primitive that it has no memory for only that it could not create it.
_MESSAGE = re.compile(
    r"out of memory|(allocate|not enough|insufficient) memory|failed to allocate|alloc_failed"
    r"|bad_alloc|could not (create|execute) a (primitive|memory)(?! desc)",
    re.IGNORECASE,
)


class OutOfMemory(RuntimeError):
    """The memory is not enough; the message names the options that need less."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, means that memory cannot be allocated."""
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError, OutOfMemory)):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, (RuntimeError, OSError, cv2.error)) and _MESSAGE.search(str(error)):
            return True
        error = error.__cause__
    return False


@contextmanager
def explain_out_of_memory(what: str, advice: str) -> Iterator[None]:
    """Re-raise any error of the block that means too little memory as `OutOfMemory`.

    The variables of the failed functions are deleted, so that the memory is free again.

    Args:
        what: the work of the block, for the message.
        advice: the options that need less memory.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        reason = shorten(next(iter(str(error).strip().splitlines()), type(error).__name__), 300)
        traceback.clear_frames(error.__traceback__)
        raise OutOfMemory(f"Out of memory in {what} ({reason}). {advice}") from error


def return_freed_memory() -> None:
    """Return memory of the CPU that is free to the system, where the C library can (glibc).

    Otherwise it keeps what is free between things that are not.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
