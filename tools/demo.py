#!/usr/bin/env python
"""Detect objects and draw them, with the options of detectron2's demo: `tensormask predict`.

tools/demo.py --config-file configs/tensormask_R_50_FPN_1x.yaml --input images/ --output out \
    --opts MODEL.WEIGHTS model_final.pkl
"""

import sys

from tensormask.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
