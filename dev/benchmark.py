#!/usr/bin/env python
"""Compare the library with torchvision and with plain PyTorch: `python dev/benchmark.py op`.

Each subcommand is a module of dev/benchmarks. `tools/benchmark.py` measures one model.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import benchmarks  # noqa: F401 (makes tensormask importable)

from tensormask.utils.env import describe_machine
from tensormask.utils.errors import UserError

BENCHMARKS = {
    "data": "reading training images, against torchvision; memory of worker processes",
    "evaluation": "time of COCO's evaluation with pycocotools and with faster-coco-eval",
    "export": "detection by onnxruntime, against the model that was exported",
    "growth": "detection by image area, number of objects and share of p2, with a plot",
    "inference": "detection against torchvision's Mask R-CNN",
    "loading": "batches from worker processes, against PyTorch's DataLoader; their bytes",
    "op": "swap_align2nat per level of the bipyramid, against copy_, x + 1 and plain PyTorch",
    "sparse": "detection with parts of p2, where a query asks for it, against all of p2",
    "tiled": "large images in tiles: peak memory, and detections against those of one pass",
    "train": "a training step against torchvision's Mask R-CNN's",
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; `run` is the function of the chosen benchmark."""
    parser = argparse.ArgumentParser(description="Compare speed and memory with other libraries.")
    subcommands = parser.add_subparsers(dest="benchmark", required=True)
    words = sys.argv[1:] if arguments is None else arguments
    for name, summary in BENCHMARKS.items():
        subparser = subcommands.add_parser(name, help=summary)
        if name in words[:1]:  # the others' imports need not be installed
            module = importlib.import_module(f"benchmarks.{name}")
            subparser.description = module.__doc__
            module.add_arguments(subparser)
            subparser.add_argument(
                "--json", metavar="FILE", help="write the numbers to a file, too"
            )
            subparser.set_defaults(run=module.run)
    return parser.parse_args(words)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for an error of the user."""
    args = parse_arguments(arguments)
    try:
        results = args.run(args)
        if args.json:
            options = {k: v for k, v in vars(args).items() if k not in ("run", "json")}
            record = {"options": options, "machine": describe_machine(), "results": results}
            Path(args.json).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
