"""A list of Python objects in one buffer, which worker processes share instead of copying.

Forked workers copy the objects of a plain list even if they only read them: reading changes an
object's reference count, which writes to its page of memory. The bytes of a buffer have no counts.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterable, Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)


class PackedList(Sequence):
    """An immutable list that stores its items pickled in a uint8 tensor.

    Each access unpickles a new object. Forked workers inherit the tensors, and spawned workers
    receive them through shared memory, or a copy each if it is full.

    Example:
        >>> packed = PackedList([{"a": 1}, "b"])
        >>> len(packed), packed[-1]
        (2, 'b')
    """

    def __init__(self, items: Iterable[Any]) -> None:
        buffer = bytearray()
        ends = [0]
        for item in items:
            buffer += pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL)
            ends.append(len(buffer))
        # A tensor cannot use an empty bytearray as its memory.
        self._buffer = torch.frombuffer(buffer or bytearray(1), dtype=torch.uint8)
        self._ends = torch.tensor(ends)

    def __getstate__(self) -> dict[str, Any]:
        # As PyTorch does for each tensor that is sent to a process, except for the error.
        if get_spawning_popen() is not None:
            try:
                for tensor in vars(self).values():
                    tensor.share_memory_()
            except RuntimeError as error:
                logger.warning("Each worker process gets a copy of the annotations: %s", error)
                return {name: tensor.numpy() for name, tensor in vars(self).items()}
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: torch.as_tensor(value) for name, value in state.items()})

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for a list of {len(self)} items")
        index %= len(self)
        start, end = self._ends[index : index + 2].tolist()
        return pickle.loads(np.asarray(self._buffer[start:end]).data)
