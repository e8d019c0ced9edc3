"""Evaluate a checkpoint: `tensormask evaluate --config-file quickstart MODEL.WEIGHTS FILE`.

It is `tensormask train --eval-only`.
"""

from tensormask.commands import train
from tensormask.commands.common import CommandParser


def build_parser() -> CommandParser:
    """Return the parser of `train` without `--eval-only`."""
    return train.build_parser("evaluate")


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code, that of `train`."""
    return train.main(arguments, "evaluate")
