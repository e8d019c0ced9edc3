#!/usr/bin/env python
"""Say what is in a data set and what is wrong with it: `python tools/check_dataset.py SET`."""

import sys

from tensormask.commands.check import main

if __name__ == "__main__":
    sys.exit(main())
