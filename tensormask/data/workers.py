"""What the processes that read images do about signals: they stay while training needs them."""

import os
import signal
import threading


def outlive_signals(worker_id: int) -> None:
    """A `worker_init_fn`: leave it to the training process when this one ends.

    Ctrl-C goes to every process of a terminal and a scheduler's SIGTERM to every one of a job, and
    a worker that dies of it takes the iteration with it that training wants to finish. So SIGINT
    is ignored, and SIGTERM is obeyed from the training process only, where the system says who has
    sent it (not on macOS). PyTorch's own watch ends workers whose training process is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(training: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != training:
        pass
    os._exit(0)
