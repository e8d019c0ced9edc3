"""Print versions, devices and the operators in use, for bug reports: `tensormask env`."""

from tensormask.commands.common import CommandParser
from tensormask.utils.env import describe


def build_parser() -> CommandParser:
    """Return the parser of a command without options."""
    return CommandParser(
        "env",
        description="Print versions, devices, and which implementation of the operators is used "
        "on each device and why.",
        example="",
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    build_parser().parse_args(arguments)
    print(describe())
    return 0
