"""Why the images of a data set are not where its file says, and where such files are."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

_NUM_TRIED = 20  # missing files that are looked for
_MAX_ENTRIES, _MAX_DEPTH = 20_000, 4  # of the folders that are listed
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_SEPARATORS = re.compile(r"[\\/=?&]")  # also of URLs
_SUFFIX = re.compile(r"\.(jpe?g|png|tiff?|bmp|gif|webp)$", re.IGNORECASE)
# What tools add to names: Label Studio before, Roboflow behind.
_ADDED = re.compile(r"^[0-9a-f]{8}-|[_.](jpe?g|png|tiff?|bmp|webp)\.rf\.[0-9a-f]{16,}$")
_FILLED = re.compile(r"[\W_]+|(?<!\d)0+(?=\d)")  # signs between words, and zeros before a number
_FORMS: dict[str, Callable[[str], bool]] = {
    "is the content of an image": lambda name: name.startswith("data:"),
    "is a URL": lambda name: "://" in name,
    "is a path of Windows, with backslashes": lambda name: "\\" in name,
    "is an absolute path": lambda name: name.startswith("/") or bool(_DRIVE.match(name)),
    "leads out of the folder by '..'": lambda name: ".." in name.split("/"),
}
# How else a file may be named, relative to the folder of images.
_REWRITES: dict[str, Callable[[str], str]] = {
    "with / in place of \\": lambda name: name.replace("\\", "/"),
    "without %-codes": unquote,
    "by its last part only": lambda name: _base(name),
    "by its last part without %-codes": lambda name: unquote(_base(name)),
}


def explain_missing(
    image_root: Path, json_file: Path, missing: Sequence[str], num_images: int
) -> str:
    """Return what missing files have in common, and where files of their names are found.

    Args:
        image_root: the folder that `file_name` is relative to.
        json_file: the annotations; its folder is searched, too.
        missing: the `file_name` of each missing image.
        num_images: of the set.
    """
    step = -(-len(missing) // _NUM_TRIED)
    tried = list(missing[::step])
    parts = [f"{len(missing)} of {num_images}, such as {tried[0][:200]!r} in {image_root}"]
    parts += [
        f"file_name {text}"
        for text, test in _FORMS.items()
        if 2 * sum(map(test, tried)) > len(tried)
    ][:1]
    parts.append(_where(image_root, json_file, tried))
    return "; ".join(parts)


def _where(image_root: Path, json_file: Path, tried: list[str]) -> str:
    for text, rewrite in _REWRITES.items():
        found = [n for n in map(rewrite, tried) if _is_file_below(image_root, n)]
        if 2 * len(found) > len(tried):
            return f"the files are found there {text}: write {found[0]!r}"
    found_in: dict[str, list[str]] = defaultdict(list)  # names by folder, the nearest first
    similar: dict[str, tuple[str, str]] = {}  # by missing name; of another suffix or case, say
    bases = {unquote(_base(name)): name for name in tried}
    base_of_stem = {_stem(base): base for base in bases}
    for folder, file_name in _files_near(image_root, json_file):
        if file_name in bases:
            found_in[folder].append(file_name)
        elif base := base_of_stem.get(_stem(file_name)):
            similar.setdefault(base, (folder, file_name))
    for folder, names in found_in.items():
        if 2 * len(names) > len(tried):
            root = _root_of(folder, bases[names[0]])
            return f"files of these names are found in {folder}: give {root}"
    if 2 * len({name for names in found_in.values() for name in names}) > len(tried):
        folder, names = next(iter(found_in.items()))
        path = os.path.relpath(os.path.join(folder, names[0]), image_root)
        return f"they are in several folders: write {path!r} for {bases[names[0]]!r}, and so on"
    if 2 * len(similar) > len(tried):
        base, (folder, file_name) = next(iter(similar.items()))
        show = ascii if _composed(base) == _composed(file_name) else repr
        return f"similar names are found in {folder}: {show(file_name)} for {show(base)}"
    return "no files of these names are found near it"


def _root_of(folder: str, name: str) -> str:
    """Return which folder of images makes a name lead to a folder, or how to write the name."""
    parent = os.path.dirname(name)
    if not parent or not _is_plain(name):
        write = "" if not parent and _is_plain(name) else ", and the last part of file_name only"
        return f"{folder} as the folder of images{write}"
    if folder.endswith(os.sep + os.path.normpath(parent)):
        return f"{folder[: -len(os.path.normpath(parent)) - 1]} as the folder of images"
    return f"{folder} as the folder of images, and the last part of file_name only"


def _is_plain(name: str) -> bool:
    return not any(test(name) for test in _FORMS.values())


def _base(name: str) -> str:
    parts = _SEPARATORS.split(name.rstrip("/"))
    # A signature can follow the name in a URL.
    return next((part for part in reversed(parts) if _SUFFIX.search(part)), parts[-1])


def _composed(name: str) -> str:
    return unicodedata.normalize("NFKC", name)


def _stem(base: str) -> str:
    """Return what names that people and tools change have in common."""
    return _FILLED.sub("", _ADDED.sub("", os.path.splitext(_composed(base).casefold().strip())[0]))


def _is_file_below(root: Path, name: str) -> bool:
    """Return whether a relative name is a file in a folder, by its path."""
    if not name or os.path.isabs(name) or ".." in name.split("/") or "\0" in name:
        return False
    return os.path.isfile(os.path.join(root, name))


def _files_near(image_root: Path, json_file: Path) -> Iterator[tuple[str, str]]:
    """Iterate over (folder, name) of files in and beside the folders; the number is limited."""
    root, annotations = Path(os.path.abspath(image_root)), Path(os.path.abspath(json_file)).parent
    seen: set[str] = set()
    for start in (root, annotations, root.parent, annotations.parent):
        num_entries = 0
        for folder, folders, files in os.walk(start):
            depth = len(Path(folder).relative_to(start).parts)
            hidden = depth >= _MAX_DEPTH
            folders[:] = [] if hidden else sorted(f for f in folders if not f.startswith("."))
            num_entries += len(folders) + len(files)
            if folder not in seen:
                seen.add(folder)
                yield from ((folder, name) for name in files)
            if num_entries > _MAX_ENTRIES:
                break
