"""How worker processes of a loader handle signals: they live as long as training needs them."""

import os
import signal
import threading


def leave_signals_to_parent(worker_id: int) -> None:
    """Make a worker ignore stop signals from outside; a `worker_init_fn` of `DataLoader`.

    Ctrl-C reaches every process of a terminal, and a scheduler's SIGTERM every process of a job. A
    worker that dies of it ends the iteration that training wants to finish. So SIGINT is ignored,
    and SIGTERM is obeyed only if the training process has sent it, where the system tells the
    sender (not on macOS). PyTorch's own watchdog ends a worker whose training process is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
