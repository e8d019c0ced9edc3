#!/usr/bin/env python
"""Train every row of the paper's tables on one small config, and print them as a table."""

import sys

from tensormask.commands.ablations import main

if __name__ == "__main__":
    sys.exit(main())
