"""Images a second of a training worker, in turn with torchvision; memory of the workers."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from tensormask.config import get_cfg
from tensormask.data import CocoDataset, build_train_loader, get_dataset
from tensormask.data.loader import TrainingSet
from tensormask.data.transforms import Augmentation

from .timing import format_table, summarise, time_in_turn

PHOTOGRAPHS = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco_cc"
OURS, THEIRS = "tensormask", "torchvision"
_BATCH_SIZE = 4
# Annotations like COCO's, on images so small that reading them costs little.
_NUM_CLASSES, _OBJECTS_PER_IMAGE, _POINTS_PER_POLYGON = 80, 7.3, 20
_SYNTHETIC_SIZE = 96
# Memory that is copied on the way grows from the first image on: these show it, and the images
# are those of an epoch at most.
_MAX_IMAGES_READ = 20_000
_READINGS = (0.02, 0.1, 0.25, 0.5, 0.75, 1.0)
_BYTES_PER_MB = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--data-set",
        default=f"{PHOTOGRAPHS / 'instances_train.json'}@{PHOTOGRAPHS / 'train'}",
        metavar="NAME",
        help="as in DATASETS.TRAIN (default: %(default)s)",
    )
    parser.add_argument("--min-size", type=int, default=800, metavar="PX", help="default: 800")
    parser.add_argument("--max-size", type=int, default=1333, metavar="PX", help="default: 1333")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "--images", type=int, metavar="N", help="take N images (default: all; 118000 --memory)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="worker processes (default: the work of one, in this process; 2 with --memory)",
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="measure the private memory of worker processes that go through synthetic "
        "annotations, instead of speed",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return its numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        with tempfile.TemporaryDirectory() as folder:
            measure = measure_memory if args.memory else measure_speed
            return measure(args, Path(folder))
    finally:
        torch.set_num_threads(threads)


def measure_speed(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images a second of this library and of torchvision: the same images, the same work.

    Both read, resize and flip, and give a uint8 image, boxes, labels and bool masks.
    """
    dataset = get_dataset(args.data_set)
    augmentation = Augmentation((args.min_size,), args.max_size, flip="horizontal")
    training_set = TrainingSet([dataset], augmentation, seed=0)
    num_images = min(args.images or len(training_set), len(training_set))
    # The training set leaves images without objects out; torchvision's gets the same ones.
    image_ids = [i for i in dataset.image_ids if dataset.training_annotations(i)][:num_images]
    readers = {
        THEIRS: torchvision_set(dataset, image_ids, args.min_size, args.max_size, folder),
        OURS: Subset(training_set, [(i, i) for i in range(num_images)]),
    }
    candidates = {name: _pass_through(reader, args.workers) for name, reader in readers.items()}
    summary = summarise(time_in_turn(candidates, rounds=args.rounds), THEIRS)
    results = {
        name: {"images_per_s": num_images / entry["median_s"], "speedup": entry["speedup"]}
        for name, entry in summary.items()
    }
    where = f"{args.workers} worker processes" if args.workers else "the work of one worker"
    print(
        f"{num_images} images of {dataset.name}, shorter side {args.min_size} px, longer at "
        f"most {args.max_size} px; {where}; median of {args.rounds} rounds in turn"
    )
    print(format_table([{"reader": name, **entry} for name, entry in results.items()]))
    return {"num_images": num_images, **results}


def torchvision_set(
    dataset: CocoDataset, image_ids: list[Any], min_size: int, max_size: int, folder: Path
) -> Dataset:
    """What torchvision's documentation makes of a data set for instance segmentation."""
    annotations = [a for i in image_ids for a in dataset.training_annotations(i)]
    content = {
        "images": [dataset.image(i) for i in image_ids],
        "annotations": annotations,
        "categories": [{"id": i} for i in dataset.category_ids],
    }
    json_file = folder / "instances.json"
    json_file.write_text(json.dumps(content, default=bytes.decode), encoding="utf-8")
    transforms = v2.Compose(
        [
            v2.Resize(min_size, max_size=max_size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ClampBoundingBoxes(),
            v2.PILToTensor(),
            v2.ToDtype({tv_tensors.Mask: torch.bool, "others": None}),
        ]
    )
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        plain = CocoDetection(dataset.image_root, json_file, transforms=transforms)
    return wrap_dataset_for_transforms_v2(plain, target_keys=("boxes", "labels", "masks"))


def measure_memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Private memory of each worker process while the training loader goes on."""
    num_images, num_workers = args.images or 118_000, args.workers or 2
    num_annotations = write_synthetic_set(num_images, folder)
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            *("DATASETS.TRAIN", (f"{folder / 'annotations.json'}@{folder}",)),
            *("DATALOADER.NUM_WORKERS", num_workers, "SOLVER.IMS_PER_BATCH", _BATCH_SIZE),
            *(
                "MODEL.TENSOR_MASK.NUM_CLASSES",
                _NUM_CLASSES,
                "INPUT.MIN_SIZE_TRAIN",
                (0,),
                "SEED",
                0,
            ),
        ]
    )
    batches = build_train_loader(cfg)
    readings: list[dict[str, float]] = []
    num_seen = 0
    for share in _READINGS:
        while num_seen < share * min(num_images, _MAX_IMAGES_READ):
            num_seen += len(next(batches))
        # active_children also collects workers that have ended; here none has.
        private = [_private_bytes(process.pid) for process in multiprocessing.active_children()]
        readings.append(
            {
                "images": num_seen,
                "mean_mb": sum(private) / len(private) / _BYTES_PER_MB,
                "highest_mb": max(private) / _BYTES_PER_MB,
            }
        )
    print(
        f"private memory of each of {num_workers} workers; {num_annotations} annotations of "
        f"{num_images} images"
    )
    print(format_table(readings))
    return {
        "num_images": num_images,
        "num_annotations": num_annotations,
        "num_workers": num_workers,
        "readings": readings,
    }


def write_synthetic_set(num_images: int, folder: Path) -> int:
    """Writes `annotations.json` and the one image of all its entries.

    Returns:
        The number of annotations.
    """
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (_SYNTHETIC_SIZE, _SYNTHETIC_SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    shapes = [_synthetic_object(rng) for _ in range(500)]
    counts = rng.poisson(_OBJECTS_PER_IMAGE, num_images).clip(1)
    choices = rng.integers(len(shapes), size=int(counts.sum()))
    owners = np.repeat(np.arange(num_images), counts)
    size = f'"height": {_SYNTHETIC_SIZE}, "width": {_SYNTHETIC_SIZE}'
    with open(folder / "annotations.json", "w", encoding="utf-8") as file:
        file.write('{"categories": ')
        json.dump([{"id": i, "name": f"class {i}"} for i in range(_NUM_CLASSES)], file)
        file.write(', "images": [')
        file.write(
            ", ".join(f'{{"id": {i}, "file_name": "image.png", {size}}}' for i in range(num_images))
        )
        file.write('], "annotations": [')
        file.write(
            ", ".join(
                f'{{"id": {number}, "image_id": {owner}, {shapes[choice]}}}'
                for number, (owner, choice) in enumerate(
                    zip(owners.tolist(), choices.tolist(), strict=True), start=1
                )
            )
        )
        file.write("]}")
    return len(choices)


def _synthetic_object(rng: np.random.Generator) -> str:
    """The fields of a star-shaped object, as JSON without braces."""
    angles = np.linspace(0, 2 * np.pi, _POINTS_PER_POLYGON, endpoint=False)
    radii = rng.uniform(10, 20, (_POINTS_PER_POLYGON, 1))
    centre = rng.uniform(20, _SYNTHETIC_SIZE - 20, 2)
    points = (centre + radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)).round(2)
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    fields = {
        "category_id": int(rng.integers(_NUM_CLASSES)),
        "iscrowd": 0,
        "area": 700.0,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "segmentation": [points.ravel().tolist()],
    }
    return json.dumps(fields)[1:-1]


def _pass_through(reader: Dataset, num_workers: int | None) -> Callable[[], None]:
    """A function that reads all samples once, here or in worker processes that stay."""
    samples: Iterable[Any] = DataLoader(
        reader,
        batch_size=_BATCH_SIZE if num_workers else None,
        num_workers=num_workers or 0,
        collate_fn=list if num_workers else _as_is,
        persistent_workers=bool(num_workers),
    )

    def read_all() -> None:
        for _ in samples:
            pass

    return read_all


def _as_is(sample: Any) -> Any:
    return sample


def _private_bytes(pid: int) -> int:
    """Memory of a process that it shares with no other, as Linux counts it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))
