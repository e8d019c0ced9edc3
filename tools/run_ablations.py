#!/usr/bin/env python
"""Train every row of the paper's tables on one small config, and print their results."""

import sys

from tensormask import cli


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.main(["run-ablations", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
