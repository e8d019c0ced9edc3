#!/usr/bin/env python
"""Count parameters, FLOPs and activations: `python tools/analyze_model.py --config-file C`."""

import sys

from tensormask.cli import main

if __name__ == "__main__":
    sys.exit(main(["analyze", *sys.argv[1:]]))
