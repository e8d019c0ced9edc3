"""How worker processes of a loader handle signals: they live as long as training needs them."""

import multiprocessing
import os
import signal
import threading

_CHECK_INTERVAL = 1.0  # seconds between two looks whether the training process is alive


def leave_signals_to_parent(worker_id: int) -> None:
    """Make a worker ignore stop signals from outside; a `worker_init_fn` of `DataLoader`.

    Ctrl-C reaches every process of a terminal, and a scheduler's SIGTERM every process of a job. A
    worker that dies of it ends the iteration that training wants to finish. So SIGINT is ignored,
    and SIGTERM is obeyed only if the training process has sent it, where the system tells the
    sender (not on macOS).

    The worker ends when its training process is gone. (PyTorch's own watchdog does not see that
    while a batch waits in the pipe, which the other workers keep open.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        parent = multiprocessing.parent_process()  # not the fork server, if that has started it
        sender = os.getppid() if parent is None or parent.pid is None else parent.pid
        threading.Thread(target=_wait_for_parent, args=(sender,), daemon=True).start()


def _wait_for_parent(sender: int) -> None:
    parent = os.getppid()
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, _CHECK_INTERVAL)
        if received is not None and received.si_pid == sender:
            break
    os._exit(0)
