#!/usr/bin/env python
"""Measure how fast and how frugal the library is: `python dev/benchmark.py op`.

Each subcommand is a module of tools/benchmarks/, which says how to add one.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

from benchmarks.timing import describe_machine

BENCHMARKS = {
    "data": "reading training images, against torchvision; memory of worker processes",
    "inference": "detection against torchvision's Mask R-CNN and against our dense path",
    "op": "swap_align2nat per level of the bipyramid, against copy_, x + 1 and plain PyTorch",
    "train": "a training step against torchvision's Mask R-CNN's; memory of the assignment",
}

EXIT_MISTAKE = 2


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; `run` is the function of the chosen benchmark."""
    parser = argparse.ArgumentParser(description="Measure how fast and how frugal the library is.")
    subcommands = parser.add_subparsers(dest="benchmark", required=True)
    words = sys.argv[1:] if arguments is None else arguments
    for name, summary in BENCHMARKS.items():
        subparser = subcommands.add_parser(name, help=summary)
        if name not in words[:1]:
            continue  # what the others import need not be installed
        module = importlib.import_module(f"benchmarks.{name}")
        subparser.description = module.__doc__
        module.add_arguments(subparser)
        subparser.add_argument("--json", metavar="FILE", help="write the results to a file, too")
        subparser.set_defaults(run=module.run)
    return parser.parse_args(words)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and give its exit code: 2 for a user's mistake."""
    args = parse_arguments(arguments)
    try:
        results = args.run(args)
        if args.json:
            record = {
                "benchmark": args.benchmark,
                "options": {k: v for k, v in vars(args).items() if k not in ("run", "json")},
                "machine": describe_machine(),
                "results": results,
            }
            Path(args.json).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
