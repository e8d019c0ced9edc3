"""A training step of our model and of torchvision's Mask R-CNN in turn; memory."""

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks import models
from benchmarks.measure import compare, time_in_turn
from benchmarks.models import THEIRS
from tensormask.commands.benchmark import SMALL, make_samples, peak_memory, training_step
from tensormask.commands.synthetic import make_target
from tensormask.config import CfgNode
from tensormask.modeling.build import build_assigner, build_windows
from tensormask.utils.tables import format_records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--objects", type=int, default=20, metavar="N", help="per image")
    parser.add_argument(
        "--positive-iou",
        type=float,
        default=0.5,
        metavar="IOU",
        help="threshold of Mask R-CNN's positive regions; few of its random proposals reach "
        "torchvision's 0.5, and at 0.1 it has as many as it may have (default: 0.5)",
    )
    models.add_options(parser, size=(800, 1344), rounds=5, without=["memory"], choose_models=True)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print tables, and return their numbers."""
    configs, size = models.configure(args), tuple(args.size)
    regions: list[int] = []
    calls, positives = {}, {}
    for name, cfg in configs.items():
        model, step = make_step(args, cfg, name)
        calls[name] = functools.partial(step, size)
        if name == THEIRS:
            model.roi_heads.mask_head.register_forward_pre_hook(
                lambda _, inputs: regions.append(len(inputs[0]))
            )
        else:
            windows, boxes = build_windows(cfg), make_target(size, args.objects)["boxes"]
            assignment = build_assigner(cfg)([boxes], windows, windows.grids(size))
            positives[name] = args.batch * len(assignment.object)
    times = time_in_turn(calls, rounds=args.rounds)
    # Windows of ours, and regions of torchvision's mask head.
    positives[THEIRS] = statistics.median(regions or [0])
    base = models.base_of(args)
    rows = [{**compare(times, n, base), "positives": positives[n]} for n in times]
    print(models.describe(args, next(iter(configs.values()))))
    print(format_records(rows))
    memory = "memory" not in args.without
    return {"times": rows, "memory": models.measure_memory(args, peak_of_step) if memory else []}


def make_step(
    args: argparse.Namespace, cfg: CfgNode, name: str
) -> tuple[Any, Callable[[tuple[int, int]], dict[str, float]]]:
    """Return a model in train mode, and a step of it on images of a size."""
    options = {"positive_iou": args.positive_iou} if name == THEIRS else {}
    model = models.build_model(cfg, name, tuple(args.size), **options).train()
    step = training_step(cfg, model)

    @functools.cache
    def samples(size: tuple[int, int]) -> list[dict]:
        batch = make_samples(cfg, size, args.batch, args.objects)
        return [_for_torchvision(batch[0])] * args.batch if name == THEIRS else batch

    def run_step(size: tuple[int, int]) -> dict[str, float]:
        if name == THEIRS:
            models.set_image_size(model, size)
        return step(samples(size))

    return model, run_step


def _for_torchvision(sample: dict) -> dict:
    """Return a sample as torchvision takes it: pixels in 0..1, labels from 1, all on the device."""
    image, target = sample["image"], sample["target"]
    target = {key: value.to(image.device) for key, value in target.items()}
    return {**sample, "image": image / 255, "target": {**target, "labels": target["labels"] + 1}}


def peak_of_step(args: argparse.Namespace, name: str) -> float | None:
    """Return the peak memory of a step in MiB, above the model's and its optimizer's."""
    cfg = models.configure(args)[name]
    _, step = make_step(args, cfg, name)
    step(SMALL)
    return peak_memory(lambda: step(tuple(args.size)), cfg.MODEL.DEVICE)
