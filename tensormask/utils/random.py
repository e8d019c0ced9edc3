"""Seeds and states of the global random generators, and the choice of deterministic algorithms."""

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from tensormask.utils.errors import UserError

logger = logging.getLogger(__name__)


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch, including those of all GPUs."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the global one)
    torch.manual_seed(seed)


def set_determinism(*, deterministic: bool, benchmark: bool) -> None:
    """Choose between deterministic algorithms and the fastest ones on a GPU.

    On the CPU, results are deterministic in both cases.

    Args:
        deterministic: let PyTorch use deterministic algorithms only, and raise for an operation
            without one.
        benchmark: let cuDNN time its algorithms on each new input size; the next run may choose
            other ones.

    Raises:
        UserError: both are True.
    """
    if deterministic and benchmark:
        raise UserError(
            "DETERMINISTIC and CUDNN_BENCHMARK are both on, but cuDNN's benchmark chooses "
            "algorithms by their measured time: set one of them to False"
        )
    if deterministic:
        # cuBLAS reads this when it starts, and then uses workspaces of fixed sizes.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        logger.info(
            "DETERMINISTIC: on a GPU, scattered sums, bilinear resizing and cuDNN use slower "
            "algorithms, and an operation without a deterministic algorithm raises an error; on "
            "the CPU, PyTorch only fills new memory"
        )
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = benchmark


def get_random_states() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and PyTorch's global generators as plain data."""
    state = np.random.get_state(legacy=True)  # noqa: NPY002 (the global one)
    assert isinstance(state, tuple)
    name, keys, position, has_gauss, cached = state
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Restore the states that `get_random_states` returned.

    The states of GPUs are ignored if this machine has another number of GPUs.
    """
    random.setstate(states["python"])
    name, keys, position, has_gauss, cached = states["numpy"]
    numpy_state = (name, keys.numpy().astype(np.uint32), position, has_gauss, cached)
    np.random.set_state(numpy_state)  # noqa: NPY002 (the global one)
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


@contextmanager
def preserved_random_states() -> Iterator[None]:
    """Run a block, then restore the states of the global generators.

    Example:
        >>> seed_everything(0)
        >>> with preserved_random_states():
        ...     inside = torch.rand(())
        >>> bool(torch.rand(()) == inside)
        True
    """
    states = get_random_states()
    try:
        yield
    finally:
        set_random_states(states)
