"""SIGTERM and SIGINT: at once, at the end of a step, and twice."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from fork import CONTEXT

from tensormask.data.workers import leave_signals_to_parent
from tensormask.engine.signals import StopSignals, TrainingStopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_raises_and_handlers_come_back(number, capfd):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(TrainingStopped, match=number.name) as caught, StopSignals() as stop:  # noqa: PT012
        with stop.interruptible():
            try:
                os.kill(os.getpid(), number)
                time.sleep(5)
            except Exception:
                pytest.fail("caught by an except clause")
    assert caught.value.exit_code == 128 + number
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    assert f"{number.name}: saving, then stopping" in capfd.readouterr().err


def test_a_step_is_completed_first():
    finished = []
    with pytest.raises(TrainingStopped), StopSignals() as stop:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        finished.append(1)
        stop.check()
        finished.append(2)
    assert finished == [1]


def test_an_earlier_signal_stops_an_interruptible_block():
    with pytest.raises(TrainingStopped), StopSignals() as stop:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        with stop.interruptible():
            pytest.fail("entered")


def test_an_error_of_a_library_after_a_signal_is_a_stop_and_others_are_errors():
    with pytest.raises(TrainingStopped), StopSignals() as stop:  # noqa: PT012
        with stop.interruptible():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            finally:
                raise RuntimeError("of the cleaning up")
    with pytest.raises(RuntimeError), StopSignals() as stop:
        with stop.interruptible():
            raise RuntimeError("a bug")


def test_another_thread_installs_no_handlers():
    entered = []

    def enter():
        with StopSignals():
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [True]


def run_until_killed(entered):
    with StopSignals():
        entered.set()
        for _ in range(600):
            time.sleep(0.1)


def test_the_second_signal_ends_the_process_in_the_middle_of_a_step():
    entered = CONTEXT.Event()
    process = CONTEXT.Process(target=run_until_killed, args=(entered,))
    process.start()
    assert entered.wait(30)
    os.kill(process.pid, signal.SIGTERM)
    process.join(0.3)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == -signal.SIGINT


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="unknown senders of signals")
def test_a_worker_obeys_its_training_process_only():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        leave_signals_to_parent(0)
        os.write(writing, b".")
        while True:
            time.sleep(0.01)
    os.read(reading, 1)
    os.kill(child, signal.SIGINT)
    stranger = f"import os; os.kill({child}, {int(signal.SIGTERM)})"
    subprocess.run([sys.executable, "-c", stranger], check=True)
    time.sleep(0.05)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == 0
