"""What runs in a worker process of a loader: it reads batches and sends them."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch.utils.data import Dataset
from torch.utils.data._utils import worker as torch_worker

from tensormask.data import transport
from tensormask.utils.errors import UserError, shorten

_CHECK_INTERVAL = 1.0  # seconds between two looks whether the training process is alive


@dataclass
class Failure:
    """An exception of a worker, to be raised in the training process."""

    exception: Exception
    traceback: str

    def raise_again(self) -> NoReturn:
        """Raise the exception, with the worker's traceback as its cause."""
        raise self.exception from RuntimeError(f"in a worker process:\n{self.traceback}")


def work(
    dataset: Dataset,
    batches: Iterable[list[Any]],
    worker_id: int,
    num_workers: int,
    connection: socket.socket,
) -> None:
    """Send each `num_workers`-th batch, starting with batch `worker_id`, and None after the last.

    The next batch is read while one is sent. After an exception, a `Failure` is sent as the last.
    """
    parent = multiprocessing.parent_process()
    leave_signals_to_parent(worker_id, parent.pid if parent else None)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    # For mappers that draw global random numbers or ask PyTorch which worker they are in.
    random.seed(worker_id)
    np.random.seed(worker_id)  # noqa: NPY002 - the legacy state is meant
    torch.manual_seed(worker_id)
    torch_worker._worker_info = torch_worker.WorkerInfo(
        id=worker_id, num_workers=num_workers, seed=worker_id, dataset=dataset
    )
    torch.set_num_threads(1)
    sending: threading.Thread | None = None
    for parts in _iter_messages(dataset, itertools.islice(batches, worker_id, None, num_workers)):
        if sending is not None:
            sending.join()
        sending = threading.Thread(target=_send, args=(connection, parts))
        sending.start()


def _iter_messages(dataset: Dataset, batches: Iterable[list[Any]]) -> Iterable[list[memoryview]]:
    try:
        for keys in batches:
            batch = [dataset[key] for key in keys]
            try:
                parts = transport.pack(batch)
            except MemoryError:
                raise
            except Exception as error:
                raise UserError(
                    f"A sample cannot be sent from a worker process: {shorten(str(error), 200)}. "
                    "Return tensors, arrays and plain values from the mapper, or set "
                    "DATALOADER.NUM_WORKERS 0"
                ) from error
            yield parts
            del batch, parts
        yield transport.pack(None)
    except Exception as error:
        failure = Failure(error, traceback.format_exc())
        try:
            parts = transport.pack(failure)
            transport.unpack(parts)
        except Exception:
            failure.exception = RuntimeError(f"{type(error).__name__}: {error}")
            parts = transport.pack(failure)
        yield parts


def _send(connection: socket.socket, parts: list[memoryview]) -> None:
    try:
        transport.send(connection, parts)
    except OSError:
        os._exit(0)  # The training process has closed its end: nobody wants more batches.


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_CHECK_INTERVAL)
    os._exit(1)


def leave_signals_to_parent(worker_id: int, parent: int | None = None) -> None:
    """Make a worker ignore stop signals from outside: it lives as long as training needs it.

    Ctrl-C reaches every process of a terminal, and a scheduler's SIGTERM every process of a job. A
    worker that dies of it ends the iteration that training wants to finish. So SIGINT is ignored,
    and SIGTERM is obeyed only if the training process has sent it, where the system tells the
    sender (not on macOS).

    Args:
        worker_id: not used; `DataLoader` gives it to its `worker_init_fn`.
        parent: id of the training process; the parent process by default. The parent of a process
            from a fork server is that server.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        sender = os.getppid() if parent is None else parent
        threading.Thread(target=_wait_for_parent, args=(sender,), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
