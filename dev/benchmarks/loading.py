"""Training batches from worker processes, in turn with PyTorch's DataLoader; their bytes."""

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from torch.utils.data import DataLoader

from benchmarks.data import add_data_set
from benchmarks.measure import median_ratio, time_in_turn
from tensormask.data import get_dataset, transport
from tensormask.data.augmentation import Augmentation
from tensormask.data.prefetch import BatchLoader
from tensormask.data.samplers import BatchSampler
from tensormask.data.samples import TrainingSet
from tensormask.utils.tables import format_records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_data_set(parser)
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--batches", type=int, default=40, metavar="N", help="default: 40")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="default: 4")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print tables, and return their numbers. The time includes the start of workers."""
    training_set = TrainingSet(
        [get_dataset(args.data_set)],
        Augmentation((args.min_size,), args.max_size, flip="horizontal"),
        seed=0,
    )
    sampler = BatchSampler(training_set.aspect_groups(), batch_size=2, seed=0)
    batches = list(itertools.islice(sampler, args.batches))
    options = {"num_workers": args.workers}
    loaders = {
        "DataLoader": DataLoader(training_set, batch_sampler=batches, collate_fn=list, **options),
        "tensormask": BatchLoader(training_set, batches, **options),
    }
    calls = {name: _read(loader) for name, loader in loaders.items()}
    times = {name: t["wall"] for name, t in time_in_turn(calls, rounds=args.rounds).items()}
    rows = [
        {
            "loader": name,
            "images/s per worker": 2 * len(batches) / statistics.median(seconds) / args.workers,
            "speedup": median_ratio(times["DataLoader"], seconds),
        }
        for name, seconds in times.items()
    ]
    print(format_records(rows))
    sizes = [_sizes([training_set[key] for key in keys]) for keys in batches]
    means = [{"mean of a batch": k, "MB": statistics.mean(s[k] for s in sizes)} for k in sizes[0]]
    print(format_records(means))
    return {"times": rows, "sizes": means}


def _read(loader: Iterable[list[dict[str, Any]]]) -> Callable[[], None]:
    def read() -> None:
        for batch in loader:
            for sample in batch:  # touch the memory
                sample["target"]["masks"][:, ::8].any()
                sample["image"].max()

    return read


def _sizes(batch: list[dict[str, Any]]) -> dict[str, float]:
    images = sum(sample["image"].nbytes for sample in batch)
    masks = sum(sample["target"]["masks"].nbytes for sample in batch)
    message = len(transport.pack(batch))
    return {"images": images / 1e6, "message": message / 1e6, "bool masks": (images + masks) / 1e6}
