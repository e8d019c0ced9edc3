"""Convert a data set to COCO's format: `tensormask convert-data FOLDER --split 0.8`."""

from pathlib import Path

from tensormask.commands.common import CommandParser, exits_on_user_error
from tensormask.data.formats.convert import READERS, Converted, convert, report


def build_parser() -> CommandParser:
    """Return the parser of the command."""
    parser = CommandParser(
        "convert-data",
        description="Convert the annotations of a data set to COCO's format. The images stay where "
        "they are.",
        epilog="Without --split, the splits of the set are kept. What is wrong is counted and "
        "reported.",
        example="cells/ --format label-images --classes cell --split 0.8",
    )
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help="the folder, or its data.yaml, JSON or XML file")
    add("--format", choices=READERS, default="", help="default: what the files show")
    add("--output", type=Path, metavar="FOLDER", help="for the annotations (default: INPUT)")
    add("--split", type=float, metavar="SHARE", help="share of the images for training, by class")
    add("--seed", type=int, default=0, metavar="N", help="of --split (default: 0)")
    add(
        "--classes",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names of the classes in the order of their numbers, where the set has none",
    )
    add(
        "--traced",
        action="store_true",
        help="the polygons run through the centers of the outermost pixels (cv2.findContours)",
    )
    return parser


@exits_on_user_error
def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for an error of the user."""
    args = build_parser().parse_args(arguments)
    converted = convert(
        args.input,
        args.format,
        output=args.output,
        split=args.split,
        seed=args.seed,
        class_names=args.classes,
        traced=args.traced,
    )
    print("\n".join(describe(converted)))
    return 0


def describe(converted: Converted) -> list[str]:
    """Format what was written, what was left out, and how to train on it."""
    lines, splits = [], list(converted.names)
    for split, name in converted.names.items():
        objects = converted.num_objects[split]
        lines.append(f"{converted.num_images[split]} images, {objects.total()} objects: {name}")
    names = converted.source.class_names
    width = max(map(len, [*names, "class"]))
    lines.append(f"{'class':{width}}" + "".join(f"  {split or 'objects':>8}" for split in splits))
    for name in names:
        counts = [converted.num_objects[split][name] for split in splits]
        lines.append(f"{name:{width}}" + "".join(f"  {count:8}" for count in counts))
    lines += report(converted.source)
    overrides = f"  DATASETS.TRAIN \"['{converted.names[splits[0]]}']\""
    if "val" in splits:
        overrides += f" DATASETS.TEST \"['{converted.names['val']}']\""
    else:
        lines.append("There are no images for validation: --split 0.8 chooses some.")
    overrides += f" MODEL.TENSOR_MASK.NUM_CLASSES {len(names)}"
    return [*lines, "Overrides to train on it:", overrides]
