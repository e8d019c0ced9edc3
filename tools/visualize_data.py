#!/usr/bin/env python
"""Draw what a model is trained on: `tools/visualize_data.py --config-file FILE KEY VALUE`."""

import sys

from tensormask.commands.visualize_data import main

if __name__ == "__main__":
    sys.exit(main())
