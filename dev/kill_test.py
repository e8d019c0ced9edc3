#!/usr/bin/env python
"""Kill training at random moments, resume it, and compare its weights with an undisturbed run.

    python dev/kill_test.py --kills 50

A small model trains on drawn shapes by the real command, with worker processes, accumulation,
averaged weights and evaluations. Each attempt is `train_net.py --resume` and ends in one of
`KINDS`. After each, the checkpoint named by `last_checkpoint` must be complete. A finished run must
have the same bits as the undisturbed one: weights, averages, optimizer, and the results of all
evaluations. The exit code is 1 if anything differs.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tensormask.data.shapes import write_split
from tensormask.engine.events import read_metrics
from tensormask.engine.resume import find_last_checkpoint, load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
# How an attempt ends, and its correct exit codes.
KINDS = {
    "SIGKILL, while a checkpoint is written": {-signal.SIGKILL},
    "SIGTERM, to the process": {128 + signal.SIGTERM},
    "full disk": {1},
    "SIGKILL, at any moment": {-signal.SIGKILL},
    "SIGKILL, between iterations": {-signal.SIGKILL},
    "SIGINT, to all processes, like Ctrl-C": {128 + signal.SIGINT},
    "SIGTERM, twice": {-signal.SIGTERM, 128 + signal.SIGTERM},
}
TIMEOUT = 300  # seconds, of anything here


def main(arguments: list[str] | None = None) -> int:
    """Run the test, print its table, and return 0 if all runs are equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--iterations", type=int, default=16, help="of each run")
    args = parser.parse_args(arguments)
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        opts = prepare(folder, args.iterations)
        with small_disk(folder / "disk") as disk:
            undisturbed = (disk or folder) / "undisturbed"
            started = time.monotonic()
            if start(opts, undisturbed).wait(TIMEOUT) != 0:
                print(undisturbed.with_suffix(".out").read_text())
                return 1
            duration = time.monotonic() - started
            print(f"undisturbed run: {duration:.1f} s; full disk by {disk or 'RLIMIT_FSIZE'}")
            expected = outcome(undisturbed)
            remove(undisturbed)
            return kill_runs(opts, folder, disk, expected, duration, args.kills)


def kill_runs(
    opts: list[str],
    folder: Path,
    disk: Path | None,
    expected: dict[str, Any],
    duration: float,
    kills: int,
) -> int:
    """Kill runs until there were `kills`, let the last one end, and return the exit code."""
    counts: dict[str, Counter] = {kind: Counter() for kind in KINDS}
    num_runs, failures, killed = 0, [], 0
    while killed < kills:
        num_runs += 1
        output = (disk or folder) / f"run_{num_runs}"
        output.mkdir()
        while True:
            # The kinds take turns; after the last kill the run may end.
            kind = list(KINDS)[killed % len(KINDS)] if killed < kills else ""
            code = attempt(opts, output, kind, duration, disk)
            if code == 0:
                break
            killed += 1
            resumes = describe_checkpoint(output)
            codes = KINDS.get(kind, ())
            if (output / "model_final.pth").is_file():  # signals have their default action again
                codes = (*codes, -signal.SIGTERM, -signal.SIGINT)
            correct = code in codes and resumes is not None
            counts[kind][f"exit code {code}"] += 1
            print(f"{killed:4d}  {kind:<40} exit code {code:4d}  {resumes}", flush=True)
            if not correct:
                failures.append(f"run {num_runs}: {kind}: exit code {code}, {resumes}")
                print(output.with_suffix(".out").read_text()[-3000:])
                if kind == "":
                    break
        different = [name for name, value in outcome(output).items() if value != expected[name]]
        failures += [f"run {num_runs}: {name} differs" for name in different]
        print(f"run {num_runs} has ended: {f'{different} differ' if different else 'equal'}")
        remove(output)
    print("\n| ended by | times | exit codes |\n|---|---|---|")
    for kind, count in counts.items():
        codes = ", ".join(f"{c.removeprefix('exit code ')}: {n}" for c, n in sorted(count.items()))
        print(f"| {kind} | {sum(count.values())} | {codes} |")
    print(f"\n{killed} kills in {num_runs} runs; {len(failures)} failures", *failures, sep="\n")
    return 1 if failures else 0


def prepare(folder: Path, iterations: int) -> list[str]:
    """Write the data sets, and return the overrides of the config."""
    names = {}
    for split, num_images in (("train", 16), ("val", 2)):
        write_split(split, num_images, folder / split)
        names[split] = f"{folder / split / 'annotations.json'}@{folder / split / 'images'}"
    opts = {
        "DATASETS.TRAIN": [names["train"]],
        "DATASETS.TEST": [names["val"]],
        "DATALOADER.NUM_WORKERS": 2,
        "INPUT.MIN_SIZE_TRAIN": [48],
        "INPUT.MIN_SIZE_TEST": 48,
        "MODEL.DEVICE": "cpu",
        "MODEL.TENSOR_MASK.NUM_CONVS": 1,
        "MODEL.TENSOR_MASK.SCORE_THRESH_TEST": 0.005,
        "SOLVER.OPTIMIZER": "SGD",
        "SOLVER.BASE_LR": 0.001,
        "SOLVER.ACCUMULATE_STEPS": 2,
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.WARMUP_ITERS": 4,
        "SOLVER.EMA.ENABLED": True,
        "SOLVER.EMA.DECAY": 0.9,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "SOLVER.CHECKPOINT_MAX_TO_KEEP": 2,
        "SOLVER.CHECKPOINT_BEST": "ema/segm/AP",
        "TEST.EVAL_PERIOD": 7,
        "TEST.NUM_VISUALIZED": 0,
        "TEST.ORACLE_ON": False,
    }
    return [str(word) for pair in opts.items() for word in pair]


def start(opts: list[str], output: Path, max_bytes: int | None = None) -> subprocess.Popen:
    """Start the command in its own process group; its output goes to `<output>.out`."""

    def limit() -> None:
        if max_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, resource.RLIM_INFINITY))

    with open(output.with_suffix(".out"), "w") as file:
        return subprocess.Popen(
            [
                *(sys.executable, ROOT / "tools" / "train_net.py", "--resume"),
                *("--config-file", ROOT / "configs" / "quickstart.yaml"),
                *(*opts, "OUTPUT_DIR", output),
            ],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            preexec_fn=limit,
        )


def attempt(opts: list[str], output: Path, kind: str, duration: float, disk: Path | None) -> int:
    """Continue a run until it ends in the way of `kind`, and return its exit code."""
    if kind == "full disk":
        return with_full_disk(opts, output, disk)
    process = start(opts, output)
    if kind == "SIGKILL, at any moment":
        wait_for(process, lambda: False, random.uniform(0, duration))
    elif kind == "SIGKILL, while a checkpoint is written":
        skipped = random.randrange(3)
        for _ in range(skipped + 1):
            wait_for(process, lambda: not any(output.glob(".model_*.tmp")))
            wait_for(process, lambda: any(output.glob(".model_*.tmp")))
    elif kind:
        log = output.with_suffix(".out")
        wait_for(process, lambda: "Training iterations" in log.read_text())
        wait_for(process, lambda: False, random.uniform(0, duration / 2))
    if process.poll() is None and kind:
        number = getattr(signal, kind[: kind.index(",")])
        send = os.killpg if "all processes" in kind else os.kill
        send(process.pid, number)
        if "twice" in kind:
            time.sleep(random.uniform(0, 0.1))
            if process.poll() is None:
                os.kill(process.pid, number)
    return process.wait(TIMEOUT)


def with_full_disk(opts: list[str], output: Path, disk: Path | None) -> int:
    """Let an attempt run out of space, on a filled disk or by a limit of the file size."""
    share = random.uniform(0.0, 0.9)
    size = checkpoint_size(output) or 100 * 2**20
    if disk is None:
        return start(opts, output, max_bytes=int(share * size)).wait(TIMEOUT)
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with open(filler, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - int(share * size)))
    code = start(opts, output).wait(TIMEOUT)
    filler.unlink()
    return code


def checkpoint_size(output: Path) -> int:
    return max((path.stat().st_size for path in output.glob("model_*.pth")), default=0)


def wait_for(process: subprocess.Popen, happened: Any, seconds: float = TIMEOUT) -> None:
    """Wait for an event, the end of the process, or some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not happened():
        time.sleep(0.001)


def describe_checkpoint(output: Path) -> str | None:
    """Return what the next attempt will do, or None if the checkpoint is not complete."""
    try:
        path = find_last_checkpoint(output)
        if path is None:
            return "starts again"
        return f"resumes with iteration {load_checkpoint(path)['iteration'] + 1}"
    except ValueError as error:
        print(error)
        return None


def outcome(output: Path) -> dict[str, Any]:
    """Return what must be equal in two runs, by name."""
    checkpoint = load_checkpoint(output / "model_final.pth")
    files = ("model_final.pth", "model_final_ema.pth", "model_best.pth")
    contents = {name: torch.load(output / name, weights_only=True) for name in files}
    parts = {name: checkpoint[name] for name in ("model", "ema", "optimizer", "scheduler")}
    for name, content in contents.items():
        parts[name] = {key: content.get(key) for key in ("model", "score_threshold")}
    result = {name: fingerprint(value) for name, value in parts.items()}
    records = read_metrics(output / "metrics.json")
    results = [record for record in records if "segm/AP" in record]
    # An evaluation is repeated if the attempt was killed right after it.
    result["evaluations"] = sorted({json.dumps(record) for record in results})
    return result


def fingerprint(value: Any) -> Any:
    """Replace each tensor in a value by a hash of its bits."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: fingerprint(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [fingerprint(item) for item in value]
    return value


class small_disk:
    """Mount a tmpfs of 2 GiB at `path`; None where mounting is not allowed."""

    def __init__(self, path: Path) -> None:
        self.path, self.mounted = path, False

    def __enter__(self) -> Path | None:
        self.path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", self.path]
        try:
            self.mounted = subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            pass
        return self.path if self.mounted else None

    def __exit__(self, *exception: object) -> None:
        if self.mounted:
            subprocess.run(["umount", "--lazy", self.path], check=True)


def remove(output: Path) -> None:
    for path in sorted(output.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    output.rmdir()
    output.with_suffix(".out").unlink()


if __name__ == "__main__":
    sys.exit(main())
