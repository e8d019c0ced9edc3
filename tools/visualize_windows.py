#!/usr/bin/env python
"""Draw what a model sees: `visualize_windows.py --config-file C --weights W --input IMAGE`."""

import sys

from tensormask.cli import main

if __name__ == "__main__":
    sys.exit(main(["visualize", "windows", *sys.argv[1:]]))
