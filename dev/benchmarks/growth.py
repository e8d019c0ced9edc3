"""How time and memory of detection grow with the image, its objects, and the share of p2 in use.

One of the three changes, the others stay as given. In turn: our model on all of p2, our model with
a query for parts of p2 (imposed, see `sparse`), and torchvision's Mask R-CNN. Times are processor
time; peak memory is that above a call of 128 x 128 px, each in a fresh process.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks import inference, models, sparse
from benchmarks.measure import in_fresh_process, time_in_turn
from benchmarks.models import OURS, THEIRS
from tensormask.commands.benchmark import SMALL, peak_memory
from tensormask.config import CfgNode
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError
from tensormask.utils.extras import require
from tensormask.utils.tables import format_records

DENSE, QUERY = "all of p2", "query"
_NEVER = 0.9999  # a score that no made-up detection has
_LARGE = 1e6  # pixels: what a first call does once takes no time beside it
_AXES = {"megapixels": "megapixels", "objects": "objects", "share": "share of p2 asked for"}


class Point(NamedTuple):
    """What is detected: an image of a size, so many objects, in a share of p2."""

    size: tuple[int, int]
    objects: int
    share: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add = parser.add_argument
    sizes = ["256x384", "480x640", "800x1344", "1120x1888", "1600x2688", "2176x3648"]
    add("--sizes", nargs="+", default=sizes, metavar="HxW", help="pixels (default: %(default)s)")
    add("--counts", nargs="+", type=int, default=[0, 25, 100, 400], metavar="N", help="of objects")
    add(
        "--shares", nargs="+", type=float, default=[5, 20, 50, 100], metavar="PERCENT", help="of p2"
    )
    add("--share", type=float, default=20, metavar="PERCENT", help="where another changes")
    add("--plot", metavar="FILE", help="draw the numbers, too")
    sparse.add_objects_option(parser)
    models.add_options(parser, size=(800, 1344), rounds=2, without=["memory"])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table for each of the three, and return their numbers."""
    cfg = models.configure(args)[OURS]
    print(models.describe(args, cfg))
    results = {}
    for axis, points in points_of(args, cfg).items():
        rows = [measure(args, cfg, point) for point in points]
        print(f"\nby {_AXES[axis]}\n{format_records(rows)}", flush=True)
        results[axis] = rows
    if args.plot:
        draw(results, args.plot)
    return results


def points_of(args: argparse.Namespace, cfg: CfgNode) -> dict[str, list[Point]]:
    """Return the points of each axis."""
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    if any(len(size) != 2 for size in sizes):
        raise UserError(f"--sizes are HxW in pixels, such as 480x640, got {args.sizes}")
    base = Point(tuple(args.size), cfg.TEST.DETECTIONS_PER_IMAGE, args.share)
    return {
        "megapixels": [base._replace(size=size) for size in sizes],
        "objects": [base._replace(objects=count) for count in args.counts],
        "share": [base._replace(share=share) for share in args.shares],
    }


def measure(args: argparse.Namespace, cfg: CfgNode, point: Point) -> dict[str, Any]:
    """Return a row of a table: seconds of processor time and MiB of each model at a point."""
    found: dict[str, Any] = {}

    def timed(name: str) -> Callable[[], None]:
        call = call_of(args, cfg, name, point)
        return lambda: found.update({name: call()})

    small = math.prod(point.size) < _LARGE
    calls = {name: timed(name) for name in (DENSE, QUERY, THEIRS)}
    times = time_in_turn(calls, rounds=args.rounds, warmup=int(small))
    calls.clear()
    for name, detections in found.items():
        if point.objects:
            inference.check_detections(cfg_of(cfg, point), name, detections)
    seconds = {name: statistics.median(times[name]["cpu"]) for name in times}
    row: dict[str, Any] = {
        "megapixels": math.prod(point.size) / 1e6,
        "objects": point.objects,
        "share": asked_at(args, point).float().mean().item(),
    }
    row |= {f"{name} s": value for name, value in seconds.items()}
    row |= {f"{name} / {THEIRS}": seconds[name] / seconds[THEIRS] for name in (DENSE, QUERY)}
    if "memory" not in args.without:
        row |= {f"{name} MiB": in_fresh_process(peak_of, args, name, point) for name in times}
    return row


def cfg_of(cfg: CfgNode, point: Point) -> CfgNode:
    """Return a config with the number of detections of a point."""
    cfg = cfg.clone()
    if point.objects:
        cfg.TEST.DETECTIONS_PER_IMAGE = point.objects
    else:
        cfg.MODEL.TENSOR_MASK.SCORE_THRESH_TEST = _NEVER
    return cfg


def asked_at(args: argparse.Namespace, point: Point) -> Tensor:
    """Return the locations (1, H, W) of p2 that the query asks for at a point.

    Objects keep their size in pixels: those of `--size` are repeated, or cut.
    """
    size = tuple(args.size)
    asked = sparse.draw_locations(
        sparse.boxes_of_objects(args.objects, size), size, point.share / 100
    )
    height, width = Windows.of_strides([4]).grids(point.size)[0]
    rows, columns = -(-height // asked.shape[1]), -(-width // asked.shape[2])
    return asked.repeat(1, rows, columns)[:, :height, :width]


def call_of(
    args: argparse.Namespace, cfg: CfgNode, name: str, point: Point
) -> Callable[[], list[dict[str, Any]]]:
    """Return a function that detects at a point with one of the three."""
    cfg, size = cfg_of(cfg, point), point.size
    if name == THEIRS:
        model = inference.build(cfg, THEIRS, size, args.batch)
        return inference.make_call(cfg, THEIRS, model, size, args.batch)
    asked = asked_at(args, point) if name == QUERY else None
    return sparse.call_of(cfg, size, args.batch, asked, small=False)


def peak_of(args: argparse.Namespace, name: str, point: Point) -> float | None:
    """Return the peak memory of one of the three in MiB, above the model's."""
    cfg = models.configure(args)[OURS]
    call_of(args, cfg, DENSE if name == QUERY else name, point._replace(size=SMALL))()
    return peak_memory(call_of(args, cfg, name, point), cfg.MODEL.DEVICE)


def draw(results: dict[str, list[dict[str, Any]]], path: str) -> None:
    """Draw time above and memory below, a column for each axis, a line for each model."""
    figure = require("matplotlib.figure", extra="report").Figure((11, 6), layout="constrained")
    units = {"s": "processor time, s", "MiB": "peak memory, MiB"}
    if not any(key.endswith("MiB") for rows in results.values() for key in rows[0]):
        del units["MiB"]
    panels = figure.subplots(len(units), len(results), squeeze=False)
    for column, (axis, rows) in enumerate(results.items()):
        for panel, unit in zip(panels[:, column], units, strict=True):
            for name in (DENSE, QUERY, THEIRS):
                values = [row[f"{name} {unit}"] for row in rows]
                label = name if name == THEIRS else f"{OURS}, {name}"
                panel.plot([row[axis] for row in rows], values, marker="o", label=label)
            panel.set_xlabel(_AXES[axis])
            panel.set_ylabel(units[unit])
            panel.grid(alpha=0.4)
            if axis == "megapixels":
                panel.set_xscale("log"), panel.set_yscale("log")
            else:
                panel.set_ylim(bottom=0)
    panels[0, 0].legend()
    figure.savefig(path, dpi=100)
