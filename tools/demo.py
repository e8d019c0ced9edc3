#!/usr/bin/env python
"""Draw what a model finds: `python tools/demo.py --config-file C --weights W --input images/`."""

import sys

from tensormask.commands.predict import main

if __name__ == "__main__":
    sys.exit(main())
