"""The folder of a run, `OUTPUT_DIR`: its lock, its log file, and a record of what ran in it."""

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from tensormask.engine.distributed import is_main_process
from tensormask.engine.events import log_error, setup_logging
from tensormask.utils import env
from tensormask.utils.errors import UserError
from tensormask.utils.files import remove_leftovers

logger = logging.getLogger(__name__)

LOCK = ".lock"
ENVIRONMENT = "environment.txt"


@contextmanager
def open_output_dir(output_dir: str | Path) -> Iterator[None]:
    """Lock the folder of a run, and log to its `log.txt`, also the error that ends the block.

    Raises:
        UserError: another process uses the folder.
    """
    with lock_output_dir(output_dir):
        if not is_main_process():
            yield
            return
        setup_logging(output_dir)
        try:
            yield
        except Exception as error:
            log_error(error)
            raise


@contextmanager
def lock_output_dir(output_dir: str | Path) -> Iterator[None]:
    """Lock `output_dir` for the block, and remove the leftovers of killed runs.

    Rank 0 of a run holds the lock. The kernel releases it however the process ends. Worker
    processes, which can outlive it for seconds, do not inherit it (as they would with `flock`).

    Raises:
        UserError: another process uses the folder.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if not is_main_process():
        yield
        return
    try:
        import fcntl
    except ImportError:  # Windows
        logger.warning("No file locks on this system: make sure that no other run writes here")
        yield
        return
    # A lock needs a file that is open for writing. It is not truncated: its holder has written it.
    with open(os.open(output_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644), "r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"{output_dir} is in use by {file.read().strip() or 'another process'}: wait for "
                "it, end it, or give another OUTPUT_DIR"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        if leftovers := remove_leftovers(output_dir):
            logger.info("Removed temporary files of a killed run: %s", ", ".join(leftovers))
        yield


def record_environment(output_dir: str | Path) -> None:
    """Append the start of this run to `environment.txt`: time, command, code and versions."""
    lines = [
        f"==== {datetime.now().astimezone().isoformat(timespec='seconds')}",
        f"{'command':<24} {shlex.join([sys.executable, *sys.argv])}",
        f"{'folder':<24} {os.getcwd()}",
        f"{'git':<24} {git_state(Path(__file__).parent)}",
        env.describe(),
    ]
    with open(Path(output_dir) / ENVIRONMENT, "a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n\n")


def git_state(folder: Path) -> str:
    """Return the commit of the code in `folder`, and the names of modified files."""

    def git(*words: str) -> str:
        command, quiet = ["git", "-C", str(folder), *words], subprocess.DEVNULL
        return subprocess.check_output(command, stderr=quiet, text=True, timeout=20).rstrip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = [line[3:] for line in git("status", "--porcelain", "-uno").splitlines()]
    except (OSError, subprocess.SubprocessError):
        return "no repository, or no git"
    return commit + (f", changed: {', '.join(changed)}" if changed else ", no changes")
