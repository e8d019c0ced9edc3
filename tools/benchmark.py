#!/usr/bin/env python
"""Measure the latency and memory of one model: `python tools/benchmark.py --config-file C`."""

import sys

from tensormask import cli


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.main(["benchmark", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
