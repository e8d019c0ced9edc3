#!/usr/bin/env python
"""Convert weights for another program: `tools/convert_weights.py model_final.pth model.pkl`."""

import sys

from tensormask.commands.convert_weights import main

if __name__ == "__main__":
    sys.exit(main())
