#!/usr/bin/env python
"""Draw what a model is trained on: `tools/visualize_data.py --config-file FILE KEY VALUE`."""

import sys

from tensormask import cli


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.main(["visualize", "data", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
