"""Detection by our model, its dense path and torchvision's Mask R-CNN in turn; parts and memory."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from . import bare, options
from .floor import Product, record_products, replay
from .large_image import measure_large_images
from .memory import Calls, peak_memory
from .models import (
    OURS,
    THEIRS,
    build_mask_rcnn,
    build_tensormask,
    fill_detections,
    make_image,
    set_image_size,
    spread_detections,
)
from .parts import Part, measure_parts, module_part
from .timing import format_table, median_ratio, time_in_turn

bare.prepare()

from tensormask.modeling import mask_head, tensormask  # noqa: E402
from tensormask.modeling.mask_head import MaskHead  # noqa: E402

DENSE = "dense"
_FLOOR_OF = "convolutions of "
_MODELS = (OURS, DENSE, THEIRS)
_SMALL = (64, 64)
# What is done at detections only, after all that is dense.
_AT_WINDOWS = ("op at windows", "sigmoid", "paste")
_LIMITS = (32, 96)  # the sides of COCO's small and medium objects, in pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    options.add_options(parser, size=(480, 640), rounds=7)
    parser.add_argument(
        "--detections", type=int, default=100, metavar="N", help="per image (default: 100)"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(_MODELS),
        choices=_MODELS,
        metavar="NAME",
        help=f"{OURS}, {DENSE} (ours with masks at all windows), {THEIRS} (default: all)",
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        choices=("floor", "parts", "memory"),
        metavar="WHAT",
        help="floor (the models' convolutions alone), parts, memory",
    )
    parser.add_argument(
        "--large-image",
        action="store_true",
        help="only our memory, for an image of 6000 x 4000 px and for 400 detections",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print tables, and return their numbers.

    Raises:
        ValueError: an option does not fit, or a model finds less than it is to find.
    """
    options.configure(args)
    if args.large_image:
        return measure_large_images(args)
    models = _build_models(args)
    calls = {name: detect_call(args, name, model) for name, model in models.items()}
    results: dict[str, Any] = {"found": _check_found(args, models, calls)}
    floors = {}
    if "floor" not in args.without:
        floors = {name: record_products(calls[name]) for name in calls if name != DENSE}
    for name, model in models.items():
        if name != DENSE or OURS not in models:  # else it is the same model
            options.compile_model(args, model)
    candidates = calls | {
        f"{_FLOOR_OF}{name}": replay(products, args.device) for name, products in floors.items()
    }
    seconds = time_in_turn(candidates, rounds=args.rounds, device=args.device)
    print(f"\n{options.describe(args)}; {args.rounds} rounds in turn. `/` is a ratio of times.")
    results["times"] = _time_rows(seconds, floors)
    print(format_table(results["times"]))
    if "parts" not in args.without:
        results["parts"] = {
            name: _measure_parts(args, name, models[name], calls[name])
            for name in calls
            if name != DENSE
        }
    if "memory" not in args.without:
        results["memory"] = _measure_memory(args, models)
    return results


# ---- the models and their calls ----


def _build_models(args: argparse.Namespace) -> dict[str, nn.Module]:
    """Per name the model, with weights that find what is asked for."""
    image, models = make_image(tuple(args.size)), {}
    if {OURS, DENSE} & set(args.models):
        ours = _build(args, OURS)
        meant = spread_detections(ours, image)
        print(f"tensormask: {meant} detections are meant on levels {ours.windows.levels}")
        models |= {name: ours for name in (OURS, DENSE) if name in args.models}
    if THEIRS in args.models:
        models[THEIRS] = _build(args, THEIRS)
        fill_detections(models[THEIRS], image.to(args.device) / 255)
    return models


def _build(args: argparse.Namespace, name: str) -> nn.Module:
    if name == THEIRS:
        return build_mask_rcnn(
            tuple(args.size), args.detections, args.device, channels_last=args.channels_last
        )
    return build_tensormask(options.read_config(args, args.detections))


def detect_call(
    args: argparse.Namespace, name: str, model: nn.Module, size: tuple[int, int] | None = None
) -> Callable[[], list[dict[str, Tensor]]]:
    """A function that detects in a batch of one image, of `--size` unless told otherwise.

    Ours gets uint8, torchvision's floating numbers in 0..1, as each of them wants.
    """
    size = size or tuple(args.size)
    image = make_image(size).to(args.device)
    images = [image / 255 if name == THEIRS else image] * args.batch

    @torch.no_grad()
    def detect() -> list[dict[str, Tensor]]:
        if name == THEIRS:
            set_image_size(model, size)
            torch.compiler.cudagraph_mark_step_begin()  # as our model does it itself
            with options.autocast(args):
                return model(images)
        if name == DENSE:
            with mock.patch.object(model.mask_head, "one_by_one", _all_masks(model.mask_head)):
                return model(images)
        return model(images)

    return detect


def _all_masks(head: MaskHead) -> Callable[..., list[Tensor]]:
    """What stands for `MaskHead.one_by_one`: the masks of all windows, from which it picks."""

    def pick(features: list[Tensor], groups: list[tuple[int, int, Tensor]]) -> list[Tensor]:
        masks = head.dense(features)
        picked = []
        for level, size, windows in groups:
            n, y, x = windows.unbind(1)
            of_windows = masks[level][size][n, :, y, x]
            side = round(of_windows.shape[1] ** 0.5)
            picked.append(of_windows.unflatten(1, (side, side)))
        return picked

    return pick


def _check_found(
    args: argparse.Namespace,
    models: dict[str, nn.Module],
    calls: dict[str, Callable[[], list[dict[str, Tensor]]]],
) -> dict[str, Any]:
    """Say what each model finds in the image.

    Raises:
        ValueError: it is not `--detections` objects with masks, in each image of the batch.
    """
    found: dict[str, Any] = {}
    for name, call in calls.items():
        detections = call()
        for detection in detections:
            num_masks, mask_size = len(detection["masks"]), tuple(detection["masks"].shape[-2:])
            if num_masks != args.detections or mask_size != tuple(args.size):
                raise ValueError(
                    f"{name} has {num_masks} masks of {mask_size} px where {args.detections} of "
                    f"{tuple(args.size)} are meant: give a larger --size or fewer --detections"
                )
        if name == THEIRS:
            x0, y0, x1, y1 = detections[0]["boxes"].unbind(1)
            area = (x1 - x0) * (y1 - y0)
            small, medium = ((area < side**2).sum().item() for side in _LIMITS)
            found[name] = [small, medium - small, len(area) - medium]
            print(f"torchvision: {found[name]} small, medium and large objects found")
        else:
            with torch.no_grad():
                (detection,) = models[name].detect([make_image(tuple(args.size))])
            found[name] = count_per_level(models[name], detection["windows"])
            print(f"{name}: {found[name]} found")
    return found


def count_per_level(model: tensormask.TensorMask, windows: Tensor) -> list[int]:
    """How many of the windows (K, 4) of `TensorMask.detect` are on each level."""
    smallest = torch.tensor([min(sides) for sides in model.windows.sizes], device=windows.device)
    # A pixel for rounding: all sides are whole.
    levels = torch.searchsorted(smallest.float(), windows[:, 2] - windows[:, 0] + 1) - 1
    return torch.bincount(levels, minlength=len(smallest)).tolist()


# ---- time ----


def _time_rows(
    seconds: dict[str, list[float]], floors: dict[str, list[Product]]
) -> list[dict[str, Any]]:
    rows = []
    for name, times in seconds.items():
        model = name.removeprefix(_FLOOR_OF)
        is_floor = model != name
        products = floors.get(model)
        base = seconds.get(f"{_FLOOR_OF}{THEIRS}" if is_floor else THEIRS)
        floor = None if is_floor else seconds.get(f"{_FLOOR_OF}{name}")
        rows.append(
            {
                "model": name,
                "GFLOP": sum(p.flops for p in products) / 1e9 if products else "-",
                "median s": statistics.median(times),
                "min s": min(times),
                "/ torchvision": median_ratio(times, base) if base else "-",
                "/ convolutions": median_ratio(times, floor) if floor else "-",
            }
        )
    return rows


def _measure_parts(
    args: argparse.Namespace, name: str, model: nn.Module, call: Callable[[], object]
) -> list[dict[str, Any]]:
    parts = parts_of_mask_rcnn(model) if name == THEIRS else parts_of_tensormask(model)
    rows = measure_parts(call, parts, rounds=args.rounds, device=args.device)
    print(f"\nparts of {name}, medians; `rest` is what they do not explain")
    print(format_table(rows))
    if name == OURS:
        share = sum(row["share"] for row in rows if row["part"] in _AT_WINDOWS)
        print(f"{', '.join(_AT_WINDOWS)}: {share:.3f} of the whole")
    return rows


def parts_of_tensormask(model: tensormask.TensorMask) -> list[Part]:
    """The parts of `TensorMask.forward` in eval mode."""
    head = model.mask_head
    return [
        ("preprocess", model, "preprocess"),
        module_part("backbone", model.backbone),
        module_part("fpn", model.fpn),
        # A compiled head makes the boxes of all windows, too.
        module_part("class and box towers" if model.dense_boxes else "class tower", model.head),
        ("box tower", model.head, "deltas_at"),
        ("candidates and NMS", tensormask, "find_candidates"),
        ("candidates and NMS", tensormask, "suppress"),
        ("candidates and NMS", tensormask, "to_frame"),
        ("candidates and NMS", tensormask, "group_windows"),
        module_part("mask tower", head.mask_subnet),
        *([module_part("mask fuse", head.mask_fuse)] if head.bipyramid else []),
        *(module_part("mask_pred", layer) for layer in head.mask_pred),
        ("mask head, rest", head, "one_by_one"),
        ("op at windows", mask_head, "swap_align2nat_at"),
        ("sigmoid", tensormask, "ungroup_masks"),
        ("paste", tensormask, "with_frames"),
    ]


def parts_of_mask_rcnn(model: nn.Module) -> list[Part]:
    """The parts of `MaskRCNN.forward` in eval mode."""
    roi = model.roi_heads
    return [
        module_part("resize and normalise", model.transform),
        module_part("backbone", model.backbone.body),
        module_part("fpn", model.backbone.fpn),
        module_part("proposals", model.rpn),
        module_part("box head", roi.box_roi_pool),
        module_part("box head", roi.box_head),
        module_part("box head", roi.box_predictor),
        ("candidates and NMS", roi, "postprocess_detections"),
        module_part("mask head", roi.mask_roi_pool),
        module_part("mask head", roi.mask_head),
        module_part("mask head", roi.mask_predictor),
        module_part("sigmoid and rest", roi),
        ("paste", model.transform, "postprocess"),
    ]


# ---- memory ----


def _measure_memory(args: argparse.Namespace, models: dict[str, nn.Module]) -> list[dict[str, Any]]:
    """Per model the peak above the memory that it has after an image of 64 x 64 px, in MiB."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        for name, model in models.items():
            torch.save(model.state_dict(), weights)
            peak = peak_memory(
                f"{__name__}:memory_calls",
                args.device,
                arguments=options.as_json(args),
                name=name,
                weights=str(weights),
            )
            rows.append({"model": name, **options.in_mib(peak)})
    print("\npeak memory of a fresh process, above that after an image of 64 x 64 px")
    print(format_table(rows))
    return rows


def memory_calls(arguments: dict[str, Any], name: str, weights: str) -> Calls:
    """What `memory.peak_memory` measures: the detection by one model."""
    args = argparse.Namespace(**arguments)
    options.configure(args)
    model = _build(args, name)
    model.load_state_dict(torch.load(weights, map_location=args.device, mmap=True))
    options.compile_model(args, model)
    return detect_call(args, name, model, _SMALL), detect_call(args, name, model)
