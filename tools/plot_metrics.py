#!/usr/bin/env python
"""Draw the curves of one or several runs: `python tools/plot_metrics.py output/a output/b`."""

import sys

from tensormask.cli import main

if __name__ == "__main__":
    sys.exit(main(["plot-metrics", *sys.argv[1:]]))
