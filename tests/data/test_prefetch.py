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
from pathlib import Path

import pytest
import torch
from fork import CONTEXT
from torch.utils.data import dataloader

from tensormask.data import prefetch
from tensormask.data.prefetch import BatchLoader
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
            time.sleep(0.2)  # The batch before is being sent.
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
    "sleep": lambda: time.sleep(1000),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "lambda": lambda: lambda: None,
    "user": raise_user_error,
    "unpicklable": raise_unpicklable,
}


def keys_of(batches):
    return [[sample["key"] for sample in batch] for batch in batches]


def iterate(failures=None, num_workers=2, num_batches=100, size=3, **options):
    keys = [[i] for i in range(num_batches)]
    return iter(BatchLoader(Samples(failures, size), keys, num_workers=num_workers, **options))


@pytest.fixture(autouse=True)
def _workers_end(monkeypatch):
    monkeypatch.setattr(prefetch, "_CHECK_INTERVAL", 0.1)
    yield
    deadline = time.monotonic() + 10  # a worker that failed ends a little later
    while multiprocessing.active_children():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("num_batches", "num_workers"), [(0, 2), (1, 3), (7, 2)])
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
        ("kill", UserError, rf"^Worker process .*killed by SIGKILL.*memory.*{NAMES}"),
        ("bus", UserError, rf"^Worker process .*killed by SIGBUS.*/dev/shm.*{NAMES}"),
        ("sys.exit", UserError, "^Worker process .*ended with exit code 3"),
        ("lambda", UserError, "^A sample cannot be sent from a.*: .*lambda.*NUM_WORKERS 0"),
        ("user", UserError, "(?s)worker process 1.*what the user sees"),
        ("unpicklable", RuntimeError, "(?s)worker process 1.*Unpicklable: 1 2"),
    ],
)
def test_a_worker_that_fails_ends_the_iteration(failure, error, message, monkeypatch):
    # PyTorch notices a death itself, after 5 s.
    monkeypatch.setattr(prefetch, "_DEAD_AFTER", 100 if failure == "sys.exit" else 0.5)
    monkeypatch.setattr(prefetch, "_TIME_TO_END", 0.1)
    batches = iterate({5: failure})
    with pytest.raises(error, match=message) as caught:
        list(batches)
    assert "\n" not in str(caught.value) or "process 1.\n" in str(caught.value)
    assert next(batches, None) is None


def test_the_loader_of_a_killed_worker_is_never_deleted(monkeypatch):
    """PyTorch would wait for ever for a lock that the worker held when it was killed."""
    deleted_by = []
    loader = dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(
        loader, "__del__", lambda self: deleted_by.append(threading.current_thread())
    )
    monkeypatch.setattr(prefetch, "_TIME_TO_END", 0.1)
    with pytest.raises(UserError, match="SIGKILL"):
        list(iterate({5: "kill"}))
    gc.collect()
    assert deleted_by == []


@pytest.mark.parametrize(
    ("failure", "message"),
    [("kill", "SIGKILL"), ("exit", "exit code 0"), ("stop", "TIMEOUT")],
)
def test_a_batch_of_which_only_a_part_comes(failure, message, monkeypatch):
    monkeypatch.setattr(prefetch, "_DEAD_AFTER", 0.5)
    monkeypatch.setattr(prefetch, "_TIME_TO_END", 0.1)
    batches = iterate({3: failure}, num_workers=1, size=20_000_000, timeout=2)
    time.sleep(1)  # Now batch 2 fills the pipe, because nothing takes batch 0, and key 3 fails.
    with pytest.raises(UserError, match=message):
        list(batches)


@pytest.mark.parametrize("failure", ["sleep", "stop"])
def test_no_batch_is_a_warning_and_then_an_error(failure, monkeypatch, caplog):
    monkeypatch.setattr(prefetch, "_WARNING_AFTER", 0.5)
    monkeypatch.setattr(prefetch, "_TIME_TO_END", 0.1)
    batches = iterate({4: failure}, timeout=1)
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="TIMEOUT.*" + NAMES):
        list(batches)
    (record,) = [r for r in caplog.records if r.name == prefetch.__name__]
    assert record.getMessage().startswith("No batch came from the data loader for 1 s; 1 s are")
    assert "/dev/shm" in record.getMessage()
    assert next(batches, None) is None


def test_workers_and_thread_end_with_their_iterator(monkeypatch):
    threads = set(threading.enumerate())
    batches = iterate(size=5_000_000)
    next(batches)
    del batches
    assert multiprocessing.active_children() == []
    deadline = time.monotonic() + 10  # the thread of a queue ends a little later
    while not set(threading.enumerate()) <= threads:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monkeypatch.setattr(prefetch, "_TIME_TO_END", 0.1)
    batches = iterate({0: "sleep"}, num_workers=1)
    del batches  # the fixture looks for processes


def iterate_and_wait(pids):
    batches = iterate(size=20_000_000)  # The pipe is full.
    pids.send([worker.pid for worker in multiprocessing.active_children()])
    time.sleep(60)
    del batches


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_workers_end_with_a_training_process_that_is_killed():
    receiving, sending = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=iterate_and_wait, args=(sending,))
    process.start()
    workers = receiving.recv()
    time.sleep(0.3)
    process.kill()
    process.join()
    end = time.monotonic() + 20
    while (remaining := [*filter(is_running, workers)]) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in remaining:
        os.kill(pid, signal.SIGKILL)
    assert not remaining


def test_a_death_is_no_exception_anywhere_else():
    """PyTorch's handler of SIGCHLD would raise one in the middle of a step."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    batches = iterate()
    assert signal.signal(signal.SIGCHLD, before) == signal.SIG_DFL
    del batches


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pinned_memory(num_workers, monkeypatch):
    devices = pretend_pinning(monkeypatch)
    batches = BatchLoader(Samples(), [[1], [2]], num_workers=num_workers, pin_memory=True)
    assert list(batches) == [[("pinned", 1)], [("pinned", 2)]]
    assert devices == ([1] if num_workers else [])  # of the thread, once


def pretend_pinning(monkeypatch):
    """Pinning is what shows in the batch. Return the list of devices that get current."""
    devices = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(prefetch, "pin", lambda batch: [("pinned", s["key"]) for s in batch])
    return devices


def test_limits_of_the_machine(monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard - 1, hard))
        assert keys_of(iterate(num_workers=1, num_batches=1)) == [[0]]
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def refuse():
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(torch.multiprocessing, "Queue", refuse)
    with pytest.raises(UserError, match=f"Too many open files.*{NAMES}"):
        iterate()


SCRIPT = """
import multiprocessing, resource, sys
from tests.data.test_prefetch import Samples, keys_of
from tensormask.data.packed import PackedList
from tensormask.data.prefetch import BatchLoader
from tensormask.utils.errors import UserError

class Packed(Samples):
    items = None
    def __getitem__(self, key):
        return {"key": self.items[key], "image": None}

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    samples = Packed()
    samples.items = PackedList(range(100))
    print(keys_of(BatchLoader(samples, [[1, 2], [3], [4]], num_workers=2)))
    samples.mapper = lambda sample: sample
    try:
        iter(BatchLoader(samples, [[0]], num_workers=1))
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_start_methods(method, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", method]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = ended.stdout.splitlines()
    assert lines[0] == "[[1, 2], [3], [4]]", ended.stderr
    assert "cannot be sent to a worker process" in lines[1]
