#!/usr/bin/env python
"""Detect objects and draw them: `tools/demo.py --config-file C --weights W --input images/`."""

import sys

from tensormask.commands.predict import main

if __name__ == "__main__":
    sys.exit(main())
