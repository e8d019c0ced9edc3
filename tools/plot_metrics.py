#!/usr/bin/env python
"""Draw the curves of one or several runs: `python tools/plot_metrics.py output/a output/b`."""

import sys

from tensormask import cli


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.main(["plot-metrics", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
