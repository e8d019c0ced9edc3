"""Worker processes: order of the batches, and every way in which they can fail."""

import faulthandler
import gc
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.utils.data import get_worker_info

from tensormask.data import loader, prefetch
from tensormask.data.loader import BatchLoader
from tensormask.data.prefetch import WorkerBatches
from tensormask.utils.errors import UserError

NAMES = r"NUM_WORKERS.*/dev/shm.*ulimit -n"


class Unpicklable(Exception):
    """Its constructor does not take what its copy is made from."""

    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


class Samples:
    """Sample `key`, after what `failures` does for that key."""

    def __init__(self, failures=None, size=3):
        self.failures = failures or {}
        self.size = size

    def __getitem__(self, key):
        extra = {"key": key, "image": torch.full((self.size,), key % 256, dtype=torch.uint8)}
        if key in self.failures:
            extra["more"] = FAILURES[self.failures[key]]()
        return extra


def raise_unpicklable():
    raise Unpicklable(1, 2)


def raise_user_error():
    raise UserError("what the user sees")


FAILURES = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "bus": lambda: (faulthandler.disable(), os.kill(os.getpid(), signal.SIGBUS)),
    "exit": lambda: os._exit(0),
    "sys.exit": lambda: sys.exit(3),
    "close": lambda: os.closerange(3, 1000),
    "sleep": lambda: time.sleep(1000),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "lambda": lambda: lambda: None,
    "user": raise_user_error,
    "unpicklable": raise_unpicklable,
    "worker": get_worker_info,
}


def keys_of(batches):
    return [[sample["key"] for sample in batch] for batch in batches]


def open_files():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _everything_ends():
    threads = threading.active_count()
    yield
    gc.collect()
    assert multiprocessing.active_children() == []
    assert threading.active_count() == threads


@pytest.mark.parametrize(("num_batches", "num_workers"), [(0, 2), (1, 3), (7, 2), (6, 3)])
def test_the_order_is_that_of_one_process(num_batches, num_workers):
    keys = [[3 * i, 3 * i + 1] for i in range(num_batches)]
    batch_loader = BatchLoader(Samples(), keys, num_workers=num_workers)
    for _ in range(2):  # it can be iterated again
        assert keys_of(batch_loader) == keys == keys_of(BatchLoader(Samples(), keys))
    assert len(batch_loader) == num_batches
    batches = iter(batch_loader)
    assert len([*batches]) == num_batches
    assert next(batches, None) is None


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        ("kill", UserError, rf"Worker process 1 .*killed by SIGKILL.*memory.*{NAMES}"),
        ("bus", UserError, rf"killed by SIGBUS.*/dev/shm.*{NAMES}"),
        ("exit", UserError, rf"ended with exit code 0.*{NAMES}"),
        ("sys.exit", UserError, "ended with exit code 3"),
        ("close", UserError, "Worker process 1 "),
        ("lambda", UserError, "cannot be sent from a worker process: .*lambda.*NUM_WORKERS 0"),
        ("user", UserError, "^what the user sees$"),
        ("unpicklable", RuntimeError, "^Unpicklable: 1 2$"),
    ],
)
def test_a_worker_that_fails_ends_the_iteration(failure, error, message):
    before = open_files()
    batches = WorkerBatches(Samples({5: failure}), [[i] for i in range(100)], num_workers=2)
    start = time.monotonic()
    with pytest.raises(error, match=message) as caught:
        list(batches)
    assert time.monotonic() - start < 30
    assert "\n" not in str(caught.value)
    assert next(batches, None) is None
    del caught, batches
    assert open_files() == before


@pytest.mark.parametrize("size", [10, 5_000_000])  # waiting for work; in the middle of a batch
def test_a_worker_that_is_killed_from_outside(size):
    batches = WorkerBatches(Samples(size=size), [[i] for i in range(10_000)], num_workers=3)
    next(batches)
    os.kill(batches._processes[1].pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"Worker process 1 .*SIGKILL"):
        list(batches)


@pytest.mark.parametrize("failure", ["sleep", "stop"])
def test_no_batch_is_a_warning_and_then_an_error(failure, monkeypatch, caplog):
    # At key 4, the worker has sent batch 0: it sends one batch while it reads the next.
    batches = WorkerBatches(Samples({4: failure}), [[i] for i in range(10)], num_workers=2)
    assert keys_of([next(batches), next(batches)]) == [[0], [1]]
    monkeypatch.setattr(prefetch, "_WARNING_AFTER", 0.1)
    monkeypatch.setattr(prefetch, "_CHECK_INTERVAL", 0.1)
    monkeypatch.setattr(prefetch, "_TIME_TO_END", 0.5)
    batches._timeout = 0.5
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="TIMEOUT.*" + NAMES):
        list(batches)
    (record,) = [r for r in caplog.records if r.name == prefetch.__name__]
    assert record.getMessage().startswith("No batch came from the data loader for 0 s; 0.5 s are")
    assert "/dev/shm" in record.getMessage()
    assert next(batches, None) is None


def test_workers_end_with_their_iterator_and_while_they_are_waited_for():
    batches = WorkerBatches(Samples(size=5_000_000), [[i] for i in range(99)], num_workers=2)
    next(batches)
    batches.close()
    assert next(batches, None) is None
    batches = WorkerBatches(Samples({0: "sleep"}), [[0]], num_workers=1)
    del batches  # the fixture looks for processes and threads


def test_pytorch_knows_the_worker():
    batches = WorkerBatches(Samples({1: "worker"}), [[0], [1]], num_workers=2)
    infos = [sample.get("more") for batch in batches for sample in batch]
    assert (infos[1].id, infos[1].num_workers) == (1, 2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pinned_memory(num_workers, monkeypatch):
    devices = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    for module in (prefetch, loader):
        monkeypatch.setattr(module, "pin", lambda batch: [("pinned", s["key"]) for s in batch])
    batches = BatchLoader(Samples(), [[1], [2]], num_workers=num_workers, pin_memory=True)
    assert list(batches) == [[("pinned", 1)], [("pinned", 2)]]
    assert devices == ([1] if num_workers else [])  # of the thread, once


def test_limits_of_the_machine(monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard - 1, hard))
        assert keys_of(WorkerBatches(Samples(), [[1]], num_workers=1)) == [[1]]
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def refuse(*sockets):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(prefetch.socket, "socketpair", refuse)
    with pytest.raises(UserError, match=f"Too many open files.*{NAMES}"):
        WorkerBatches(Samples(), [[1]], num_workers=2)


SCRIPT = """
import multiprocessing, resource, sys
from tests.data.test_prefetch import Samples, keys_of
from tensormask.data.packed import PackedList
from tensormask.data.prefetch import WorkerBatches
from tensormask.utils.errors import UserError

class Packed(Samples):
    items = None
    def __getitem__(self, key):
        return {"key": self.items[key], "image": None}

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    samples = Packed()
    samples.items = PackedList(range(100))
    print(keys_of(WorkerBatches(samples, [[1, 2], [3], [4]], num_workers=2)))
    samples.mapper = lambda sample: sample
    try:
        WorkerBatches(samples, [[0]], num_workers=1)
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_start_methods(method, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", method]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = ended.stdout.splitlines()
    assert lines[0] == "[[1, 2], [3], [4]]", ended.stderr
    assert "cannot be sent to a worker process" in lines[1]
