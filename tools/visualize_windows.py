#!/usr/bin/env python
"""Draw what a model sees: `visualize_windows.py --config-file C --weights W --input IMAGE`."""

import sys

from tensormask.commands.visualize_windows import main

if __name__ == "__main__":
    sys.exit(main())
