"""A list of Python objects in one buffer, which worker processes share instead of copying.

Objects of a list are copied into every worker sooner or later, although nobody writes to them:
each has a reference count, and counting writes to its page of memory. Bytes have none.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch


class PackedList(Sequence):
    """An unchanging list whose items are pickled, one after the other, in a uint8 tensor.

    An item is made anew at each access. As tensors, the buffers are inherited by forked workers
    and handed to spawned ones through shared memory.
    """

    def __init__(self, items: Iterable[Any]) -> None:
        buffer = bytearray()
        ends = [0]
        for item in items:
            buffer += pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL)
            ends.append(len(buffer))
        # An empty bytearray cannot be a tensor's memory.
        self._buffer = torch.frombuffer(buffer or bytearray(1), dtype=torch.uint8)
        self._ends = torch.tensor(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no item {index} in a list of {len(self)}")
        index %= len(self)
        start, end = self._ends[index : index + 2].tolist()
        return pickle.loads(np.asarray(self._buffer[start:end]).data)
