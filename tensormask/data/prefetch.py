"""Batches that the worker processes of a `DataLoader` load ahead, and what can go wrong with them.

A worker hands over a batch as one `bytes` object (see `transport`). A thread of the training
process receives and unpacks the batches and keeps one ready. So a worker that dies or stops in the
middle of a batch blocks the thread, and not the training process, which waits with a time limit.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import pickle
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.pin_memory import pin_memory as pin

from tensormask.data import transport
from tensormask.data.workers import leave_signals_to_parent
from tensormask.utils.errors import UserError, shorten

if sys.platform != "win32":
    import resource

logger = logging.getLogger(__name__)

_WARNING_AFTER = 60.0  # seconds without a batch
_DEAD_AFTER = 10.0  # seconds without a batch until a worker that has ended is an error
_CHECK_INTERVAL = 1.0  # seconds between two looks at the time and the workers
_TIME_TO_END = 5.0  # seconds until a worker that does not end is killed
# Iterators of loaders that have failed, kept to the end of the process: PyTorch, when it deletes
# one, waits for locks, which a worker that was killed may hold for ever.
_failed: list[Any] = []
_CAUSES = {
    "SIGKILL": ", as systems do if memory runs out",
    "SIGBUS": ", as systems do if /dev/shm or a disk with a mapped file is full",
}


class BatchLoader:
    """Batches of a data set, lists of samples, in the order of `batches`.

    Each iteration starts its own worker processes, with the default start method of
    `multiprocessing`. They end after the last batch or an error, or when the iterator is not
    referenced. 0 workers read in this process.

    Args:
        dataset: gives a sample for a key; sent to each worker that is not forked.
        batches: the keys of each batch; a collection, or endless.
        timeout: seconds without a batch from the workers until an error; 0 for none.
        pin_memory: move the tensors to pinned memory.

    Raises:
        UserError: by `iter`, the workers cannot be started. By `next`, a worker has died, no batch
            came for `timeout` seconds, or a sample cannot be sent.
        Exception: by `next`, of the data set. The message includes the worker's traceback.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: Iterable[list[Any]],
        *,
        num_workers: int = 0,
        timeout: float = 0.0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.batches = batches
        self.num_workers = num_workers
        self.timeout = timeout
        self.pin_memory = pin_memory

    def __len__(self) -> int:
        if not isinstance(self.batches, Sized):
            raise TypeError("this loader has no end")
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Any]]:
        if not self.num_workers:
            batches = ([self.dataset[key] for key in keys] for keys in self.batches)
            return map(pin, batches) if self.pin_memory else batches
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.batches,
            num_workers=self.num_workers,
            collate_fn=_pack,
            worker_init_fn=leave_signals_to_parent,
            # Without a generator, the loader draws a number from torch's global one, which would
            # change later draws.
            generator=torch.Generator(),
        )
        device = torch.cuda.current_device() if self.pin_memory else None
        iterator = _iterate(loader, self.timeout, device)
        next(iterator)  # starts the workers
        return iterator


def _pack(samples: list[Any]) -> bytes:
    try:
        return transport.pack(samples)
    except MemoryError:
        raise
    except Exception as error:
        message = (
            f"A sample cannot be sent from a worker process: {shorten(str(error), 200)}. Return "
            "tensors, arrays and plain values from the mapper, or set DATALOADER.NUM_WORKERS 0"
        )
        return transport.pack(UserError(message))


def _iterate(loader: DataLoader, timeout: float, device: int | None) -> Iterator[Any]:
    """Yield None when the workers are started, and then the batches."""
    _raise_open_files_limit()
    ready: queue.Queue[Any] = queue.Queue(maxsize=1)
    stopped = threading.Event()
    thread = threading.Thread(target=_receive, args=(loader, ready, stopped, device), daemon=True)
    workers: list[BaseProcess] = []
    try:
        thread.start()
        workers = _started(ready.get(), loader.num_workers)
        yield None
        yield from iter(lambda: _wait(ready, workers, timeout), None)
    finally:
        stopped.set()
        with contextlib.suppress(queue.Empty):
            ready.get_nowait()  # for which the thread may wait
        thread.join(_TIME_TO_END)  # The workers end with the thread.
        for worker in workers:
            with contextlib.suppress(RuntimeError):  # of PyTorch, about the end of the worker
                worker.kill()
                worker.join()


def _receive(
    loader: DataLoader, ready: queue.Queue[Any], stopped: threading.Event, device: int | None
) -> None:
    """Put the list of workers, the batches, and an exception or None into `ready`.

    Args:
        device: the GPU for which memory is pinned; None does not pin.
    """
    batches = None
    try:
        # In this thread, PyTorch installs no handler of SIGCHLD, which would raise the death of a
        # worker anywhere in the training process.
        others = multiprocessing.active_children()
        batches = iter(loader)
        ready.put([each for each in multiprocessing.active_children() if each not in others])
        if device is not None:
            torch.cuda.set_device(device)  # of this thread; else pinning would start GPU 0
            torch.set_num_threads(1)  # of this thread: copies leave the cores to training
        for data in batches:
            batch = transport.unpack(data)
            ready.put(batch if device is None or isinstance(batch, Exception) else pin(batch))
            del batch, data  # their memory
            if stopped.is_set():
                return
        ready.put(None)
    except Exception as error:
        _failed.append(batches)  # the error refers to it
        ready.put(error)


def _started(workers: list[BaseProcess] | Exception, num_workers: int) -> list[BaseProcess]:
    """Return the workers, or raise the error of their start."""
    if not isinstance(workers, Exception):
        return workers
    reason = shorten(str(workers), 200)
    if isinstance(workers, OSError):
        raise UserError(
            f"The worker processes of the data loader cannot be started: {reason}. "
            f"{_advice(num_workers)}"
        ) from workers
    if isinstance(workers, (pickle.PicklingError, AttributeError, TypeError)):
        raise UserError(
            f"The data set or the mapper cannot be sent to a worker process: {reason}. "
            "Define the mapper at the top level of a module, or set DATALOADER.NUM_WORKERS 0"
        ) from workers
    raise workers


def _wait(ready: queue.Queue[Any], workers: Sequence[BaseProcess], timeout: float) -> Any:
    """Return the next batch, or None after the last."""
    start, warned = time.monotonic(), False
    while True:
        with contextlib.suppress(queue.Empty):
            received = ready.get(timeout=_CHECK_INTERVAL)
            if isinstance(received, Exception):
                _raise_death(workers, received)
                raise received
            return received
        waited = time.monotonic() - start
        if waited >= _DEAD_AFTER:
            _raise_death(workers)
        if 0 < timeout <= waited:
            raise UserError(
                f"No batch came from the data loader for {waited:.0f} s (DATALOADER.TIMEOUT), "
                f"although its worker processes are alive. {_advice(len(workers))}"
            )
        if waited >= _WARNING_AFTER and not warned:
            warned = True
            logger.warning(
                "No batch came from the data loader for %.0f s; %s (DATALOADER.TIMEOUT). %s",
                waited,
                f"{timeout:g} s are an error" if timeout else "waiting for ever",
                _advice(len(workers)),
            )


def _raise_death(workers: Sequence[BaseProcess], cause: Exception | None = None) -> None:
    """Raise UserError if a worker has ended."""
    for worker in workers:
        code = worker.exitcode
        if code is None:
            continue
        how = f"ended with exit code {code}"
        if code < 0:
            names = {int(s): s.name for s in signal.Signals}
            name = names.get(-code, f"signal {-code}")
            how = f"was killed by {name}{_CAUSES.get(name, '')}"
        raise UserError(
            f"Worker process {worker.pid} of the data loader {how}. {_advice(len(workers))}"
        ) from cause


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
