#!/usr/bin/env python
"""Convert weights for another program: `tools/convert_weights.py model_final.pth model.pkl`."""

import sys

from tensormask import cli


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.main(["convert-weights", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
