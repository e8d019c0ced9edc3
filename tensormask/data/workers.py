"""What the processes that read pictures do about signals: they stay while training needs them."""

import os
import signal
from types import FrameType


def outlive_signals(worker_id: int) -> None:
    """A `worker_init_fn`: leave it to the training process when this one ends.

    Ctrl-C goes to every process of a terminal and a scheduler's SIGTERM to every one of a job, and
    a worker that dies of it takes the iteration with it that training wants to finish. So SIGINT
    is ignored, and so is the first SIGTERM; the second one, as Python sends it to workers that are
    left at its end, is obeyed. PyTorch's own watch ends workers whose training process is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _wait_for_another)


def _wait_for_another(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(0)
