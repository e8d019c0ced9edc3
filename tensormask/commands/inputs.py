"""Find the inputs of `predict`: images, videos, folders, globs, URLs, cameras, data sets."""

import glob
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

from tensormask.data.catalog import get_dataset, is_dataset_name
from tensormask.data.images import image_suffixes
from tensormask.utils.files import expand_home

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp")
)
_STREAMS = ("rtsp", "rtmp", "udp")


class Input(NamedTuple):
    """An image, a video or a camera."""

    location: Path | str | int  # a path, a URL, or the number of a camera
    is_video: bool  # or a camera

    @property
    def stem(self) -> str:
        """The name of the files that are written for it, without suffix."""
        if isinstance(self.location, int):
            return f"camera_{self.location}"
        if isinstance(self.location, str):
            parts = urlsplit(self.location)
            return PurePosixPath(parts.path).stem.strip(".") or parts.hostname or "image"
        return self.location.stem


class FoundInputs(NamedTuple):
    """The result of `find_inputs`."""

    inputs: list[Input]
    others: Counter[str]  # by suffix, the number of other files in folders and globs
    without: list[str]  # per folder or glob without images and videos, an error message


def find_inputs(words: Iterable[str]) -> FoundInputs:
    """Find the inputs that words of a command line name, in their order, without duplicates.

    A word is the path of a file, which is a video if it has the suffix of one, and else an image,
    whatever its suffix; a folder or a glob, of whose files only those with the suffix of an image
    or video are taken, sorted; a URL; the number of a camera; or the name of a data set.

    Raises:
        UserError, FileNotFoundError: the data set cannot be read.
    """
    inputs: dict[Input, None] = {}  # a set that keeps the order
    others: Counter[str] = Counter()
    without = []
    for word in map(expand_home, words):
        path = Path(word)
        scheme = word.partition("://")[0].lower() if "://" in word else ""
        if word.isdecimal() and not path.exists():
            inputs[Input(int(word), True)] = None
        elif scheme:
            is_video = scheme in _STREAMS or _has_suffix(urlsplit(word).path, VIDEO_SUFFIXES)
            inputs[Input(word, is_video)] = None
        elif path.is_dir() or (glob.has_magic(word) and not path.exists()):
            files = _files_in(path) if path.is_dir() else _files_of_glob(word)
            taken = [f for f in files if _is_taken(f)]
            others.update(_kind(f) for f in files if not _is_taken(f))
            inputs.update(dict.fromkeys(map(_file, taken)))
            if not taken:
                without.append(_describe_without(word, len(files)))
        elif not path.exists() and is_dataset_name(word):
            dataset = get_dataset(word)
            images = map(dataset.image, dataset.image_ids)
            inputs.update((_file(Path(dataset.path(image))), None) for image in images)
        else:
            inputs[_file(path)] = None
    return FoundInputs(list(inputs), others, without)


def list_suffixes(suffixes: Counter[str]) -> str:
    """Return the most frequent suffixes with their numbers, such as "3 .txt, 1 .heic"."""
    return ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5))


def _file(path: Path) -> Input:
    return Input(path, _has_suffix(path, VIDEO_SUFFIXES))


def _has_suffix(path: str | Path, suffixes: frozenset[str]) -> bool:
    return PurePosixPath(path).suffix.lower() in suffixes


def _is_taken(path: Path) -> bool:
    """Whether a file of a folder is an image or video; hidden ones (macOS's ._a.jpg) are not."""
    return not path.name.startswith(".") and _has_suffix(path, image_suffixes() | VIDEO_SUFFIXES)


def _kind(path: Path) -> str:
    return "hidden" if path.name.startswith(".") else path.suffix.lower() or "without suffix"


def _files_in(folder: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in os.scandir(folder) if not entry.is_dir())


def _files_of_glob(pattern: str) -> list[Path]:
    return sorted(
        path for path in map(Path, glob.glob(pattern, recursive=True)) if not path.is_dir()
    )


def _describe_without(word: str, num_files: int) -> str:
    hint = f"; for subfolders, write '{word.rstrip('/')}/**/*.jpg'" if os.path.isdir(word) else ""
    return f"{word} has no images or videos ({num_files} other files){hint}"
