#!/usr/bin/env python
"""Parameters, FLOPs and activations of a model: `python tools/analyze_model.py --config-file C`."""

import sys

from tensormask.commands.analyze import main

if __name__ == "__main__":
    sys.exit(main())
