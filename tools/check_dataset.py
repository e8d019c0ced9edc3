#!/usr/bin/env python
"""Report the contents and issues of a data set: `python tools/check_dataset.py SET`."""

import sys

from tensormask.cli import main

if __name__ == "__main__":
    sys.exit(main(["check", *sys.argv[1:]]))
