#!/usr/bin/env python
"""Convert weights for another program: `tools/convert_weights.py model_final.pth model.pkl`."""

import sys

from tensormask.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert-weights", *sys.argv[1:]]))
