"""Print versions, devices and the operators in use, for bug reports: `tensormask env`."""

from tensormask.checkpoint.downloads import has_packaged_file
from tensormask.checkpoint.zoo import PACKAGED
from tensormask.commands.common import CommandParser
from tensormask.utils.env import describe


def build_parser() -> CommandParser:
    """Return the parser of a command without options."""
    return CommandParser(
        "env",
        description="Print versions, devices, which implementation of the operators is used on "
        "each device and why, and the model of predict without --weights.",
        example="",
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    build_parser().parse_args(arguments)
    print(describe())
    model = f"{PACKAGED} (cell nuclei)" if has_packaged_file() else "none: predict needs --weights"
    print(f"{'packaged model':<24} {model}")
    return 0
