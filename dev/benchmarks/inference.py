"""Detection by our model and torchvision's Mask R-CNN in turn; floor, parts and memory."""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.measure import compare, median_ratio, time_in_turn
from benchmarks.models import THEIRS
from benchmarks.parts import measure_parts, parts_of
from benchmarks.products import record_products, replay
from tensormask.commands.benchmark import SMALL, detect_call, peak_memory
from tensormask.commands.synthetic import make_image, make_up_scores
from tensormask.config import CfgNode
from tensormask.modeling.build import autocast_dtype
from tensormask.utils.errors import UserError
from tensormask.utils.tables import format_records

_FLOOR = "convolutions of "
Size = tuple[int, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    tables = ("floor", "parts", "memory")
    models.add_options(parser, size=(480, 640), rounds=7, without=tables, choose_models=True)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print tables, and return their numbers."""
    configs, base = models.configure(args), models.base_of(args)
    size, built, calls, products = tuple(args.size), {}, {}, {}
    for name, cfg in configs.items():
        built[name] = build(cfg, name, size, args.batch)
        calls[name] = make_call(cfg, name, built[name], size, args.batch)
        check_detections(cfg, name, calls[name]())
        if "floor" not in args.without:  # recorded from a model that is not compiled
            eager = cfg.clone()
            eager.MODEL.COMPILE = ""
            model = build(eager, name, size, args.batch)
            products[name] = record_products(make_call(eager, name, model, size, args.batch))
    floors = {f"{_FLOOR}{name}": replay(p, cfg.MODEL.DEVICE) for name, p in products.items()}
    times = time_in_turn(calls | floors, rounds=args.rounds)
    rows = [compare(times, name, base) for name in calls]
    for row, name in zip(rows, products, strict=False):
        floor = times[f"{_FLOOR}{name}"]["wall"]
        row["its convolutions s"] = sorted(floor)[len(floor) // 2]
        row["/ its convolutions"] = median_ratio(times[name]["wall"], floor)
        row["GFLOP"] = sum(product.flops for product in products[name]) / 1e9
    print(models.describe(args, cfg))
    print(format_records(rows))
    results: dict[str, Any] = {"times": rows}
    if "parts" not in args.without:
        results["parts"] = {}
        for name, call in calls.items():
            parts = measure_parts(call, parts_of(built[name]), rounds=args.rounds)
            results["parts"][name] = parts
            print(f"\nparts of {name}, medians\n{format_records(parts)}")
    if "memory" not in args.without:
        results["memory"] = models.measure_memory(args, peak_of_detection)
    return results


def peak_of_detection(args: argparse.Namespace, name: str) -> float | None:
    """Return the peak memory of one model in MiB, above the model's."""
    cfg, size = models.configure(args)[name], tuple(args.size)
    model = build(cfg, name, size, args.batch)
    call = make_call(cfg, name, model, size, args.batch)
    call()  # makes up the scores, which are no memory of the model
    make_call(cfg, name, model, SMALL, args.batch)()
    return peak_memory(call, cfg.MODEL.DEVICE)


def build(cfg: CfgNode, name: str, size: Size, batch: int) -> Any:
    """Build one of the models, with made-up scores."""
    model = models.build_model(cfg, name, size)
    if name == THEIRS:
        models.make_up_mask_rcnn_scores(model, size, batch)
    else:
        make_up_scores(model)
    return model


def make_call(
    cfg: CfgNode, name: str, model: Any, size: Size, batch: int
) -> Callable[[], list[dict[str, Tensor]]]:
    """Return a function that detects in a batch of one image."""
    image = make_image(size).to(cfg.MODEL.DEVICE)
    call = detect_call(model, [image / 255 if name == THEIRS else image] * batch)
    dtype = autocast_dtype("TEST.AMP", cfg.TEST.AMP)

    def theirs() -> list[dict[str, Tensor]]:
        models.set_image_size(model, size)
        torch.compiler.cudagraph_mark_step_begin()  # our model does it itself
        with torch.autocast(image.device.type, dtype) if dtype else nullcontext():
            return call()

    return theirs if name == THEIRS else call


def check_detections(cfg: CfgNode, name: str, detections: list[dict[str, Tensor]]) -> None:
    """Raise UserError if a model has clearly fewer detections than it may; a few may be empty."""
    wanted, least = cfg.TEST.DETECTIONS_PER_IMAGE, min(len(d["scores"]) for d in detections)
    if least < 0.95 * wanted:
        raise UserError(
            f"{name} has {least} detections, not the {wanted} of TEST.DETECTIONS_PER_IMAGE: give "
            "a larger --size or fewer detections"
        )
