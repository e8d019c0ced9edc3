"""Find the local file of a model zoo name, a URL or a path; download it if needed.

Downloads are kept in a cache folder. pooch writes each under a temporary name, and renames it when
it is complete.
"""

import hashlib
import logging
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urldefrag, urlsplit
from urllib.request import url2pathname

import pooch

from tensormask.checkpoint.hub import find_in_folder, find_on_hub
from tensormask.checkpoint.zoo import DETECTRON2_URL, MODELS, PACKAGED, TORCHVISION_URL, ZooModel
from tensormask.modeling.trunks import TORCHVISION_TRUNKS
from tensormask.utils.errors import UserError, unknown_name
from tensormask.utils.files import expand_home

logger = logging.getLogger(__name__)

_SCHEMES = ("https", "http", "hf", "detectron2", "torchvision", "file")
_DEPTHS = (18, 34, 50, 101)  # of MODEL.RESNETS.DEPTH
_RETRIES = 2  # pooch pauses for 1 s, then for 2 s
_CHUNK = 1 << 20  # bytes
_TRANSIENT_STATUS = (408, 429)  # "timeout" and "too many requests"; besides 500 and above


def resolve(name: str | os.PathLike[str]) -> Path:
    """Return the local path of a weights file, which is downloaded if the cache lacks it.

    Args:
        name: one of

            - the path of a file, which is returned even if no such file exists;
            - the path of a folder of `save_pretrained`;
            - ``hf://user/model`` or ``hf://user/model@revision``, a model of `push_to_hub`;
            - a name in `model_zoo.MODELS`; a file that comes with the package is checked;
            - a URL: ``https://...``, ``http://...`` or ``file:///...``;
            - ``detectron2://...``, a file of detectron2's server;
            - ``torchvision://ResNet50_Weights.IMAGENET1K_V2``, weights by torchvision's names
              (ResNets of 18, 34, 50 or 101 layers, and backbones of `trunks.build_trunk`), or
              ``torchvision://resnet50`` for IMAGENET1K_V1, as in torchvision's own detection
              models.

    Raises:
        ValueError: the URL is malformed or of an unknown kind; or a folder or a model on the Hub is
            not of this library; or a bare name, without folder
            and suffix, is neither a file nor in the zoo; or the package's file is damaged or
            missing.
        OSError: the download failed.

    Example:
        >>> resolve("file:///data/model_final.pth").as_posix()
        '/data/model_final.pth'
    """
    is_path = isinstance(name, os.PathLike)
    name = expand_home(name)
    if os.path.isdir(name) and (is_path or name not in MODELS):
        return find_in_folder(name)
    if is_path or os.path.isfile(name):
        return Path(name)
    scheme, separator, rest = name.partition("://")
    scheme = scheme.lower()
    if name == PACKAGED:
        return packaged_file()
    if name in MODELS:
        url = _url(MODELS[name])
    elif not separator:
        return _checked_path(name)
    elif scheme == "file":
        return _path_of_file_url(name, rest)
    elif scheme == "hf":
        return find_on_hub(rest)
    elif scheme in ("https", "http"):
        url = name
    elif scheme == "detectron2":
        url = DETECTRON2_URL + rest
    elif scheme == "torchvision":
        url = _torchvision_url(rest)
    else:
        raise UserError(f"{name!r}: {unknown_name('a kind of URL', scheme, _SCHEMES)}")
    return download(url, _sha256(url))


def packaged_file() -> Path:
    """Return the path of the weights that come with the package, after a check of their SHA-256.

    Raises:
        UserError: the file is missing or damaged.
    """
    path, expected = MODELS[PACKAGED].path, MODELS[PACKAGED].sha256
    if path is None or not has_packaged_file():
        raise UserError(f"{PACKAGED} did not come with this copy of tensormask: no file {path}")
    actual = pooch.file_hash(path)
    if expected is not None and actual != expected:
        raise UserError(
            f"{path} is damaged: its SHA-256 is {actual}, expected {expected}. Install tensormask "
            "again, or give other weights"
        )
    return path


def has_packaged_file() -> bool:
    """Return whether weights came with the package: a clone can lack them."""
    path = MODELS[PACKAGED].path
    return path is not None and path.is_file()


def _url(model: ZooModel) -> str:
    if model.url is None:
        raise UserError(
            f"no weights of {model.name} were released: train it with "
            f"tensormask train --config-file {model.name}"
        )
    return model.url


def _torchvision_url(name: str) -> str:
    from torchvision.models import get_model_weights

    known = {}
    for model in [*(f"resnet{depth}" for depth in _DEPTHS), *TORCHVISION_TRUNKS]:
        entries = [*get_model_weights(model)]
        known[model] = entries[0]
        known |= {str(entry): entry for entry in entries}
    if name not in known:
        raise UserError(unknown_name("one of torchvision's backbones", name, known))
    return known[name].url


def _sha256(url: str) -> str | None:
    """Return the known first digits of a file's SHA-256; torchvision's file names contain them."""
    listed = next((model.sha256 for model in MODELS.values() if model.url == url), None)
    named = re.fullmatch(re.escape(TORCHVISION_URL) + r"[^/]+-([0-9a-f]{8,64})\.pth", url)
    return listed or (named[1] if named else None)


def _checked_path(name: str) -> Path:
    path = Path(name)
    if path.name == name and not path.suffix:
        raise UserError(unknown_name("a file or a model of the zoo", name, MODELS))
    return path


def _path_of_file_url(url: str, rest: str) -> Path:
    host, _, path = rest.partition("/")
    if host not in ("", "localhost") or not path:
        raise UserError(f"{url!r} is not the URL of a file: write file:///folder/file")
    return Path(url2pathname(f"/{path}"))


# ---- the cache and the network ----


def cache_folder() -> Path:
    """Return ``$TENSORMASK_CACHE``, or tensormask's folder in the user's cache if it is not set.

    On Linux the latter is ``$XDG_CACHE_HOME/tensormask`` or ``~/.cache/tensormask``.
    """
    given = os.environ.get("TENSORMASK_CACHE")
    return Path(expand_home(given)) if given else pooch.os_cache("tensormask")


def cache_path(url: str) -> Path:
    """Return the path in the cache for the file of a URL.

    Each URL has a folder of its own in the cache folder. The folder's name has the host and
    path of the URL, and a digest of the whole URL with its query. The path is inside of
    the cache folder, whatever the URL.

    Raises:
        ValueError: the URL has no host or no file name, or is malformed.
    """
    host, path = _host_and_path(url)
    folder, _, name = path.rpartition("/")
    name = _plain(name)[-100:].strip(".")  # its end has the suffix
    if not name:
        raise UserError(f"{url!r} is not the URL of a file: it ends with a folder")
    digest = hashlib.sha256(urldefrag(url).url.encode()).hexdigest()
    return cache_folder() / f"{_plain(host + folder)[:150]}-{digest[:16]}" / name


def _host_and_path(url: str) -> tuple[str, str]:
    try:
        url.encode()
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # an invalid port raises ValueError
        if not host:
            raise ValueError("write it as https://host/folder/file")
    except ValueError as error:
        raise UserError(f"{url!r} is not the URL of a file: {error}") from None
    return host, parts.path


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text)


def download(
    url: str,
    sha256: str | None = None,
    *,
    path: Path | None = None,
    max_bytes: int | None = None,
) -> Path:
    """Return the local path of the file of a URL, downloaded if the cache lacks it.

    Errors that may be transient (no connection, a broken transfer, a busy server) are retried. An
    incomplete transfer is detected if the server sends the length of the file.

    Args:
        url: http or https.
        sha256: the expected SHA-256 of the file, or its first digits. A file in the cache with
            another one is downloaded again.
        path: where the file is stored; None: in the cache.
        max_bytes: the transfer of a larger file is stopped.

    Raises:
        ValueError: the URL is malformed.
        OSError: the download failed; there is no file.
    """
    _host_and_path(url)  # checks it
    is_cached = path is None
    path = cache_path(url) if path is None else path
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
        files.fetch(
            path.name, downloader=partial(_download_once, sha256=sha256, max_bytes=max_bytes)
        )
    except (OSError, ValueError) as error:
        # If the connection failed, requests has the reason inside of its error.
        reason = getattr(error.args[0] if error.args else None, "reason", error)
        hint = f"; TENSORMASK_CACHE sets another cache folder than {cache_folder()}"
        raise OSError(
            f"{url} could not be downloaded: {reason}. Try again, or download it by hand and give "
            f"its path{hint if is_cached else ''}"
        ) from None
    return path


class _LimitedFile:
    """A file that refuses to grow beyond `max_bytes`."""

    def __init__(self, file: BinaryIO, max_bytes: int | None) -> None:
        self.file, self.max_bytes, self.flush = file, max_bytes, file.flush

    def write(self, data: bytes) -> int:
        if self.max_bytes is not None and self.file.tell() + len(data) > self.max_bytes:
            raise OSError(f"the file is larger than {self.max_bytes / 1e6:g} MB")
        return self.file.write(data)


def _download_once(
    url: str, temporary: str, _: pooch.Pooch, *, sha256: str | None, max_bytes: int | None
) -> None:
    """Download into a temporary file, and check its hash before pooch renames it.

    pooch retries after the errors of requests, but not after a plain `OSError`.
    """
    try:
        with open(temporary, "wb") as file:
            pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=_CHUNK)(
                url, _LimitedFile(file, max_bytes), None
            )
    except OSError as error:
        response = getattr(error, "response", None)
        status = 500 if response is None else response.status_code
        if status < 500 and status not in _TRANSIENT_STATUS:
            raise OSError(str(error)) from None
        raise
    size, actual = os.path.getsize(temporary), pooch.file_hash(temporary)
    if not size:  # for example a redirect without a location
        raise OSError("the server sent an empty file")
    if sha256 is not None and not actual.startswith(sha256):
        raise OSError(
            f"the downloaded file has the SHA-256 {actual}, but the published one has {sha256}"
            f"{'...' if len(sha256) < len(actual) else ''}"
        )
    os.chmod(temporary, 0o644)  # the mode of temporary files is 600, but a cache may be shared
    logger.info("downloaded %s (%.1f MB, SHA-256 %s)", url, size / 1e6, actual)
