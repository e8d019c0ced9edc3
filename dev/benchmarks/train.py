"""A training step of our model and of torchvision's Mask R-CNN in turn; parts and memory."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import bare, options
from .memory import Calls, peak_memory
from .models import (
    OURS,
    POSITIVE_IOU,
    THEIRS,
    build_mask_rcnn,
    build_tensormask,
    make_image,
    set_image_size,
)
from .parts import Part, measure_parts, module_part
from .timing import format_table, median_ratio, time_in_turn

bare.prepare()

from tensormask.engine.precision import build_autocast  # noqa: E402
from tensormask.engine.solver import (  # noqa: E402
    build_gradient_clipper,
    build_lr_scheduler,
    build_optimizer,
)
from tensormask.engine.step import (
    TrainState,
    train_step,
)
from tensormask.modeling import tensormask  # noqa: E402
from tensormask.modeling.assignment import Assignment, assign  # noqa: E402
from tensormask.modeling.build import build_windows  # noqa: E402
from tensormask.modeling.inputs import padded_size  # noqa: E402

_MODELS = (OURS, THEIRS)
_SMALL = (64, 64)
_OBJECT_SIDES = (20, 700)  # pixels
_OBJECTS_TO_ASSIGN = 200


class Step(NamedTuple):
    """A training step, and the optimiser in it."""

    run: Callable[[], dict[str, float]]
    optimizer: torch.optim.Optimizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    options.add_options(parser, size=(800, 1344), rounds=5)
    parser.add_argument(
        "--objects", type=int, default=20, metavar="N", help="per image (default: 20)"
    )
    parser.add_argument(
        "--positive-iou",
        type=float,
        default=POSITIVE_IOU,
        metavar="IOU",
        help="from which a region of Mask R-CNN counts as positive; few of its random proposals "
        f"reach torchvision's, at 0.1 as many as it may have (default: {POSITIVE_IOU}, its own)",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(_MODELS),
        choices=_MODELS,
        metavar="NAME",
        help=f"{OURS}, {THEIRS} (default: both)",
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        choices=("parts", "memory"),
        metavar="WHAT",
        help="parts, memory",
    )
    parser.add_argument(
        "--assignment",
        action="store_true",
        help=f"only the assignment of {_OBJECTS_TO_ASSIGN} objects: its time and memory",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print tables, and return their numbers.

    Raises:
        ValueError: an option does not fit.
    """
    options.configure(args)
    if args.assignment:
        return _measure_assignment(args)
    models = {name: _build(args, name) for name in args.models}
    steps = {name: make_step(args, name, model) for name, model in models.items()}
    regions: list[int] = []
    if THEIRS in models:
        models[THEIRS].roi_heads.mask_head.register_forward_pre_hook(
            lambda _, inputs: regions.append(len(inputs[0]))
        )
    calls = {name: step.run for name, step in steps.items()}
    seconds = time_in_turn(calls, rounds=args.rounds, device=args.device)
    positives = {
        OURS: len(_assign(args, args.objects)().object) * args.batch,
        THEIRS: statistics.median(regions) if regions else 0,
    }
    print(
        f"{options.describe(args)}, {args.objects} objects; {args.rounds} rounds in turn. `/` is a "
        "ratio of times; positives are windows, and regions of the mask head."
    )
    results: dict[str, Any] = {}
    results["times"] = [
        {
            "model": name,
            "positives": positives[name],
            "median s": statistics.median(times),
            "min s": min(times),
            "/ torchvision": median_ratio(times, seconds[THEIRS]) if THEIRS in seconds else "-",
        }
        for name, times in seconds.items()
    ]
    print(format_table(results["times"]))
    if "parts" not in args.without:
        results["parts"] = {
            name: _measure_parts(args, name, models[name], step) for name, step in steps.items()
        }
    if "memory" not in args.without:
        results["memory"] = _measure_memory(args)
    return results


# ---- the step ----


def make_target(
    size: tuple[int, int], num_objects: int, num_classes: int = 80, seed: int = 0
) -> dict[str, Tensor]:
    """A seeded target: ellipses of any class, the longer axis log-uniform from 20 to 700 px.

    The shorter axis is at least half as long, and what would not fit into the image is smaller.
    """
    generator = torch.Generator().manual_seed(seed)
    longer, aspect, upright, x, y = torch.rand(5, num_objects, generator=generator)
    smallest, largest = _OBJECT_SIDES
    longer = smallest * (largest / smallest) ** longer
    shorter = longer * (1 + aspect) / 2
    height = torch.where(upright < 0.5, longer, shorter).clamp(max=size[0])
    width = torch.where(upright < 0.5, shorter, longer).clamp(max=size[1])
    x0, y0 = x * (size[1] - width), y * (size[0] - height)
    boxes = torch.stack([x0, y0, x0 + width, y0 + height], dim=1)
    rows, columns = (torch.arange(n) + 0.5 for n in size)
    across = (columns - (x0 + width / 2)[:, None]) / (width / 2)[:, None]
    down = (rows - (y0 + height / 2)[:, None]) / (height / 2)[:, None]
    masks = across[:, None, :] ** 2 + down[:, :, None] ** 2 <= 1
    labels = torch.randint(num_classes, (num_objects,), generator=generator)
    return {"boxes": boxes, "labels": labels, "masks": masks}


def _build(args: argparse.Namespace, name: str) -> nn.Module:
    if name == THEIRS:
        model = build_mask_rcnn(
            tuple(args.size),
            100,
            args.device,
            channels_last=args.channels_last,
            positive_iou=args.positive_iou,
        )
    else:
        model = build_tensormask(options.read_config(args))
    options.compile_model(args, model)
    return model.train()


def make_step(
    args: argparse.Namespace, name: str, model: nn.Module, size: tuple[int, int] | None = None
) -> Step:
    """A training step on a batch of one image and its objects, of `--size` by default."""
    size = size or tuple(args.size)
    cfg = options.read_config(args)
    image = make_image(size).to(args.device)
    target = make_target(size, args.objects, cfg.MODEL.TENSOR_MASK.NUM_CLASSES)
    # Where each of them wants its targets: ours has boxes and labels on the host.
    target["masks"] = target["masks"].to(args.device)
    if name == THEIRS:
        image = image / 255
        target["boxes"] = target["boxes"].to(args.device)
        target["labels"] = target["labels"].to(args.device) + 1
    cfg.SOLVER.BASE_LR = 0.0  # the same work, and weights that stay as they are
    optimizer = build_optimizer(cfg, model)
    context, scaler = build_autocast(cfg, torch.device(args.device))
    state = TrainState(model, optimizer, build_lr_scheduler(cfg, optimizer), scaler)
    batch = [{"image": image, "target": target, "file_name": "seeded"}] * args.batch
    clip_gradients = build_gradient_clipper(cfg)

    def run() -> dict[str, float]:
        if name == THEIRS:
            set_image_size(model, size)
        return train_step(
            state, batch, iteration=0, clip_gradients=clip_gradients, autocast=context
        )

    return Step(run, optimizer)


# ---- parts and memory ----


def _measure_parts(
    args: argparse.Namespace, name: str, model: nn.Module, step: Step
) -> list[dict[str, Any]]:
    parts = parts_of_mask_rcnn(model) if name == THEIRS else parts_of_tensormask(model)
    parts += [
        ("backward", Tensor, "backward"),
        ("optimizer", step.optimizer, "step"),
    ]
    rows = measure_parts(step.run, parts, rounds=args.rounds, device=args.device)
    print(f"\nparts of {name}, medians; `rest` is what they do not explain")
    print(format_table(rows))
    return rows


def parts_of_tensormask(model: tensormask.TensorMask) -> list[Part]:
    """The parts of `TensorMask.forward` in train mode."""
    return [
        ("preprocess", model, "preprocess"),
        ("preprocess", tensormask, "checked_target"),
        module_part("backbone", model.backbone),
        module_part("fpn", model.fpn),
        # A compiled head makes the boxes of all windows, too.
        module_part("class and box towers" if model.dense_boxes else "class tower", model.head),
        ("box tower", model.head, "deltas_at"),
        ("assignment", tensormask, "assign"),
        ("class loss", tensormask, "focal_loss_star"),
        ("box loss", tensormask, "encode_boxes"),
        ("box loss", tensormask, "box_loss"),
        module_part("mask head", model.mask_head),
        ("mask targets", tensormask, "crop_masks"),
        ("mask loss", tensormask, "mask_loss"),
    ]


def parts_of_mask_rcnn(model: nn.Module) -> list[Part]:
    """The parts of `MaskRCNN.forward` in train mode."""
    roi = model.roi_heads
    return [
        module_part("resize and normalise", model.transform),
        module_part("backbone", model.backbone.body),
        module_part("fpn", model.backbone.fpn),
        module_part("proposals and their loss", model.rpn),
        module_part("box head", roi.box_roi_pool),
        module_part("box head", roi.box_head),
        module_part("box head", roi.box_predictor),
        module_part("mask head", roi.mask_roi_pool),
        module_part("mask head", roi.mask_head),
        module_part("mask head", roi.mask_predictor),
        module_part("sampling and losses", roi),
    ]


def _measure_memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in args.models:
        peak = peak_memory(
            f"{__name__}:memory_calls", args.device, arguments=options.as_json(args), name=name
        )
        rows.append({"model": name, **options.in_mib(peak)})
    print("\npeak memory of a fresh process, above that after a step of 64 x 64 px")
    print(format_table(rows))
    return rows


def memory_calls(arguments: dict[str, Any], name: str) -> Calls:
    """What `memory.peak_memory` measures: a step of one model."""
    args = argparse.Namespace(**arguments)
    options.configure(args)
    model = _build(args, name)
    return make_step(args, name, model, _SMALL).run, make_step(args, name, model).run


# ---- the assignment ----


def _measure_assignment(args: argparse.Namespace) -> dict[str, Any]:
    call = _assign(args, _OBJECTS_TO_ASSIGN)
    (times,) = time_in_turn({"assign": call}, rounds=args.rounds, device=args.device).values()
    # On the host, whatever the device.
    peak = peak_memory(f"{__name__}:assignment_calls", arguments=options.as_json(args))
    row = {
        "objects": _OBJECTS_TO_ASSIGN,
        "windows": len(call().object),
        "median ms": 1e3 * statistics.median(times),
        **options.in_mib(peak),
    }
    print(f"assign, {args.size[0]} x {args.size[1]} px; memory above that after one object")
    print(format_table([row]))
    return {"assignment": row}


def assignment_calls(arguments: dict[str, Any]) -> Calls:
    """What `memory.peak_memory` measures: the assignment."""
    args = argparse.Namespace(**arguments)
    options.configure(args)
    return _assign(args, 1), _assign(args, _OBJECTS_TO_ASSIGN)


def _assign(args: argparse.Namespace, num_objects: int) -> Callable[[], Assignment]:
    """A function that assigns the objects of one image."""
    cfg = options.read_config(args)
    windows, (height, width) = build_windows(cfg), padded_size(*args.size, cfg.MODEL.SIZE_DIVISOR)
    grids = [(-(-height // stride), -(-width // stride)) for stride in windows.strides]
    boxes = make_target(tuple(args.size), num_objects)["boxes"]
    return lambda: assign([boxes], windows, grids)
