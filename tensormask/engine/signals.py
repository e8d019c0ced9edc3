"""SIGTERM and SIGINT: the first signal saves and stops a run, the second stops it at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tensormask.engine.distributed import any_rank, get_world_size

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingStopped(BaseException):
    """A signal stops the run. Not an `Exception`, as KeyboardInterrupt: no code may swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopSignals:
    """A context in which the first SIGTERM or SIGINT requests a stop.

    The stop happens when the run calls `check`, or at once in an `interruptible` block, which must
    not change the state to be saved. The second signal has the system's default handler, which ends
    the process immediately.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._interruptible = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # the only one with handlers
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        self.received = number
        # Not by print or logging, which a signal can interrupt in the middle of a line.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving, then stopping; repeat to stop at once\n".encode())
        if self._interruptible:
            raise TrainingStopped(number)

    def check(self, by_any_rank: bool | None = None) -> None:
        """Raise TrainingStopped if any rank has received a signal; all ranks must call this.

        ``by_any_rank`` says it, if all ranks know it already. A single process looks again.
        """
        if by_any_rank is None or get_world_size() == 1:
            by_any_rank = any_rank(self.received is not None)
        if by_any_rank:
            raise TrainingStopped(self.received or signal.SIGTERM)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise TrainingStopped as soon as a signal arrives, unless there are several ranks."""
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
            raise TrainingStopped(self.received) from error  # a library changed it
        finally:
            self._interruptible = False
