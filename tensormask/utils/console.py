"""Output to consoles that cannot show all characters."""

import sys


def escape_unencodable() -> None:
    """Let stdout and stderr write characters that their encoding lacks as escapes.

    Windows consoles, redirected output and the C locale have other encodings than UTF-8. There,
    class names and file names in another script would raise UnicodeEncodeError.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a notebook's streams have none
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
