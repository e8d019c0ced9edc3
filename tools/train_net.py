#!/usr/bin/env python
"""Train or evaluate a config: `python tools/train_net.py --config-file configs/quickstart.yaml`."""

import sys

from tensormask import cli


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.main(["train", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
