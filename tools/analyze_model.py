#!/usr/bin/env python
"""Count parameters, FLOPs and activations: `python tools/analyze_model.py --config-file C`."""

import sys

from tensormask import cli


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.main(["analyze", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
