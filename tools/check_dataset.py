#!/usr/bin/env python
"""Report the contents and issues of a data set: `python tools/check_dataset.py SET`."""

import sys

from tensormask import cli


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.main(["check", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
