"""Make a page of one or several runs: `tensormask report output/a output/b`.

The page is one file of HTML, which needs no network: curves, tables, kinds of error, the best and
the worst images, config and environment.
"""

from pathlib import Path

from tensormask.commands.common import CommandParser, exits_on_user_error
from tensormask.report.page import NUM_IMAGES, write_report
from tensormask.report.runs import read_runs
from tensormask.utils.errors import UserError


def build_parser() -> CommandParser:
    """Return the parser of the command."""
    parser = CommandParser(
        "report",
        description="Make a page (HTML) of one or several runs: curves, AP by class and size, "
        "kinds of error, the best and the worst images, speed, config and environment.",
        example="output/a output/b --output compared.html",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of a run, or of an evaluation; several are compared side by side",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the page (default: report.html in the folder; of several in the current folder)",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=NUM_IMAGES,
        metavar="N",
        help=f"show the N best and the N worst images of each data set (default: {NUM_IMAGES})",
    )
    return parser


@exits_on_user_error
def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for an error of the user."""
    args = build_parser().parse_args(arguments)
    if args.images < 0:
        raise UserError(f"--images is {args.images}; give 0 or more")
    runs = read_runs(args.runs)
    folder = runs[0].folder if len(runs) == 1 else Path()
    path = write_report(runs, args.output or folder / "report.html", num_images=args.images)
    print(f"{len(runs)} runs, {path.stat().st_size / 1e6:.1f} MB: {path}")
    return 0
