"""Draw what a model is trained on: `python tools/visualize_data.py --config-file FILE KEY VALUE`.

Takes the config and overrides of a training, and writes a PNG per image and a montage.
"""

import argparse
import itertools
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tensormask.config import CfgNode, get_cfg
from tensormask.data import build_train_loader, get_dataset
from tensormask.modeling.assignment import Assignment, assign
from tensormask.modeling.build import build_windows
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError
from tensormask.visualization.grid import captioned, montage, shrink, side_by_side
from tensormask.visualization.instances import (
    MAX_LABELS,
    draw_instances,
    draw_windows,
    magnification,
    save_image,
    unique_stem,
)

MONTAGE = "montage.png"
SHEET_COLUMNS, SHEET_CELL_WIDTH = 2, 800
EXIT_MISTAKE = 2


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; `opts` holds the `KEY VALUE` words."""
    parser = argparse.ArgumentParser(
        description="Draw augmented training images: on the left what the model is trained on, "
        "on the right the windows that own the objects (of each level and size the most central "
        "one; of more than 40 objects the smallest). Objects that no window owns are white and "
        "crossed out.",
        epilog="example: visualize_data.py --config-file configs/quickstart.yaml --num 4 "
        "DATASETS.TRAIN \"['annotations.json@images/']\" MODEL.TENSOR_MASK.NUM_CLASSES 1",
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML config")
    parser.add_argument(
        "--output",
        default="output/data",
        metavar="DIR",
        help=f"folder for a PNG per image and {MONTAGE} (default: %(default)s)",
    )
    parser.add_argument(
        "--num", type=int, default=8, metavar="N", help="images to draw (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="draws the images of a training with SEED N, beginning with its first (default: "
        "the config's SEED, or 0 where that is negative)",
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config"
    )
    args = parser.parse_args(arguments)
    if args.num < 1:
        parser.error(f"--num is {args.num}; give 1 or more images")
    return args


def setup_config(args: argparse.Namespace) -> CfgNode:
    """Make the config that the command line asks for, with a seed and on the CPU."""
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.MODEL.DEVICE = "cpu"
    cfg.SEED = max(cfg.SEED, 0) if args.seed is None else args.seed
    return cfg


def draw_sample(sample: dict[str, Any], windows: Windows, class_names: list[str]) -> np.ndarray:
    """A sample beside the windows that own its objects."""
    rgb = sample["image"].permute(1, 2, 0).numpy()
    boxes, labels, masks = (sample["target"][key] for key in ("boxes", "labels", "masks"))
    size = rgb.shape[:2]
    crowded = len(boxes) > MAX_LABELS
    factor = max(magnification(*size), 1 + crowded)
    trained_on = draw_instances(rgb, boxes, labels, masks, class_names=class_names, magnify=factor)
    owned = assign([boxes], windows, windows.grids(size))
    drawn = windows_to_draw(owned, boxes)
    owning = draw_windows(rgb, boxes, owned.boxes[drawn], owned.object[drawn], magnify=factor)
    num_owned = len(owned.object.unique())
    titles = (
        f"{size[1]} x {size[0]} px, {len(boxes)} objects",
        f"{num_owned} of {len(boxes)} are owned by windows",
    )
    return captioned(side_by_side(trained_on, owning, titles), describe_owned(owned, windows))


def windows_to_draw(owned: Assignment, boxes: torch.Tensor) -> list[int]:
    """Rows of the windows that are drawn: of those of an object, level and size the most central.

    In crowded images, of more than 40 objects, the first of them alone, which is the smallest.
    """
    centers = (owned.boxes[:, :2] + owned.boxes[:, 2:]) / 2
    objects = boxes[owned.object]
    distances = (centers - (objects[:, :2] + objects[:, 2:]) / 2).norm(dim=1).tolist()
    drawn: dict[tuple[int, ...], int] = {}
    for row in sorted(range(len(distances)), key=distances.__getitem__):
        key = (owned.object[row], owned.level[row], owned.size[row])
        drawn.setdefault(tuple(map(int, key)), row)
    if len(boxes) <= MAX_LABELS:
        return list(drawn.values())
    smallest: dict[int, int] = {}
    for (owner, *_), row in sorted(drawn.items()):
        smallest.setdefault(owner, row)
    return list(smallest.values())


def describe_owned(owned: Assignment, windows: Windows) -> list[str]:
    """What each level and window size owns, in words."""
    texts = []
    for level, size, at in owned.groups():
        what = f"{windows.level_names[level]} {windows.sizes[level][size]:g} px"
        num_objects, num_windows = len(owned.object[at].unique()), at.stop - at.start
        texts.append(
            f"{what}: {num_objects} object{'s' * (num_objects != 1)} "
            f"in {num_windows} window{'s' * (num_windows != 1)}"
        )
    return texts


def draw(cfg: CfgNode, output: Path, num_images: int) -> int:
    """Draws the first images of a training.

    Returns:
        how many have been drawn.

    Raises:
        ValueError: as of `build_train_loader` and `build_windows`, or no image can be read.
    """
    windows = build_windows(cfg)
    batches = build_train_loader(cfg)
    samples = itertools.islice(itertools.chain.from_iterable(batches), num_images)
    class_names = get_dataset(cfg.DATASETS.TRAIN[0]).class_names
    taken: set[str] = {Path(MONTAGE).stem}
    sheet = []
    for sample in samples:
        for name, kind, identity in sample["issues"]:
            print(f"{name}: {kind} {identity}")
        if sample["image"] is None:
            raise UserError("no image can be read: is the folder of images there?")
        drawing = draw_sample(sample, windows, class_names)
        stem = unique_stem(Path(sample["file_name"]).stem, taken)
        save_image(output / f"{stem}.png", drawing)
        sheet.append(shrink(drawing, SHEET_CELL_WIDTH))
    save_image(output / MONTAGE, montage(sheet, SHEET_COLUMNS))
    return len(sheet)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and give its exit code: 2 for a user's mistake."""
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = Path(args.output)
    try:
        num_drawn = draw(setup_config(args), output, args.num)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    print(f"{num_drawn} images written to {output}")
    return 0
