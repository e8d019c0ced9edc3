#!/usr/bin/env python
"""Train or evaluate a config: `python tools/train_net.py --config-file configs/quickstart.yaml`."""

import sys

from tensormask.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
