"""Detection with a query for parts of p2, against all of p2 and torchvision's Mask R-CNN, in turn.

What the query asks for is imposed: locations around the small objects of a data set's images, which
are laid over each other until they have a share of p2. All models have as many candidates and
detections. Those of ours on p2 are where the query asks for them.
"""

import argparse
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import inference, models
from benchmarks.measure import compare, time_in_turn
from benchmarks.models import OURS, THEIRS
from tensormask.commands.benchmark import detect_call
from tensormask.commands.synthetic import make_image, make_up_logits
from tensormask.config import CfgNode
from tensormask.data import get_dataset
from tensormask.modeling.assignment import assign
from tensormask.modeling.cells import cells_of_layers
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError
from tensormask.utils.tables import format_records

Size = tuple[int, int]
_DATA = "/work/shared/data/coco_cc/instances_{0}.json@/work/shared/data/coco_cc/{0}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[5, 10, 20, 100], metavar="PERCENT", help="of p2"
    )
    add_objects_option(parser)
    parser.add_argument(
        "--small", action="store_true", help="all detections are on p2, none on coarser levels"
    )
    models.add_options(parser, size=(800, 1344), rounds=3)


def add_objects_option(parser: argparse.ArgumentParser) -> None:
    """Add `--objects`, the data sets of `boxes_of_objects`."""
    parser.add_argument(
        "--objects",
        nargs="+",
        default=[_DATA.format("train"), _DATA.format("val")],
        metavar="DATASET",
        help="whose small objects are where the query asks for p2",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return its numbers."""
    cfg, size = models.configure(args)[OURS], tuple(args.size)
    theirs = inference.build(cfg, THEIRS, size, args.batch)
    calls: dict[str, Callable[[], Any]] = {
        THEIRS: inference.make_call(cfg, THEIRS, theirs, size, args.batch),
        "all of p2": call_of(cfg, size, args.batch, None, small=args.small),
    }
    rows = []
    boxes = boxes_of_objects(args.objects, size)
    shares = {}
    for share in args.shares:
        asked = draw_locations(boxes, size, share / 100)
        name = f"query, {share:g} %"
        calls[name] = call_of(cfg, size, args.batch, asked, small=args.small)
        layers = cells_of_layers(cfg.MODEL.TENSOR_MASK.NUM_CONVS + 1, asked)
        computed = [16 * len(cells.n) / asked.numel() for cells in layers]
        shares[name] = asked.float().mean().item(), sum(computed) / len(computed)
    for name, call in calls.items():
        inference.check_detections(cfg, name, call())
    times = time_in_turn(calls, rounds=args.rounds, warmup=0)
    for name in calls:
        row = compare(times, name, THEIRS)
        row["/ all of p2"] = compare(times, name, "all of p2")["CPU / base"]
        row["asked for"], row["computed"] = shares.get(name, (1.0, 1.0))
        rows.append(row)
    print(models.describe(args, cfg))
    print("`asked for`: share of p2; `computed`: in the class tower, with borders")
    print(format_records(rows))
    return {"times": rows}


def call_of(
    cfg: CfgNode, size: Size, batch: int, asked: Tensor | None, *, small: bool
) -> Callable[[], list[dict[str, Tensor]]]:
    """Return a function that detects with our model, with a query for `asked` unless it is None."""
    cfg = cfg.clone()
    cfg.MODEL.TENSOR_MASK.QUERY_ON = asked is not None
    model = models.build_model(cfg, OURS, size)
    logits = make_up_logits(model, size, finest_only=small)
    if asked is not None:
        logits[0] = move_logits(logits[0], asked[0])
        vars(model.head.query)["asked"] = lambda *_: asked.expand(batch, -1, -1)
    outputs_of = model._detection_outputs

    def made_up(images: list[Tensor]) -> Any:
        outputs, finest = outputs_of(images)
        return outputs._replace(logits=[x.expand(batch, *x.shape) for x in logits]), finest

    vars(model)["_detection_outputs"] = made_up
    return detect_call(model, [make_image(size)] * batch)


def move_logits(logits: Tensor, asked: Tensor) -> Tensor:
    """Move the logits (C, H, W) that can be candidates to random locations that are asked for."""
    channel, y, x = torch.where(logits > logits.min())
    values = logits[channel, y, x]
    rows, columns = torch.where(asked)
    generator = torch.Generator().manual_seed(0)
    place = torch.randint(len(rows), (len(values),), generator=generator)
    moved = torch.full_like(logits, logits.min().item())
    moved[channel, rows[place], columns[place]] = values
    return moved


def boxes_of_objects(names: list[str], size: Size) -> list[Tensor]:
    """Return the boxes (K, 4) of each image with objects, scaled to fit into a size."""
    boxes = []
    for name in names:
        dataset = get_dataset(name)
        for index in range(len(dataset)):
            image, annotations = dataset.record(index)
            corner_and_size = [a["bbox"] for a in annotations if not a.get("iscrowd")]
            own = torch.tensor(corner_and_size, dtype=torch.float).view(-1, 4)
            scale = min(size[0] / image["height"], size[1] / image["width"])
            own[:, 2:] += own[:, :2]
            boxes.append(own * scale)
    return [b for b in boxes if len(b)]


def draw_locations(boxes: list[Tensor], size: Size, share: float) -> Tensor:
    """Return locations of p2 that make up a share of it, as a query asks for them.

    Images are drawn at random and flipped at random. The query asks for each location of p3 with a
    positive window of p2 below, and for its 8 neighbors.

    Returns:
        Tensor[1, H, W]: bool.

    Raises:
        UserError: all objects together do not have the share.
    """
    windows, generator = Windows.of_strides([4, 8, 16, 32, 64, 128]), random.Random(0)
    grids = windows.grids(size)
    height, width = grids[0]
    asked = torch.zeros(1, 1, *grids[1])
    if share >= 1:
        return torch.ones(1, height, width, dtype=torch.bool)
    extent = torch.tensor([size[1], size[0]] * 2)
    for _ in range(1000):
        box = generator.choice(boxes)
        for axis in (0, 1):
            if generator.random() < 0.5:
                flipped = (extent - box)[:, [2, 3, 0, 1]]
                box = box.clone()
                box[:, axis::2] = flipped[:, axis::2]
        found = assign([box], windows, grids)
        finest = found.levels()[0]
        positive = torch.zeros(1, 1, height, width)
        positive[0, 0, found.y[finest], found.x[finest]] = 1
        around = F.max_pool2d(F.max_pool2d(positive, 2, ceil_mode=True), 3, 1, 1)
        more = torch.maximum(asked, around)
        if more.mean() > share:
            return F.interpolate(asked, scale_factor=2)[:, 0, :height, :width] > 0
        asked = more
    raise UserError(f"the objects do not have {share:.0%} of p2: give other --objects")
