#!/usr/bin/env python
"""Train every row of the paper's tables on one small config, and print their results."""

import sys

from tensormask.cli import main

if __name__ == "__main__":
    sys.exit(main(["run-ablations", *sys.argv[1:]]))
