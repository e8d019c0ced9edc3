"""Train every row of the paper's tables on one small config, and print them as a table.

Example: `python tools/run_ablations.py --config-file configs/quickstart.yaml --rows "upscale_*"`
"""

import argparse
import fnmatch
import json
import logging
import subprocess
import sys
from pathlib import Path

from tensormask.config import CfgNode, get_cfg
from tensormask.config.node import leaves
from tensormask.utils.errors import UserError

logger = logging.getLogger("tensormask.commands.ablations")

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "configs" / "ablations"
BASE = ROOT / "configs" / "tensormask_R_50_FPN_6x.yaml"
SIZES = "MODEL.ANCHOR_GENERATOR.SIZES"
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
EXIT_FAILED = 1
EXIT_MISTAKE = 2


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; `opts` holds the trailing `KEY VALUE` words."""
    parser = argparse.ArgumentParser(
        description="Train the rows of configs/ablations, each on top of a config of yours.",
        epilog="A run goes to OUTPUT/ROW; one that is finished there is not trained again.",
    )
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="what all rows share: YAML config"
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["*"],
        metavar="NAME",
        help="names of files in configs/ablations, * and ? allowed (default: all)",
    )
    parser.add_argument(
        "--output", default="output/ablations", metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="for every row"
    )
    return parser.parse_args(arguments)


def find_rows(patterns: list[str]) -> list[str]:
    """Names of the rows that a pattern fits, sorted.

    Raises:
        ValueError: a pattern fits none.
    """
    names = sorted(path.stem for path in ROWS.glob("*.yaml"))
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"no row is named {pattern}; there are {', '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns)]


def row_options(name: str, num_levels: int) -> list[str]:
    """What a row says beyond its base, as `KEY VALUE` words, for a model of `num_levels` levels."""
    base, words = dict(leaves(load(BASE))), []
    for key, value in leaves(load(ROWS / f"{name}.yaml")):
        if value != base[key]:
            words += [key, str(value[:num_levels] if key == SIZES else value)]
    return words


def load(path: str | Path) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(path)
    return cfg


def train_row(args: argparse.Namespace, name: str, num_levels: int) -> dict[str, float]:
    """Train a row, unless that was done before; its last evaluation's metrics."""
    folder = Path(args.output) / name
    if not (folder / "model_final.pth").is_file():
        command = [
            *(sys.executable, str(ROOT / "tools" / "train_net.py")),
            *("--config-file", args.config_file, "--resume", "TEST.EXPECTED_RESULTS", "[]"),
            *row_options(name, num_levels),
            *(*args.opts, "OUTPUT_DIR", str(folder)),
        ]
        logger.info("%s", " ".join(command))
        subprocess.run(command, check=True)
    lines = (folder / "metrics.json").read_text(encoding="utf-8").splitlines()
    evaluations = [line for line in map(json.loads, lines) if "segm/AP" in line]
    return evaluations[-1]


def format_table(results: dict[str, dict[str, float]]) -> str:
    """A Markdown table of mask AP, a row of the paper a line."""
    lines = [f"| row | {' | '.join(METRICS)} | box AP |", "|---" * (len(METRICS) + 2) + "|"]
    for name, result in results.items():
        keys = [*(f"segm/{metric}" for metric in METRICS), "bbox/AP"]
        values = (result.get(key) for key in keys)  # none where no object is of that size
        texts = ("-" if value is None else f"{value:.1f}" for value in values)
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and give its exit code: 1 for a failed run, 2 for a user's mistake."""
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        rows = find_rows(args.rows)
        cfg = load(args.config_file)
        cfg.merge_from_list(args.opts)
        num_levels = len(cfg.MODEL.TENSOR_MASK.IN_FEATURES)
        results = {name: train_row(args, name, num_levels) for name in rows}
    except subprocess.CalledProcessError as error:
        return error.returncode or EXIT_FAILED
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    print(format_table(results))
    return 0
