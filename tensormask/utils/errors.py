"""The error for what a user can correct, and texts of unknown origin in its message."""

import difflib
from collections.abc import Collection, Iterable


class UserError(ValueError):
    """A config, a file or an argument is invalid. The commands print it as one line.

    Every other exception is a bug or a failure of the machine, and keeps its traceback.
    """


def shorten(text: str, length: int = 100) -> str:
    """Shorten and escape untrusted text for use in a message."""
    text = text if len(text) <= length else text[: length - 3] + "..."
    return text if text.isprintable() else ascii(text)


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return the most similar of the known names, of which there is at least one."""
    return difflib.get_close_matches(name, [*known], n=1, cutoff=0.0)[0]


def unknown_name(what: str, name: str, known: Collection[str]) -> str:
    """Say that a name is unknown, with the nearest known name and all of them."""
    nearest = nearest_name(name, known)
    return f"{name!r} is not {what}; the nearest name is {nearest!r}. Known: {', '.join(known)}"
