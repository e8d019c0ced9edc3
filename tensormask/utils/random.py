"""One seed for all randomness, the states of the generators, and deterministic algorithms."""

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
    """Seed the global generators of Python, NumPy and PyTorch, those of all GPUs included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the global one)
    torch.manual_seed(seed)


def set_determinism(*, deterministic: bool, benchmark: bool) -> None:
    """Choose between algorithms that repeat their bits on a GPU and those that are fastest there.

    The CPU repeats its bits in both cases.

    Args:
        deterministic: PyTorch takes algorithms that give the same bits every time, and raises
            where it has none.
        benchmark: cuDNN tries its algorithms on each new input size, and may choose otherwise in
            the next run.

    Raises:
        ValueError: both are asked for.
    """
    if deterministic and benchmark:
        raise UserError(
            "DETERMINISTIC and CUDNN_BENCHMARK are both on, but cuDNN's trials choose by the "
            "clock: set one of them to False"
        )
    if deterministic:
        # cuBLAS reads it when it starts: its workspaces are then of fixed sizes.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        logger.info(
            "DETERMINISTIC: on a GPU, scattered sums and bilinear resizing take slower algorithms, "
            "cuDNN is not free in its choice, and an operation that has no deterministic algorithm "
            "is an error; on the CPU it only fills fresh memory"
        )
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = benchmark


def get_random_states() -> dict[str, Any]:
    """Read the states of Python's, NumPy's and PyTorch's global generators as plain data."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (the global one)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put the global generators into `states`, as `get_random_states` gave them.

    The states of GPUs are left out where this machine has another number of them.
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
    """Run a block whose use of the global generators leaves no trace after it."""
    states = get_random_states()
    try:
        yield
    finally:
        set_random_states(states)
