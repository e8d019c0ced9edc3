"""The compiled op: loaded once, at import; what was found, and why not more."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch

BACKENDS = ("auto", "native", "reference")
_OP = "tensormask::swap_align2nat"
_NEWEST_OP = "winograd_output"


def _load() -> tuple[Path | None, str]:
    """The library beside the package and nothing, or nothing and the reason."""
    package = Path(__file__).parent.parent
    found = sorted(path for path in package.glob("_C*") if path.suffix in (".so", ".pyd"))
    if not found:
        return None, (
            f"no compiled library (_C*.so) in {package}: build it with "
            "'pip install --no-build-isolation --no-deps -e .' in the repository"
        )
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return None, (
            f"{found[0]} does not load under PyTorch {torch.__version__} (it needs 2.11 or newer, "
            f"of the machine it was built for): {error}"
        )
    if not hasattr(torch.ops.tensormask, _NEWEST_OP):
        return None, f"{found[0]} was built from older sources: build it again"
    return found[0], ""


# Before anything is compiled by torch.compile: loading in a first call would break the graph.
LIBRARY, REASON = _load()
DEVICES = frozenset(
    {"meta"}.union(
        key.lower()
        for key in ("CPU", "CUDA")
        if torch._C._dispatch_has_kernel_for_dispatch_key(_OP, key)
    )
    if LIBRARY
    else ()
)
_backend = os.environ.get("TENSORMASK_OP", "auto")
_said: set[str] = set()


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"TENSORMASK_OP must be one of {', '.join(BACKENDS)}, got {backend!r}")


_check_backend(_backend)


@contextlib.contextmanager
def op_backend(backend: str) -> Iterator[None]:
    """Chooses what computes swap_align2nat, and `winograd.conv2d`, within a ``with`` block.

    The environment variable ``TENSORMASK_OP`` chooses for the whole process.

    Args:
        backend: "native" for the compiled op, an error where it is missing; "reference" for plain
            PyTorch, with its own convolutions; "auto" for the compiled op where it is there.

    Raises:
        ValueError: the name is none of these.
    """
    global _backend
    _check_backend(backend)
    before, _backend = _backend, backend
    try:
        yield
    finally:
        _backend = before


def use_native(device: str) -> bool:
    """Whether the compiled op computes tensors on a type of device; says once where it cannot.

    Raises:
        RuntimeError: the compiled op was asked for and is missing.
    """
    if _backend == "reference":
        return False
    if device in DEVICES:
        return True
    if _backend == "native":
        raise RuntimeError(f"the compiled op was asked for ('native'), but {why_not(device)}")
    if not torch.compiler.is_compiling() and device not in _said:
        _said.add(device)
        logging.getLogger(__name__).warning(
            "swap_align2nat runs in plain PyTorch, slower than compiled: %s", why_not(device)
        )
    return False


def describe(device: str) -> str:
    """What computes swap_align2nat on a type of device, in a few words, for logs."""
    reason = why_not(device)
    if reason:
        return f"plain PyTorch: {reason}"
    return "compiled" if _backend != "reference" else "plain PyTorch: it was asked for"


def why_not(device: str) -> str:
    """Why there is no compiled op on a type of device; empty where there is one."""
    if device in DEVICES:
        return ""
    if LIBRARY is None:
        return REASON
    hint = "; build with FORCE_CUDA=1 and a CUDA toolkit" if device == "cuda" else ""
    return f"{LIBRARY} has no kernels for {device}{hint}"
