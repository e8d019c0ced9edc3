"""The folder of a run, `OUTPUT_DIR`: its lock, its log file, and a record of what ran in it."""

import itertools
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from tensormask.config import CfgNode
from tensormask.engine.distributed import broadcast_object, is_main_process
from tensormask.engine.events import LOG, METRICS, log_error, setup_logging
from tensormask.engine.resume import LAST_CHECKPOINT
from tensormask.utils import env
from tensormask.utils.errors import UserError
from tensormask.utils.files import expand_home, remove_leftovers, write_atomically

logger = logging.getLogger(__name__)

LOCK = ".lock"
CONFIG = "config.yaml"
ENVIRONMENT = "environment.txt"


class FolderInUseError(UserError):
    """Another process uses the folder of a run."""


@contextmanager
def open_output_dir(output_dir: str | Path, *, new_run: bool = False) -> Iterator[Path]:
    """Lock the folder of a run, and log to its `log.txt`, also the error that ends the block.

    Args:
        new_run: if `output_dir` holds a run or is in use, create and take `<output_dir>_2`, `_3`,
            ... instead. It is removed if the block fails before it writes `config.yaml`.

    Yields:
        The folder, the same in every rank.

    Raises:
        FolderInUseError: another process uses `output_dir`, and it is not a new run.
    """
    output_dir = Path(expand_home(output_dir))
    if output_dir.name in ("", ".."):
        output_dir = output_dir.resolve()
    with ExitStack() as stack:
        folder = output_dir
        if is_main_process() and new_run:
            folder = _lock_new(output_dir, stack)
        elif is_main_process():
            stack.enter_context(lock_output_dir(output_dir))
        folder = broadcast_object(folder)
        if not is_main_process():
            yield folder
            return
        setup_logging(folder)
        if folder != output_dir:
            logger.info(
                "%s holds another run, so this run is in %s (--resume continues the other one, "
                "--overwrite replaces it)",
                *(output_dir, folder),
            )
        try:
            yield folder
        except BaseException as error:
            if isinstance(error, Exception):
                log_error(error)
            if folder != output_dir and not (folder / CONFIG).exists():
                _remove_folder(folder)
            raise


def holds_run(folder: str | Path) -> bool:
    """Return whether a training run has started in a folder."""
    return any((Path(folder) / name).exists() for name in (LAST_CHECKPOINT, METRICS))


def _lock_new(output_dir: Path, stack: ExitStack) -> Path:
    """Lock `output_dir` until the stack is closed, or create and lock a numbered folder."""
    if not holds_run(output_dir):
        with suppress(FolderInUseError):
            stack.enter_context(lock_output_dir(output_dir))
            if not holds_run(output_dir):  # else a run has started and ended since the first look
                return output_dir
            stack.close()
    for number in itertools.count(2):
        folder = output_dir.with_name(f"{output_dir.name}_{number}")
        with suppress(FileExistsError):
            folder.mkdir()  # by one process only
            stack.enter_context(lock_output_dir(folder))
            return folder
    raise AssertionError("unreachable")


def _remove_folder(folder: Path) -> None:
    """Remove the folder of a run that has not started, unless it contains unknown files."""
    with suppress(OSError):
        for name in (LOG, LOCK):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def link_latest(output_dir: str | Path, folder: Path) -> None:
    """Point the link `<output_dir>_latest` to the folder of a run that was started there.

    Where this is not possible, or a file or folder has this name, nothing changes.
    """
    given = Path(os.path.abspath(expand_home(output_dir)))  # a link itself, not where it points to
    link = given.with_name(f"{given.name}_latest")
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    try:
        if link.exists() and not link.is_symlink():
            raise FileExistsError(f"{link} is not a link")
        temporary.symlink_to(Path(os.path.abspath(folder)).name, target_is_directory=True)
        temporary.replace(link)
    except OSError as error:
        logger.debug("No link to the latest run: %s", error)


@contextmanager
def lock_output_dir(output_dir: str | Path) -> Iterator[None]:
    """Lock `output_dir` for the block, and remove the leftovers of killed runs.

    The kernel releases it however the process ends. Worker
    processes, which can outlive it for seconds, do not inherit it (as they would with `flock`).

    Raises:
        FolderInUseError: another process uses the folder.
    """
    output_dir = Path(expand_home(output_dir))
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        logger.warning("No file locks on this system: make sure that no other run writes here")
        yield
        return
    # A lock needs a file that is open for writing. It is not truncated: its holder has written it.
    descriptor = os.open(output_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    with open(descriptor, "r+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise FolderInUseError(
                f"{output_dir} is in use by {file.read().strip() or 'another process'}: wait for "
                "it, end it, or give another OUTPUT_DIR"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        if leftovers := remove_leftovers(output_dir):
            logger.info("Removed temporary files of a killed run: %s", ", ".join(leftovers))
        yield


def record_start(output_dir: Path, cfg: CfgNode) -> None:
    """Write `config.yaml`, and append to `environment.txt`."""
    write_atomically(output_dir / CONFIG, lambda file: file.write(cfg.dump().encode()))
    record_environment(output_dir)


def record_environment(output_dir: str | Path) -> None:
    """Append the start of this run to `environment.txt`: time, command, code and versions."""
    lines = [
        f"==== {datetime.now().astimezone().isoformat(timespec='seconds')}",
        f"{'command':<24} {shlex.join([sys.executable, *sys.argv])}",
        f"{'folder':<24} {os.getcwd()}",
        f"{'git':<24} {git_state(Path(__file__).parent)}",
        env.describe(),
    ]
    path = Path(output_dir) / ENVIRONMENT
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write("\n".join(lines) + "\n\n")


def git_state(folder: Path) -> str:
    """Return the commit of the code in `folder`, and the names of modified files."""

    def git(*words: str) -> str:
        command, quiet = ["git", "-C", str(folder), *words], subprocess.DEVNULL
        output = subprocess.check_output(command, stderr=quiet, timeout=20)
        return output.decode("utf-8", "replace").rstrip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = [line[3:] for line in git("status", "--porcelain", "-uno").splitlines()]
    except (OSError, subprocess.SubprocessError):
        return "no repository, or no git"
    return commit + (f", changed: {', '.join(changed)}" if changed else ", no changes")
