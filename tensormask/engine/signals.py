"""SIGTERM and SIGINT: a run saves and leaves; told twice, it leaves at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tensormask.engine.distributed import any_rank, get_world_size

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingStopped(BaseException):
    """A signal asks to leave. Like KeyboardInterrupt no `Exception`: nothing shall swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopSignals:
    """While it is entered, the first SIGTERM or SIGINT asks the run to stop.

    It is followed where the run calls `check`, or in the middle of an `interruptible` block, which
    must not change what is to be saved. The second signal finds the system's own handler, which
    ends the process wherever it is.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._interruptible = False
        self._previous = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # others get no signals
            self._previous = {number: signal.signal(number, self._take) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        self.received = number
        # Not by print or the log, which may be in the middle of a line of their own.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving and leaving; once more to leave at once\n".encode())
        if self._interruptible:
            raise TrainingStopped(number)

    def check(self) -> None:
        """Raise TrainingStopped if a signal has come.

        Several processes must call this together: a signal to any of them stops all.
        """
        if any_rank(self.received is not None):
            raise TrainingStopped(self.received or signal.SIGTERM)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise TrainingStopped as soon as a signal comes, unless other processes wait for us."""
        if get_world_size() > 1:
            yield
            return
        try:
            self._interruptible = True
            self.check()
            yield
        except Exception as error:
            if self.received is None:
                raise
            raise TrainingStopped(self.received) from error  # a library made its own error of it
        finally:
            self._interruptible = False
