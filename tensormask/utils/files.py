"""Files that appear whole or not at all, and what is said when the disk is full."""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


class DiskFullError(OSError):
    """A file could not be written for want of space; what was there before is whole."""


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that `path` holds, at any moment, all of the old content or of the new.

    The content goes to a temporary name in the same folder, reaches the disk, and is renamed.
    What fails on the way leaves `path` alone and no temporary file; what is killed on the way
    leaves a temporary file that `remove_leftovers` finds.

    Raises:
        DiskFullError: there is no space for it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_full_explained(path), open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


@contextmanager
def disk_full_explained(path: str | Path) -> Iterator[None]:
    """Turn the many ways in which a full disk shows while `path` is written into DiskFullError."""
    try:
        yield
    except Exception as error:
        if code := _no_space_code(error):
            raise DiskFullError(
                code,
                f"{os.strerror(code)}: the checkpoints that were there are whole; make space, then "
                "go on with --resume",
                str(path),
            ) from error
        raise


def remove_leftovers(folder: str | Path) -> list[str]:
    """Remove the temporary files that killed processes left in a folder.

    Only for a process that nobody writes beside, see `lock_folder`.

    Returns:
        the names of those that were there.
    """
    found = [path for path in Path(folder).iterdir() if _TEMPORARY.fullmatch(path.name)]
    for path in found:
        path.unlink(missing_ok=True)
    return sorted(path.name for path in found)


def _no_space_code(error: BaseException | None) -> int | None:
    # torch.save has an error of its own on the way out, with the system's somewhere behind it.
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def _sync_folder(folder: Path) -> None:
    # Without this a power cut can undo the rename. Windows has no such call.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
