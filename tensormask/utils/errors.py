"""The error for what a user can correct, and texts of unknown origin in its message."""


class UserError(ValueError):
    """A config, a file or an argument is invalid. The commands print it as one line.

    Every other exception is a bug or a failure of the machine, and keeps its traceback.
    """


def shorten(text: str, length: int = 100) -> str:
    """Shorten and escape untrusted text for use in a message."""
    text = text if len(text) <= length else text[: length - 3] + "..."
    return text if text.isprintable() else ascii(text)
