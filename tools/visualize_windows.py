#!/usr/bin/env python
"""Draw what a model sees: `visualize_windows.py --config-file C --weights W --input IMAGE`."""

import sys

from tensormask import cli


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.main(["visualize", "windows", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
