#!/usr/bin/env python
"""Detect objects and draw them, with the options of detectron2's demo: `tensormask predict`.

tools/demo.py --config-file configs/tensormask_R_50_FPN_1x.yaml --input images/ --output out \
    --opts MODEL.WEIGHTS model_final.pkl
"""

import sys

from tensormask import cli


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.main(["predict", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
