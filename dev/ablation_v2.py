#!/usr/bin/env python
"""Train the variants of dev/ablation_v2.yaml with several seeds, and print their table.

    python dev/ablation_v2.py --results output/ablation/runs.jsonl --data shapes --seed 1 2 3

`--variant "masks_*"` chooses variants, and `--opts KEY VALUE` overrides all. Each run is a line
in the file of results, and runs that are there are skipped. The code is that of the checkout of
this file.
"""

import argparse
import fnmatch
import itertools
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import yaml
from benchmarks import ROOT
from benchmarks.measure import in_fresh_process
from experiments.runs import (
    append_run,
    choose_runs,
    find_run,
    group_seeds,
    markdown,
    score,
    summarize,
)

import tensormask
from tensormask.commands.common import exits_on_user_error
from tensormask.config import CfgNode, get_cfg
from tensormask.data import get_dataset
from tensormask.engine import trainer
from tensormask.engine.callbacks import Callback
from tensormask.utils.errors import UserError

VARIANTS = ROOT / "dev" / "ablation_v2.yaml"
NUCLEI = "../shared/data/nuclei_dsb2018"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--results", type=Path, required=True, metavar="FILE", help="JSON lines")
    add("--variants", type=Path, default=VARIANTS, metavar="YAML", help="default: %(default)s")
    add("--data", choices=["shapes", "nuclei"], required=True)
    add("--nuclei", default=NUCLEI, metavar="FOLDER", help="nuclei_dsb2018 (default: %(default)s)")
    add("--variant", nargs="+", default=["*"], metavar="NAME", help="* and ? are wildcards")
    add("--seed", nargs="+", type=int, default=[1])
    add("--table", action="store_true", help="only print the runs that are there")
    add("--opts", nargs="*", default=[], metavar="KEY VALUE", help="overrides, of all variants")
    return parser.parse_args(arguments)


def read_variants(path: Path, data: str, patterns: list[str]) -> dict[str, dict[str, Any]]:
    """Return the chosen variants in their order, each as `config` and `overrides`.

    Raises:
        UserError: a name that no variant has, or a variant without a config.
    """
    variants = yaml.safe_load(path.read_text(encoding="utf-8"))[data]
    for pattern in patterns:
        if not fnmatch.filter(variants, pattern):
            raise UserError(f"no variant of {data} is named {pattern}; {path} has {[*variants]}")
    return {
        name: _resolve(variants, name)
        for name in variants
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    }


def _resolve(variants: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    if name not in variants:
        raise UserError(f"a variant has base {name}, which is not there; available: {[*variants]}")
    own = dict(variants[name])
    base = own.pop("base", None)
    inherited = _resolve(variants, base) if base else {"config": None, "overrides": {}}
    config = own.pop("config", inherited["config"])
    if config is None:
        raise UserError(f"variant {name} has neither config nor base")
    return {"config": config, "overrides": {**inherited["overrides"], **own}}


def build_config(settings: Mapping[str, Any], nuclei: str, folder: Path) -> CfgNode:
    """Return the config of a run."""
    cfg = get_cfg()
    config = ROOT / settings["config"]  # a path in the checkout, or a name
    cfg.merge_from_file(config if config.is_file() else settings["config"])
    if settings["data"] == "nuclei":
        for split, key in (("train", "TRAIN"), ("val", "TEST")):
            name = f"{nuclei}/instances_{split}.json@{nuclei}/{split}"
            cfg.merge_from_list([f"DATASETS.{key}", [name]])
    # No workers: their time would not count, but slow down a machine with few cores.
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0])
    cfg.merge_from_list(["TEST.ORACLE_ON", False])
    for key, value in settings["overrides"].items():
        cfg.merge_from_list([key, value])
    cfg.merge_from_list([*settings["opts"], "SEED", settings["seed"], "OUTPUT_DIR", str(folder)])
    cfg.freeze()
    return cfg


class CpuClock(Callback):
    """CPU seconds of the steps, without reading images."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def before_step(self, run: Any, batch: Any) -> None:
        """Start the clock."""
        self._started = time.process_time()

    def after_step(self, run: Any, metrics: Any) -> None:
        """Stop the clock."""
        self.steps.append(time.process_time() - self._started)


def run(settings: Mapping[str, Any], nuclei: str, folder: Path) -> dict[str, Any]:
    """Train and evaluate a variant in this process, with one thread; return the results."""
    torch.set_num_threads(1)
    cfg, clock, started = build_config(settings, nuclei, folder), CpuClock(), time.perf_counter()
    metrics = trainer.train(cfg, overwrite=True, callbacks=[clock])
    dataset, limit = get_dataset(cfg.DATASETS.TEST[0]), cfg.TEST.DETECTIONS_PER_IMAGE
    # The averaged weights, where there are some.
    results = folder / ("ema/inference" if "ema" in metrics else "inference")
    return {
        **score(dataset, results / "coco_instances_results.json", sorted({100, limit})),
        "steps": len(clock.steps),
        "train_cpu_seconds": sum(clock.steps),
        "cpu_seconds_per_step": statistics.median(clock.steps),
        "cpu_seconds": time.process_time(),  # of the whole process, with the evaluations
        "wall_seconds": time.perf_counter() - started,
        "folder": str(folder),
    }


def print_table(records: list[dict[str, Any]]) -> None:
    """Print runs, the seeds of the same settings in one row."""
    rows = []
    for runs in group_seeds(records):
        settings = runs[0]["settings"]
        seconds = statistics.median(run["cpu_seconds_per_step"] for run in runs)
        row = {"variant": " ".join([settings["variant"], *settings["opts"]]), **summarize(runs)}
        rows.append({**row, "CPU s/step": f"{seconds:.3f}"})
    print(markdown(rows))


@exits_on_user_error
def main(arguments: list[str] | None = None) -> int:
    """Run the command, and return its exit code: 2 for an error of the user."""
    args = parse_arguments(arguments)
    torch.set_num_threads(1)  # as in the processes of the runs
    if ROOT not in Path(tensormask.__file__).parents:
        raise UserError(f"tensormask was imported from {tensormask.__file__}, not from {ROOT}")
    variants = read_variants(args.variants, args.data, args.variant)
    for seed, name in itertools.product(args.seed, [] if args.table else variants):
        settings = {"variant": name, "data": args.data, **variants[name]}
        settings |= {"opts": args.opts, "seed": seed}
        if find_run(args.results, settings):
            continue
        print(f"{args.data} {name}, seed {seed}", flush=True)
        opts = f"_{crc32(' '.join(args.opts).encode()):08x}" if args.opts else ""
        folder = args.results.parent / "runs" / f"{args.data}_{name}_{seed}{opts}"
        append_run(args.results, settings, in_fresh_process(run, settings, args.nuclei, folder))
    print_table(choose_runs(args.results, args.data, variant=variants))
    return 0


if __name__ == "__main__":
    sys.exit(main())
