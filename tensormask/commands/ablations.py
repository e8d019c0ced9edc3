"""Train every row of the paper's tables on one small config, and print their results.

Example: `tensormask run-ablations --config-file quickstart --rows "upscale_*"`
"""

import argparse
import fnmatch
import json
import logging
import subprocess
import sys
from pathlib import Path

from tensormask.commands.common import (
    CommandParser,
    add_config_file,
    add_overrides,
    exits_on_user_error,
    log_to_stderr,
    read_config,
)
from tensormask.config import config_names
from tensormask.config.node import leaves
from tensormask.utils.errors import UserError

logger = logging.getLogger("tensormask.commands.ablations")

ROWS = "ablations/"  # of the names of their configs
BASE = "tensormask_R_50_FPN_6x"
SIZES = "MODEL.ANCHOR_GENERATOR.SIZES"
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
EXIT_FAILED = 1


def build_parser() -> CommandParser:
    """Return the parser of the command."""
    parser = CommandParser(
        "run-ablations",
        description="Train the rows of configs/ablations, each as overrides of one config.",
        epilog="The output folder of a row is OUTPUT/ROW. Finished rows are not trained again.",
        example="--config-file quickstart --rows 'upscale_*' SOLVER.MAX_ITER 300",
    )
    add_config_file(parser)
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["*"],
        metavar="NAME",
        help="names of files in configs/ablations; * and ? are wildcards (default: all)",
    )
    parser.add_argument(
        "--output", default="output/ablations", metavar="DIR", help="default: %(default)s"
    )
    add_overrides(parser)
    return parser


def find_rows(patterns: list[str]) -> list[str]:
    """Return the sorted names of the rows that match a pattern.

    Raises:
        UserError: a pattern matches no row.
    """
    names = [name.removeprefix(ROWS) for name in config_names() if name.startswith(ROWS)]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"no row is named {pattern}; available: {', '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns)]


def row_options(name: str, num_levels: int) -> list[str]:
    """Return the overrides of a row over its base, for a model of `num_levels` levels."""
    base, words = dict(leaves(read_config(BASE, []))), []
    for key, value in leaves(read_config(f"{ROWS}{name}", [])):
        if value != base[key]:
            words += [key, str(value[:num_levels] if key == SIZES else value)]
    return words


def train_row(args: argparse.Namespace, name: str, num_levels: int) -> dict[str, float]:
    """Train a row unless it is finished, and return the metrics of its last evaluation."""
    folder = Path(args.output) / name
    if not (folder / "model_final.pth").is_file():
        command = [
            *(sys.executable, "-m", "tensormask.commands.train"),
            *("--config-file", args.config_file, "--resume", "TEST.EXPECTED_RESULTS", "[]"),
            *row_options(name, num_levels),
            *(*args.opts, "OUTPUT_DIR", str(folder)),
        ]
        logger.info("%s", " ".join(command))
        subprocess.run(command, check=True)
    lines = (folder / "metrics.json").read_text(encoding="utf-8").splitlines()
    evaluations = [line for line in map(json.loads, lines) if "segm/AP" in line]
    return evaluations[-1]


def markdown_table(results: dict[str, dict[str, float]]) -> str:
    """Return mask AP and box AP as a Markdown table, one line per row."""
    lines = [f"| row | {' | '.join(METRICS)} | box AP |", "|---" * (len(METRICS) + 2) + "|"]
    for name, result in results.items():
        keys = [*(f"segm/{metric}" for metric in METRICS), "bbox/AP"]
        values = (result.get(key) for key in keys)  # None without objects of that size
        texts = ("-" if value is None else f"{value:.1f}" for value in values)
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


@exits_on_user_error
def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 1 for a failed run, 2 for an error of the user."""
    args = build_parser().parse_args(arguments)
    log_to_stderr()
    rows = find_rows(args.rows)
    cfg = read_config(args.config_file, args.opts)
    num_levels = len(cfg.MODEL.TENSOR_MASK.IN_FEATURES)
    try:
        results = {name: train_row(args, name, num_levels) for name in rows}
    except subprocess.CalledProcessError as error:
        return error.returncode or EXIT_FAILED
    print(markdown_table(results))
    return 0
