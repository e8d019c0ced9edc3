"""Draw training images: `tensormask visualize data --config-file FILE KEY VALUE`.

Takes the config and overrides of a training, and writes a PNG per image and a montage.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tensormask.commands.common import (
    CommandParser,
    add_config_file,
    add_overrides,
    exits_on_user_error,
    log_to_stderr,
    read_config,
)
from tensormask.config import CfgNode
from tensormask.data import build_train_loader, get_dataset
from tensormask.modeling.assigners import Assigner
from tensormask.modeling.assignment import Assignment
from tensormask.modeling.build import build_assigner, build_windows
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError
from tensormask.visualization.grid import captioned, montage, shrink, side_by_side
from tensormask.visualization.instances import (
    draw_instances,
    draw_windows,
    magnification,
    save_image,
    unique_stem,
)

MONTAGE = "montage.png"
CROWDED = 40  # objects: of more, only the smallest window each
MONTAGE_COLUMNS, MONTAGE_CELL_WIDTH = 2, 800


def build_parser() -> CommandParser:
    """Return the parser of the command."""
    parser = CommandParser(
        "visualize data",
        description="Draw augmented training images: on the left the objects to train on, on the "
        "right the windows that match them (per level and size the most central one; with more "
        "than 40 objects only the smallest). Objects that match no window are white and crossed "
        "out.",
        example="--config-file quickstart --num 4 "
        "DATASETS.TRAIN \"['annotations.json@images/']\" MODEL.TENSOR_MASK.NUM_CLASSES 1",
    )
    add_config_file(parser)
    parser.add_argument(
        "--output",
        default="output/data",
        metavar="DIR",
        help=f"folder for a PNG per image and {MONTAGE} (default: %(default)s)",
    )
    parser.add_argument(
        "--num", type=int, default=8, metavar="N", help="images to draw (default: %(default)s)"
    )
    seed_help = "SEED of the training (default: the config's SEED, or 0 if it is negative)"
    parser.add_argument("--seed", type=int, metavar="N", help=seed_help)
    add_overrides(parser)
    return parser


def draw_sample(
    sample: dict[str, Any], windows: Windows, assigner: Assigner, class_names: list[str]
) -> np.ndarray:
    """Draw a sample beside the windows that match its objects."""
    rgb = sample["image"].permute(1, 2, 0).numpy()
    boxes, labels, masks = (sample["target"][key] for key in ("boxes", "labels", "masks"))
    height, width = rgb.shape[:2]
    factor = max(magnification(height, width), 1 + (len(boxes) > CROWDED))
    objects = draw_instances(rgb, boxes, labels, masks, class_names=class_names, magnify=factor)
    assignment = assigner([boxes], windows, windows.grids((height, width)))
    rows = windows_to_draw(assignment, boxes)
    drawn, matched = assignment.boxes[rows], assignment.object[rows]
    matches = draw_windows(rgb, boxes, drawn, matched, magnify=factor)
    num_matched = len(assignment.object.unique())
    left = f"{width} x {height} px, {len(boxes)} objects"
    titles = left, f"{num_matched} of {len(boxes)} match a window"
    drawing = side_by_side(objects, matches, titles)
    return captioned(drawing, describe_assignment(assignment, windows))


def windows_to_draw(assignment: Assignment, boxes: torch.Tensor) -> list[int]:
    """Return the rows of the windows to draw: per object, level and size the most central one.

    In crowded images, of more than 40 objects, only the smallest of these windows per object.
    """
    centers = (assignment.boxes[:, :2] + assignment.boxes[:, 2:]) / 2
    objects = boxes[assignment.object]
    distances = (centers - (objects[:, :2] + objects[:, 2:]) / 2).norm(dim=1).tolist()
    drawn: dict[tuple[int, ...], int] = {}
    for row in sorted(range(len(distances)), key=distances.__getitem__):
        key = (assignment.object[row], assignment.level[row], assignment.size[row])
        drawn.setdefault(tuple(map(int, key)), row)
    if len(boxes) <= CROWDED:
        return list(drawn.values())
    smallest: dict[int, int] = {}
    for (index, *_), row in sorted(drawn.items()):
        smallest.setdefault(index, row)
    return list(smallest.values())


def describe_assignment(assignment: Assignment, windows: Windows) -> list[str]:
    """Format how many objects match how many windows of each level and size."""
    texts = []
    for level, size, at in assignment.groups():
        name = f"{windows.level_names[level]} {windows.sizes[level][size]:g} px"
        num_objects, num_windows = len(assignment.object[at].unique()), at.stop - at.start
        matched = f"{num_objects} object{'s' * (num_objects != 1)}"
        texts.append(f"{name}: {matched} in {num_windows} window{'s' * (num_windows != 1)}")
    return texts


def draw(cfg: CfgNode, output: Path, num_images: int) -> int:
    """Draw the first images of a training, and return their number.

    Raises:
        UserError: as of `build_train_loader`, `build_windows` and `build_assigner`, or an image
            cannot be read.
    """
    windows, assigner = build_windows(cfg), build_assigner(cfg)
    batches = build_train_loader(cfg)
    samples = itertools.islice(itertools.chain.from_iterable(batches), num_images)
    class_names = get_dataset(cfg.DATASETS.TRAIN[0]).class_names
    taken: set[str] = {Path(MONTAGE).stem}
    thumbnails = []
    for sample in samples:
        for name, kind, identity in sample["issues"]:
            print(f"{name}: {kind} {identity}")
        if sample["image"] is None:
            raise UserError("no image can be read: check the folder of images")
        drawing = draw_sample(sample, windows, assigner, class_names)
        stem = unique_stem(Path(sample["file_name"]).stem, taken)
        save_image(output / f"{stem}.png", drawing)
        thumbnails.append(shrink(drawing, MONTAGE_CELL_WIDTH))
    save_image(output / MONTAGE, montage(thumbnails, MONTAGE_COLUMNS))
    return len(thumbnails)


@exits_on_user_error
def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = build_parser().parse_args(arguments)
    if args.num < 1:
        raise UserError(f"--num is {args.num}; give 1 or more images")
    log_to_stderr()
    cfg = read_config(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu"])
    cfg.SEED = max(cfg.SEED, 0) if args.seed is None else args.seed
    num_drawn = draw(cfg, Path(args.output), args.num)
    print(f"{num_drawn} images written to {args.output}")
    return 0
