"""Files from the network, kept in a cache folder.

pooch does the work: a file comes under a temporary name, and gets its own once it is whole.
"""

import hashlib
import logging
import os
import re
import sys
from functools import partial
from pathlib import Path
from urllib.parse import urldefrag, urlsplit

import pooch

from tensormask.utils.errors import UserError

logger = logging.getLogger(__name__)

_RETRIES = 2  # after pauses of 1 and 2 s, which pooch makes
_CHUNK = 1 << 20  # bytes
_ANSWERS_THAT_MAY_CHANGE = (408, 429)  # besides those from 500 on: "timeout", "too many requests"


def cache_folder() -> Path:
    """``$TENSORMASK_CACHE``, else the user's cache folder, on Linux ``~/.cache/tensormask``.

    ``$XDG_CACHE_HOME`` stands for ``~/.cache`` where it is set.
    """
    given = os.environ.get("TENSORMASK_CACHE")
    return Path(given).expanduser() if given else pooch.os_cache("tensormask")


def cache_path(url: str) -> Path:
    """Where the file of an address is kept: a folder for each address, in the cache folder.

    The folder's name shows the host and path of the address, and has a digest of all of it, query
    included, so that no two addresses share one. No address leads out of the cache folder.

    Raises:
        ValueError: the address has no host, names no file, or is broken.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # reading a port that is none is an error
        folder, _, name = parts.path.rpartition("/")
        name = _plain(name)[-100:].strip(".")  # its end, since readers go by the suffix
        if not host or not name:
            raise UserError("write it as https://host/folder/file")
        digest = hashlib.sha256(urldefrag(url).url.encode()).hexdigest()
    except ValueError as error:
        raise UserError(f"{url!r} is no address of a file: {error}") from None
    return cache_folder() / f"{_plain(host + folder)[:150]}-{digest[:16]}" / name


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text)


def download(url: str, sha256: str | None = None) -> Path:
    """Get the file of an address, from the network only where the cache does not have it.

    Failures that may pass (no connection, a transfer that breaks off, a busy server) are tried
    again. A transfer that ends early is noticed where the server said how much it would be.

    Args:
        url: http or https.
        sha256: the SHA-256 that the file must have, or as many of its first digits as are known. A
            file in the cache that does not have it is downloaded again.

    Raises:
        ValueError: the address is none.
        OSError: the file could not be had whole; it is not in the cache then.
    """
    path = cache_path(url)
    if path.is_file() and sha256 is not None and not pooch.file_hash(path).startswith(sha256):
        logger.warning("%s is damaged (its SHA-256 is not %s): downloading it again", path, sha256)
        path.unlink(missing_ok=True)
    files = pooch.create(
        path=path.parent,
        base_url="",
        registry={path.name: None},
        urls={path.name: url},
        retry_if_failed=_RETRIES,
    )
    try:
        files.fetch(path.name, downloader=partial(_download_once, sha256=sha256))
    except (OSError, ValueError) as error:
        # Where no connection could be made, the reason is inside of requests' long story.
        reason = getattr(error.args[0] if error.args else None, "reason", error)
        raise OSError(
            f"{url} could not be downloaded into {path.parent}: {reason}. Try again, or download "
            "it by hand and give the path of the file; TENSORMASK_CACHE names another cache folder"
        ) from None
    return path


def _download_once(url: str, temporary: str, _: pooch.Pooch, *, sha256: str | None) -> None:
    """pooch's downloader, which refuses what does not have the hash before it gets its name.

    pooch tries again after errors of requests, and after no plain `OSError`.
    """
    try:
        pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=_CHUNK)(
            url, temporary, None
        )
    except OSError as error:
        response = getattr(error, "response", None)
        status = 500 if response is None else response.status_code
        if status < 500 and status not in _ANSWERS_THAT_MAY_CHANGE:
            raise OSError(str(error)) from None
        raise
    size, found = os.path.getsize(temporary), pooch.file_hash(temporary)
    if not size:  # such as a redirect to nowhere
        raise OSError("the server sent nothing")
    if sha256 is not None and not found.startswith(sha256):
        raise OSError(
            f"what came has the SHA-256 {found}, but that of the published file is {sha256}"
            f"{'...' if len(sha256) < len(found) else ''}"
        )
    os.chmod(temporary, 0o644)  # temporary files are for their owner alone, a cache may be shared
    logger.info("downloaded %s (%.1f MB, SHA-256 %s)", url, size / 1e6, found)
