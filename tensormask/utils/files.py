"""Paths with `~`, atomic writes of files, and one error for a full disk."""

import codecs
import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from tensormask.utils.errors import UserError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


def expand_home(path: str | PathLike[str]) -> str:
    """Return a path with `~` or `~user` at its start replaced by the home folder.

    Shells do this too, but not inside of quotes, of YAML files and of `json@folder`. Every path of
    a user comes through here. A file that exists under a name with `~` keeps it. Where the locale
    is not UTF-8, the path is made such that it names the same file as in a UTF-8 locale.

    Raises:
        UserError: the home folder is unknown. Without this error, a folder named ~ would be made.

    Example:
        >>> expand_home("data/~/a.json")
        'data/~/a.json'
    """
    text = os.fspath(path)
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        text = os.fsdecode(text.encode("utf-8", "surrogateescape"))
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        first, *others = Path(expanded).parts
        if first == "~":
            raise UserError(f"{text}: the home folder is unknown: set HOME, or write the full path")
        if others and not os.path.lexists(first):
            raise UserError(f"{text}: there is no user {first[1:]!r}")
    return expanded


def read_text(path: str | PathLike[str]) -> str:
    """Return a text in UTF-8, or in UTF-16 as of PowerShell, whatever the locale.

    A byte order mark at its start is dropped.

    Raises:
        UserError: another encoding.
        OSError: the file cannot be read.
    """
    content = Path(path).read_bytes()
    has_utf16_mark = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if has_utf16_mark else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from None


class DiskFullError(OSError):
    """A file cannot be written because the disk is full; existing files are intact."""


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file such that `path` always holds either all of the old or all of the new content.

    The content is written to a temporary file in the same folder, synced to the disk, and renamed.
    A failed write changes nothing. A killed one leaves a temporary file, which `remove_leftovers`
    finds.

    Args:
        write: writes the content into the open file that it is called with.

    Raises:
        DiskFullError: the disk is full.
    """
    path = Path(expand_home(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with reraise_disk_full(path), open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


@contextmanager
def reraise_disk_full(path: str | Path) -> Iterator[None]:
    """Re-raise any error caused by a full disk while `path` is written as `DiskFullError`."""
    try:
        yield
    except Exception as error:
        if code := _no_space_code(error):
            raise DiskFullError(
                code,
                f"{os.strerror(code)}: the existing checkpoints are intact; make space, then "
                "continue with --resume",
                str(path),
            ) from error
        raise


def remove_leftovers(folder: str | Path) -> list[str]:
    """Remove the temporary files of killed processes from a folder.

    Only for a process that no other process writes beside, see `output_dir.lock_output_dir`.

    Returns:
        The names of the removed files.
    """
    leftovers = [path for path in Path(folder).iterdir() if _TEMPORARY.fullmatch(path.name)]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return sorted(path.name for path in leftovers)


def _no_space_code(error: BaseException | None) -> int | None:
    # torch.save raises its own error, with the system's somewhere in its chain.
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def _sync_folder(folder: Path) -> None:
    # Without this, a power failure can undo the rename. Windows has no such call.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def wait_for_file(path: Path, num_bytes: int, timeout: float = 120.0) -> None:
    """Wait until a file that another machine has written has all of its bytes here.

    A network file system shows what other machines write late: NFS after up to a minute.

    Raises:
        FileNotFoundError: it does not after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not path.is_file() or path.stat().st_size != num_bytes:
        if time.monotonic() > deadline:
            raise FileNotFoundError(
                f"{path}, which another process has written, is not here with its {num_bytes} "
                f"bytes after {timeout:g} s: all machines need the same folder on a shared disk"
            )
        os.listdir(path.parent)  # asks the server for new files
        time.sleep(0.2)
