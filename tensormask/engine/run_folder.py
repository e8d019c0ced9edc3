"""The folder of a run: one process at a time, no leftovers, and a record of what ran there."""

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
from tensormask.utils import env
from tensormask.utils.errors import UserError
from tensormask.utils.files import remove_leftovers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK = ".lock"
ENVIRONMENT = "environment.txt"


@contextmanager
def lock_folder(output_dir: str | Path) -> Iterator[None]:
    """Keep other runs out of `output_dir` while the block runs, and clear what dead ones left.

    Of several processes of a run, rank 0 holds the lock. The kernel lets go of it however the
    process ends. It is of this process alone: its workers, which may outlive it for seconds, do not
    hold it (`flock` would have them).

    Raises:
        ValueError: another process has the folder.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if not is_main_process():
        yield
        return
    if fcntl is None:
        logger.warning("This system has no file locks: see to it that no other run writes here")
        yield
        return
    # Open for writing, as the lock demands, and without emptying what the holder has written.
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
            logger.info("Removed what a killed run left: %s", ", ".join(leftovers))
        yield


def record_environment(output_dir: str | Path) -> None:
    """Append to `environment.txt` when and how this run was started, by which code, on what."""
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
    """The commit of the code in `folder`, and the files that differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.rstrip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = [line[3:] for line in git("status", "--porcelain", "-uno").splitlines()]
    except (OSError, subprocess.SubprocessError):
        return "no repository, or no git"
    return commit + (f", changed: {', '.join(changed)}" if changed else ", nothing changed")
