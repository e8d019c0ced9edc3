"""Load the compiled op once, at import, and choose between it and plain PyTorch."""

import contextlib
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import torch

from tensormask.layers import build

BACKENDS = ("auto", "native", "reference")
_OP = "tensormask::swap_align2nat"
_NEWEST_OP = "layer_norm"


def _load() -> tuple[Path | None, str]:
    """Return the path of the compiled library, or the reason why it cannot be used."""
    library = build.find_library()
    if library is None:
        return None, f"it is not compiled: run '{build.COMMAND}' (Linux, with a C++ compiler)"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return None, (
            f"{library} does not load with PyTorch {torch.__version__} (it needs PyTorch 2.11 or "
            f"newer, and the kind of machine that it was built on): {error}"
        )
    if not hasattr(torch.ops.tensormask, _NEWEST_OP):
        return None, f"{library} was built from older sources: run '{build.COMMAND}'"
    return library, ""


# At import, because loading in a first call would break the graph of torch.compile.
LIBRARY, REASON = _load()
DEVICES = frozenset(
    key.lower()
    for key in ("CPU", "CUDA", "Meta")
    if LIBRARY and (key == "Meta" or torch._C._dispatch_has_kernel_for_dispatch_key(_OP, key))
)
_DEFAULT = os.environ.get("TENSORMASK_OP", "auto")
_backend = ContextVar("_backend", default=_DEFAULT)
_warned_devices: set[str] = set()


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        names = ", ".join(BACKENDS)
        raise ValueError(f"the backend (TENSORMASK_OP) must be one of {names}, got {backend!r}")


_check_backend(_DEFAULT)


def _chosen() -> str:
    return _backend.get()


if torch.__version__ < "2.14":
    # torch.compile cannot trace a context variable: a compiled function keeps its first choice.
    _chosen = torch.compiler.assume_constant_result(_chosen)


@contextlib.contextmanager
def op_backend(backend: str) -> Iterator[None]:
    """Choose what computes swap_align2nat, convolutions and layer norms in a ``with`` block.

    The choice is that of the running thread and asyncio task; other threads keep their own. The
    environment variable ``TENSORMASK_OP`` chooses for the whole process, where nothing else does. A
    gradient is computed by what computed the result.

    Args:
        backend: "native" for the compiled op, with an error where it is missing; "reference" for
            plain PyTorch with its own convolutions; "auto" for the compiled op where it exists.

    Raises:
        ValueError: another name.

    Example:
        >>> from tensormask.layers import op_backend, swap_align2nat
        >>> with op_backend("reference"):
        ...     swap_align2nat(torch.zeros(1, 9, 4, 4), 2).shape
        torch.Size([1, 36, 2, 2])
    """
    _check_backend(backend)
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


def use_native(device: str) -> bool:
    """Return whether the compiled op computes tensors on a device type; warn once if it cannot.

    Raises:
        RuntimeError: the backend is "native" and the compiled op is missing.
    """
    backend = _chosen()
    if backend == "reference":
        return False
    if device in DEVICES:
        return True
    if backend == "native":
        raise RuntimeError(f"the backend 'native' needs the compiled op, but {why_not(device)}")
    if not torch.compiler.is_compiling() and device not in _warned_devices:
        _warned_devices.add(device)
        logging.getLogger(__name__).warning(
            "swap_align2nat runs in plain PyTorch, slower than compiled: %s", why_not(device)
        )
    return False


def describe(device: str) -> str:
    """Describe in a few words, for logs, what computes swap_align2nat on a device type."""
    reason = why_not(device) or ("the backend is 'reference'" if _chosen() == "reference" else "")
    return f"plain PyTorch: {reason}" if reason else "compiled"


def why_not(device: str) -> str:
    """Return why the compiled op is not available on a device type; empty if it is."""
    if device in DEVICES:
        return ""
    if LIBRARY is None:
        return REASON
    hint = f"; run 'FORCE_CUDA=1 {build.COMMAND}' with a CUDA toolkit" if device == "cuda" else ""
    return f"{LIBRARY} has no kernels for {device}{hint}"
