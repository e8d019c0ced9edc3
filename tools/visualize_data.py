#!/usr/bin/env python
"""Draw what a model is trained on: `tools/visualize_data.py --config-file FILE KEY VALUE`."""

import sys

from tensormask.cli import main

if __name__ == "__main__":
    sys.exit(main(["visualize", "data", *sys.argv[1:]]))
