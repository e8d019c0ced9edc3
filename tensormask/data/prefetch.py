"""Batches that worker processes load ahead: the processes are started, watched and ended here.

Each worker loads every n-th batch and sends it through a socket of its own (see `transport`), so a
worker that dies blocks no other one. A thread of the training process receives the batches in their
order and keeps one ready.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import pickle
import queue
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import Dataset
from torch.utils.data._utils.pin_memory import pin_memory as pin

from tensormask.data import transport
from tensormask.data.workers import Failure, work
from tensormask.utils.errors import UserError, shorten

if sys.platform != "win32":
    import resource

logger = logging.getLogger(__name__)

_WARNING_AFTER = 60.0  # seconds without a batch
_CHECK_INTERVAL = 1.0  # seconds between two looks whether the workers are alive
_TIME_TO_END = 5.0  # seconds until a worker that does not end is killed
_CAUSES = {
    "SIGKILL": ", as systems do if memory runs out",
    "SIGBUS": ", as systems do if /dev/shm or a disk with a mapped file is full",
}


@dataclass
class _Closed:
    """In place of a batch: the worker has closed its connection, or died."""

    worker_id: int


class WorkerBatches(Iterator[list[Any]]):
    """Iterate over batches, lists of samples, that worker processes load ahead.

    The workers are started at once, with the default start method of `multiprocessing`. They are
    ended after the last batch or an error, by `close`, or when the iterator is not referenced.

    Args:
        dataset: gives a sample for a key; sent to each worker that is not forked.
        batches: the keys of each batch; every worker iterates over all of them.
        timeout: seconds without a batch until an error; 0 for none.
        pin_memory: move the tensors to pinned memory.

    Raises:
        UserError: the workers cannot be started. From `next`: a worker has died, no batch came for
            `timeout` seconds, or a sample cannot be sent.
        Exception: from `next`: what a worker has raised.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: Iterable[list[Any]],
        *,
        num_workers: int,
        timeout: float = 0.0,
        pin_memory: bool = False,
    ) -> None:
        _raise_open_files_limit()
        self._timeout = timeout
        self._processes: list[BaseProcess] = []
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=1)
        connections: list[socket.socket] = []
        stopped = threading.Event()
        device = torch.cuda.current_device() if pin_memory else None
        arguments = (connections, self._ready, stopped, device)
        thread = threading.Thread(target=_receive, args=arguments, daemon=True)
        self.close = weakref.finalize(
            self, _stop, os.getpid(), thread, stopped, connections, self._processes
        )
        context = multiprocessing.get_context()
        try:
            for worker_id in range(num_workers):
                ours, theirs = socket.socketpair()
                connections.append(ours)
                with theirs:  # Only the worker has this end from now on: its death closes it.
                    process = context.Process(
                        target=work,
                        args=(dataset, batches, worker_id, num_workers, theirs),
                        daemon=True,
                    )
                    process.start()
                self._processes.append(process)
        except (OSError, pickle.PicklingError, AttributeError, TypeError) as error:
            self.close()
            reason = shorten(str(error), 200)
            if isinstance(error, OSError):
                raise UserError(
                    f"The worker processes of the data loader cannot be started: {reason}. "
                    f"{_advice(num_workers)}"
                ) from error
            raise UserError(
                f"The data set or the mapper cannot be sent to a worker process: {reason}. "
                "Define the mapper at the top level of a module, or set DATALOADER.NUM_WORKERS 0"
            ) from error
        except BaseException:
            self.close()
            raise
        thread.start()

    def __next__(self) -> list[Any]:
        received = self._wait() if self.close.alive else None
        if isinstance(received, list):
            return received
        if isinstance(received, _Closed):
            self._processes[received.worker_id].join(_TIME_TO_END)
            message = self._describe_death(received.worker_id)
            self.close()
            raise UserError(message)
        self.close()
        if isinstance(received, Failure):
            received.raise_again()
        raise StopIteration

    def _wait(self) -> Any:
        """Wait for what `_receive` gives next. A worker that dies meanwhile is `_Closed`."""
        start, warned = time.monotonic(), False
        while True:
            for worker_id, process in enumerate(self._processes):
                if process.exitcode:  # None if it is alive, 0 after its last batch
                    return _Closed(worker_id)
            with contextlib.suppress(queue.Empty):
                return self._ready.get(timeout=_CHECK_INTERVAL)
            waited = time.monotonic() - start
            advice = _advice(len(self._processes))
            if 0 < self._timeout <= waited:
                self.close()
                raise UserError(
                    f"No batch came from the data loader for {waited:.0f} s (DATALOADER.TIMEOUT), "
                    f"although its worker processes are alive. {advice}"
                )
            if waited >= _WARNING_AFTER and not warned:
                warned = True
                logger.warning(
                    "No batch came from the data loader for %.0f s; %s (DATALOADER.TIMEOUT). %s",
                    waited,
                    f"{self._timeout:g} s are an error" if self._timeout else "waiting for ever",
                    advice,
                )

    def _describe_death(self, worker_id: int) -> str:
        process = self._processes[worker_id]
        code = process.exitcode
        how = f"ended with exit code {code}" if code is not None else "closed its connection"
        if code is not None and code < 0:
            names = {int(s): s.name for s in signal.Signals}
            name = names.get(-code, f"signal {-code}")
            how = f"was killed by {name}{_CAUSES.get(name, '')}"
        return (
            f"Worker process {worker_id} of the data loader (process id {process.pid}) {how}. "
            f"{_advice(len(self._processes))}"
        )


def _receive(
    connections: Sequence[socket.socket],
    ready: queue.Queue[Any],
    stopped: threading.Event,
    device: int | None,
) -> None:
    """Move batches from the workers, in turn, to `ready`; the last object there is no batch.

    Args:
        device: the GPU for which memory is pinned; None does not pin.
    """
    if device is not None:
        torch.cuda.set_device(device)  # of this thread; else pinning would start GPU 0
        torch.set_num_threads(1)  # of this thread: copies leave the cores to training
    for worker_id in itertools.cycle(range(len(connections))):
        received: Any
        try:
            received = transport.unpack(transport.receive(connections[worker_id]))
            if device is not None and isinstance(received, list):
                received = pin(received)
        except (OSError, EOFError):
            received = _Closed(worker_id)
        except Exception as error:
            received = Failure(error, traceback.format_exc())
        is_last = not isinstance(received, list)
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(received, timeout=_CHECK_INTERVAL)
                break
        if is_last or stopped.is_set():
            return
        del received  # its memory


def _stop(
    owner: int,
    thread: threading.Thread,
    stopped: threading.Event,
    connections: Sequence[socket.socket],
    processes: Sequence[BaseProcess],
) -> None:
    """End the thread and the workers; called once."""
    if os.getpid() != owner:  # a forked child that has collected its copy of the iterator
        return
    stopped.set()
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # ends `receive`, also in the thread
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _TIME_TO_END
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:  # stopped, or busy in a library
            process.kill()
            process.join()
    if thread.ident is not None and thread is not threading.current_thread():
        thread.join(_TIME_TO_END)
    for connection in connections:
        connection.close()


def _raise_open_files_limit() -> None:
    """Raise the soft limit of open files of this process to the hard one."""
    if sys.platform != "win32":
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):  # macOS refuses "unlimited"
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _advice(num_workers: int) -> str:
    """Say what can be changed, and what the limits of the machine are."""
    try:
        usage = shutil.disk_usage("/dev/shm")
        memory = f"{usage.free / 1e6:.0f} of {usage.total / 1e6:.0f} MB free"
    except OSError:
        memory = "not available"
    files = "unknown"
    if sys.platform != "win32":
        files = str(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    return (
        f"Lower DATALOADER.NUM_WORKERS (now {num_workers}), or set it to 0 to load in this process "
        f"and see its errors. Limits: /dev/shm, {memory}; open files (`ulimit -n`), {files}"
    )
