"""What the commands share: a config from the command line, and errors of the user as one line."""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

from tensormask.config import CfgNode, get_cfg
from tensormask.utils.errors import UserError

EXIT_MISTAKE = 2
Main = Callable[[list[str] | None], int]


def add_config_file(parser: argparse.ArgumentParser) -> None:
    """Add the required option `--config-file`."""
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML config")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the trailing `KEY VALUE` words, as `opts`."""
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config"
    )


def add_size(parser: argparse.ArgumentParser) -> None:
    """Add the option `--size`, (height, width) of the input images."""
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        default=(800, 1344),
        metavar=("H", "W"),
        help="of the images, in pixels (default: 800 1344)",
    )


def read_config(config_file: str | Path, overrides: list) -> CfgNode:
    """Return the config of a file with overrides, `[KEY, VALUE, ...]`."""
    cfg = get_cfg()
    cfg.merge_from_file(str(config_file))
    cfg.merge_from_list(overrides)
    return cfg


def write_json(path: str, content: object) -> None:
    """Write to the file of an option `--json`; "" or None writes nothing."""
    if path:
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def exits_on_user_error(main: Main) -> Main:
    """Decorate a `main`: print a `UserError` or `OSError` as one line, and return exit code 2."""

    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None) -> int:
        try:
            return main(arguments)
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_MISTAKE

    return wrapped
