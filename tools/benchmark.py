#!/usr/bin/env python
"""Measure the latency and memory of one model: `python tools/benchmark.py --config-file C`."""

import sys

from tensormask.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
