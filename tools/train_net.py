#!/usr/bin/env python
"""Train or evaluate a config: `python tools/train_net.py --config-file configs/quickstart.yaml`."""

import sys

from tensormask.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
