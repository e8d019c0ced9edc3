#!/usr/bin/env python
"""Train our model and torchvision's Mask R-CNN alike, from random weights, and score both.

    python dev/compare_maskrcnn.py --results output/compare/runs.jsonl --data nuclei \\
        --model v1 maskrcnn maskrcnn_narrow --lr 0.0005 0.001 0.002 --cpu-seconds 300

Both have a ResNet-18 with FPN, the same images, crops, batches, optimizer and schedule, and are
evaluated by the same code. A budget is a number of steps, or the CPU seconds of the steps (not of
loading images); the schedule follows the share of the budget that is spent. Each run is a line in
the file of results, and runs that are there are skipped. Tables: `--table`; drawings: `--draw`.
"""

import argparse
import itertools
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.measure import in_fresh_process
from experiments.drawing import draw_comparison
from experiments.mask_rcnn import WIDTHS, MaskRCNNAdapter
from experiments.plot import plot_comparison
from experiments.runs import (
    append_run,
    choose_runs,
    find_run,
    group_seeds,
    markdown,
    score,
    summarize,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchvision.ops import masks_to_boxes

from tensormask.commands.common import exits_on_user_error
from tensormask.config import CfgNode, get_cfg
from tensormask.data import build_test_loader, build_train_loader, get_dataset
from tensormask.engine.precision import build_autocast
from tensormask.engine.solver import (
    build_ema,
    build_gradient_clipper,
    build_optimizer,
    cosine_factor,
    with_warmup,
)
from tensormask.engine.step import TrainState, train_step
from tensormask.evaluation.coco import RESULTS_FILE, evaluate
from tensormask.modeling import build_model
from tensormask.utils.random import seed_everything

NUCLEI = "../shared/data/nuclei_dsb2018"
CROP = 128  # pixels of a side, of nuclei: small enough for 3 CPU seconds a step of Mask R-CNN
WARMUP_SHARE = 0.05  # of the budget
CURVE_POINTS = 20
# Sides of Mask R-CNN's anchors on p2 to p6. Its default has one for each level, from 8 times the
# stride; of the nuclei, 0.27 have an IoU above 0.7 with one of (16,), (32,), ..., 0.12 with
# one of (8,), (16,), ..., and 0.50 with one of these.
ANCHORS = ((10, 16, 24), (32, 40, 48), (64, 80, 96), (112, 128, 144), (160, 192, 224))
# torchvision's default, 512, is for whole images. At 128 px an image holds few objects, and with
# 512 most of a step is the mask head's convolutions.
REGIONS = 128
# Of all models. At 256 px half of the nuclei are longer than 22 px, and a twentieth than 42 px.
DATA_OVERRIDES: dict[str, list[Any]] = {
    "shapes": ["SOLVER.IMS_PER_BATCH", 4],
    "nuclei": [
        *("MODEL.TENSOR_MASK.NUM_CLASSES", 1),
        *("INPUT.MIN_SIZE_TRAIN", [256], "INPUT.MAX_SIZE_TRAIN", 640),
        *("INPUT.MIN_SIZE_TEST", 256, "INPUT.MAX_SIZE_TEST", 640),
        *("SOLVER.IMS_PER_BATCH", 2),
        *("TEST.DETECTIONS_PER_IMAGE", 400, "TEST.MAX_DETS", 400),
    ],
}
# Of v1 on nuclei: as for the nuclei of the package, whose batches are small, too. The norm is also
# that of Mask R-CNN's trunk.
V1_OVERRIDES: dict[str, list[Any]] = {
    "shapes": [],
    "nuclei": [
        *("MODEL.RESNETS.NORM", "GN"),
        *("MODEL.TENSOR_MASK.IN_FEATURES", ["p2", "p3", "p4"]),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[28, 36], [56, 72], [112, 144]]),
    ],
}

# Of v2: the augmentation of the others, where its config has its own.
V2_OVERRIDES: dict[str, list[Any]] = {
    "shapes": [],
    "nuclei": [
        *("INPUT.SCALE_JITTER", [], "INPUT.RANDOM_FLIP", "horizontal", "INPUT.ROTATE_90", False)
    ],
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--results", type=Path, required=True, metavar="FILE", help="JSON lines")
    add("--data", choices=list(DATA_OVERRIDES), required=True)
    add("--nuclei", default=NUCLEI, metavar="FOLDER", help="nuclei_dsb2018 (default: %(default)s)")
    add("--model", nargs="+", choices=["v1", "v2", *WIDTHS], required=True)
    add(
        "--config-file",
        metavar="NAME",
        help="of v2; v1 and Mask R-CNN: data, optimizer and norm of the trunk "
        "(default: quickstart_paper; of v2 quickstart, on nuclei nuclei)",
    )
    add("--lr", nargs="+", type=float, default=[0.001])
    add("--seed", nargs="+", type=int, default=[1])
    add(
        "--regions",
        type=int,
        default=REGIONS,
        help="of Mask R-CNN's second stage, an image in training (default: %(default)s)",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int)
    budget.add_argument("--cpu-seconds", type=float, help="of training steps, without loading")
    add("--table", action="store_true", help="only print the runs of these models in FILE")
    add("--draw", type=Path, metavar="IMAGE", help="only draw the best runs with this budget")
    add("--plot", type=Path, metavar="IMAGE", help="only plot the runs with --lr")
    add("--opts", nargs="*", default=[], metavar="KEY VALUE", help="overrides, of all models")
    args = parser.parse_args(arguments)
    if not (args.table or args.draw or args.plot or args.steps or args.cpu_seconds):
        parser.error("give --steps or --cpu-seconds")
    return args


def settings_of(args: argparse.Namespace, model: str, lr: float, seed: int) -> dict[str, Any]:
    """Return all that a run depends on."""
    own_config = "nuclei" if args.data == "nuclei" else "quickstart"
    config = args.config_file or (own_config if model == "v2" else "quickstart_paper")
    own = V2_OVERRIDES if model == "v2" else V1_OVERRIDES
    overrides = [*DATA_OVERRIDES[args.data], *own[args.data]]
    return {
        "model": model,
        "data": args.data,
        "config": config,
        "overrides": [str(word) for word in overrides],
        "opts": args.opts,
        "crop": CROP if args.data == "nuclei" else 0,
        "anchors": ANCHORS if model in WIDTHS else (),
        "regions": args.regions if model in WIDTHS else 0,
        "lr": lr,
        "seed": seed,
        "steps": args.steps,
        "cpu_seconds": args.cpu_seconds,
    }


def build_config(settings: dict[str, Any], nuclei: str) -> CfgNode:
    """Return the config of a run."""
    cfg = get_cfg()
    cfg.merge_from_file(settings["config"])
    if settings["data"] == "nuclei":
        for split, key in (("train", "TRAIN"), ("val", "TEST")):
            name = f"{nuclei}/instances_{split}.json@{nuclei}/{split}"
            cfg.merge_from_list([f"DATASETS.{key}", str([name])])
    cfg.merge_from_list([*settings["overrides"], *settings["opts"]])
    # No workers: their time would not count, but slow down a machine with few cores.
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0"])
    cfg.merge_from_list(["SOLVER.BASE_LR", str(settings["lr"]), "SEED", str(settings["seed"])])
    cfg.freeze()
    return cfg


def build(cfg: CfgNode, settings: dict[str, Any]) -> nn.Module:
    """Return the model of a run, with random weights."""
    if settings["model"] not in WIDTHS:
        return build_model(cfg)
    return MaskRCNNAdapter(
        settings["model"],
        norm=cfg.MODEL.RESNETS.NORM,
        num_classes=cfg.MODEL.TENSOR_MASK.NUM_CLASSES,
        anchor_sizes=settings["anchors"],
        num_regions=settings["regions"],
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
        score_threshold=cfg.MODEL.TENSOR_MASK.SCORE_THRESH_TEST,
        num_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
    )


def crop_sample(sample: dict[str, Any], rng: np.random.Generator, *, side: int) -> dict[str, Any]:
    """Crop a training sample at random; objects without 2 px of width and height are left out."""
    image, target = sample["image"], sample["target"]
    y, x = (int(rng.integers(max(0, length - side) + 1)) for length in image.shape[1:])
    region = (slice(None), slice(y, y + side), slice(x, x + side))
    masks = target["masks"][region]
    kept = masks.any(dim=(1, 2))
    masks, labels = masks[kept], target["labels"][kept]
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1  # the last pixel is inside
    large = (boxes[:, 2:] - boxes[:, :2] >= 2).all(dim=1)
    target = {"boxes": boxes[large], "labels": labels[large], "masks": masks[large]}
    return {**sample, "image": image[region].contiguous(), "target": target}


def train(cfg: CfgNode, settings: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Train a model for its budget of steps or seconds, and return what it took."""
    spent, steps = 0.0, 0

    def progress(_: int = 0) -> float:
        return steps / settings["steps"] if settings["steps"] else spent / settings["cpu_seconds"]

    optimizer = build_optimizer(cfg, model)
    factor = with_warmup(
        partial(cosine_factor, max_iter=1, end_factor=0.0),
        iterations=WARMUP_SHARE,
        start_factor=cfg.SOLVER.WARMUP_FACTOR,
        method="linear",
    )
    scheduler = LambdaLR(optimizer, lambda _: factor(min(1.0, progress())))
    ema = build_ema(cfg, model)
    autocast, scaler = build_autocast(cfg, torch.device("cpu"))
    state = TrainState(model, optimizer, scheduler, scaler, ema)
    crop = partial(crop_sample, side=settings["crop"]) if settings["crop"] else None
    batches, clip = build_train_loader(cfg, mapper=crop), build_gradient_clipper(cfg)
    curve, recent, started = [], [], time.perf_counter()
    model.train()
    while progress() < 1:
        batch = next(batches)
        begin = time.process_time()
        metrics = train_step(state, batch, iteration=steps, clip_gradients=clip, autocast=autocast)
        spent, steps = spent + time.process_time() - begin, steps + 1
        recent.append(metrics)
        if progress() >= (len(curve) + 1) / CURVE_POINTS:
            names = [name for name in metrics if "loss" in name or name == "grad_norm"]
            means = {name: statistics.fmean(m[name] for m in recent) for name in names}
            curve.append({"steps": steps, "cpu_seconds": spent, **means})
            recent = []
            print(f"{steps} steps, {spent:.0f} CPU s, loss {means['total_loss']:.3f}", flush=True)
    if ema is not None:  # evaluated in place of the weights
        model.load_state_dict(ema.module.state_dict())
    wall = time.perf_counter() - started
    return {"steps": steps, "train_cpu_seconds": spent, "wall_seconds": wall, "curve": curve}


class Timed(nn.Module):
    """A model that notes the CPU seconds of each call, with the pasted masks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seconds = model, []

    def forward(self, images: list[Tensor], output_sizes: list[tuple[int, int]]) -> Any:
        """Return the detections of the model."""
        started = time.process_time()
        detections = self.model(images, output_sizes=output_sizes)
        self.seconds.append(time.process_time() - started)
        return detections


def run(settings: dict[str, Any], nuclei: str, folder: Path) -> dict[str, Any]:
    """Train and evaluate a model in this process, with one thread; return the results."""
    torch.set_num_threads(1)
    cfg = build_config(settings, nuclei)
    seed_everything(cfg.SEED)
    model = build(cfg, settings)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trained = train(cfg, settings, model)
    timed, dataset = Timed(model), get_dataset(cfg.DATASETS.TEST[0])
    started = time.process_time()
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    own = evaluate(timed, build_test_loader(cfg, dataset), dataset, folder, max_dets=limit)
    scores = score(dataset, folder / RESULTS_FILE, sorted({100, limit}))
    for iou_type, metrics in own.items():  # two ways to the same number
        if abs(metrics["AP"] - scores[iou_type]["AP@100"]) > 1e-6:
            raise RuntimeError(f"AP of {iou_type} is {metrics['AP']} and {scores[iou_type]}")
    return {
        **scores,
        "score_threshold": own["segm"].get("best_f1_threshold", 0.5),
        "parameters": parameters,
        "test_cpu_seconds_per_image": statistics.median(timed.seconds),
        "eval_cpu_seconds": time.process_time() - started,
        "folder": str(folder),
        **trained,
    }


def print_table(args: argparse.Namespace) -> None:
    """Print the runs of the models, the seeds of the same settings in one row."""
    rows = []
    for runs in group_seeds(choose_runs(args.results, args.data, model=args.model)):
        settings = runs[0]["settings"]
        steps, seconds = settings["steps"], settings["cpu_seconds"]
        regions = [f"({settings['regions']} regions)"] if settings["regions"] else []
        row = {"model": " ".join([settings["model"], *regions, *settings["opts"]])}
        row["lr"] = settings["lr"]
        row["budget"] = f"{steps} steps" if steps else f"{seconds:g} CPU s"
        test = statistics.fmean(run["test_cpu_seconds_per_image"] for run in runs)
        rows.append({**row, **summarize(runs), "test CPU s/image": f"{test:.2f}"})
    print(markdown(rows))


def draw_best(args: argparse.Namespace) -> None:
    """Draw the detections of the best run of each model, by mask AP, beside the ground truth."""
    best: dict[str, dict[str, Any]] = {}
    budget = {"steps": [args.steps], "cpu_seconds": [args.cpu_seconds]}
    for record in choose_runs(args.results, args.data, model=args.model, **budget):
        name = record["settings"]["model"]
        rivals = [record, best.get(name, record)]
        best[name] = max(rivals, key=lambda run: run["segm"]["AP@100"])
    first = next(iter(best.values()))["settings"]
    dataset = get_dataset(build_config(first, args.nuclei).DATASETS.TEST[0])
    models = {
        name: (Path(best[name]["folder"]) / RESULTS_FILE, best[name]["score_threshold"])
        for name in args.model
        if name in best
    }
    draw_comparison(dataset, models, args.draw)


@exits_on_user_error
def main(arguments: list[str] | None = None) -> int:
    """Run the command, and return its exit code: 2 for an error of the user."""
    args = parse_arguments(arguments)
    torch.set_num_threads(1)  # as in the processes of the runs
    if args.draw:
        draw_best(args)
        return 0
    if args.plot:
        runs = choose_runs(args.results, args.data, model=args.model, lr=args.lr)
        plot_comparison(runs, args.plot)
        return 0
    if not args.table:
        for choice in itertools.product(args.seed, args.lr, args.model):
            seed, lr, model = choice
            settings = settings_of(args, model, lr, seed)
            name = f"{args.data}_{model}_{lr}_{args.steps or args.cpu_seconds:g}_{seed}"
            if find_run(args.results, settings):
                print(f"{name}: is there")
                continue
            print(name, flush=True)
            folder = args.results.parent / "runs" / name
            results = in_fresh_process(run, settings, args.nuclei, folder)
            append_run(args.results, settings, results)
    print_table(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
