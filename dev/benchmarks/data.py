"""Images per second of a training worker, in turn with torchvision; memory of the workers."""

import argparse
import contextlib
import io
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from benchmarks import ROOT
from benchmarks.measure import median_ratio, time_in_turn
from tensormask.config import get_cfg
from tensormask.data import CocoDataset, build_train_loader, get_dataset
from tensormask.data.augmentation import Augmentation
from tensormask.data.samples import TrainingSet
from tensormask.data.shapes import write_split
from tensormask.utils.tables import format_records

_PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "coco_cc"
_BATCH_SIZE = 4
_NUM_DRAWN = 100  # different images of the large set
# Memory that is copied on the way grows from the first image on: these show it.
_MAX_IMAGES_READ = 20_000
_READINGS = (0.02, 0.1, 0.25, 0.5, 0.75, 1.0)


def add_data_set(parser: argparse.ArgumentParser) -> None:
    """Add the options of the images and of their size."""
    parser.add_argument(
        "--data-set",
        default=f"{_PHOTOGRAPHS / 'instances_train.json'}@{_PHOTOGRAPHS / 'train'}",
        metavar="NAME",
        help="as in DATASETS.TRAIN (default: %(default)s)",
    )
    parser.add_argument("--min-size", type=int, default=800, metavar="PX", help="default: 800")
    parser.add_argument("--max-size", type=int, default=1333, metavar="PX", help="default: 1333")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_data_set(parser)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "--images", type=int, metavar="N", help="default: all; 118000 with --memory"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="worker processes (default: none, the work of one in this process; 2 with --memory)",
    )
    parser.add_argument(
        "--memory", action="store_true", help="measure private memory of workers, not speed"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return its numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        with tempfile.TemporaryDirectory() as folder:
            return (_measure_memory if args.memory else _measure_speed)(args, Path(folder))
    finally:
        torch.set_num_threads(threads)


def _measure_speed(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure both libraries on the same images and the same work.

    Both read, resize and flip, and return a uint8 image, boxes, labels and bool masks.
    """
    dataset = get_dataset(args.data_set)
    training_set = TrainingSet(
        [dataset], Augmentation((args.min_size,), args.max_size, flip="horizontal"), seed=0
    )
    num_images = min(args.images or len(training_set), len(training_set))
    # The training set leaves out images without objects.
    image_ids = [i for i in dataset.image_ids if dataset.training_annotations(i)][:num_images]
    theirs = torchvision_set(dataset, image_ids, args.min_size, args.max_size, folder)
    ours = Subset(training_set, [(i, i) for i in range(num_images)])
    calls = {
        "torchvision": _epoch(theirs, args.workers),
        "tensormask": _epoch(ours, args.workers),
    }
    times = {name: t["wall"] for name, t in time_in_turn(calls, rounds=args.rounds).items()}
    rows = [
        {
            "reader": name,
            "images/s": num_images / statistics.median(seconds),
            "speedup": median_ratio(times["torchvision"], seconds),
        }
        for name, seconds in times.items()
    ]
    print(
        f"{num_images} images of {dataset.name}, shorter side {args.min_size} px, longer at "
        f"most {args.max_size} px; {args.workers or 'no'} worker processes; {args.rounds} rounds"
    )
    print(format_records(rows))
    return {"num_images": num_images, "times": rows}


def torchvision_set(
    dataset: CocoDataset, image_ids: list[Any], min_size: int, max_size: int, folder: Path
) -> Dataset:
    """Return the data set of torchvision's documentation for instance segmentation."""
    content = {
        "images": [dataset.image(i) for i in image_ids],
        "annotations": [a for i in image_ids for a in dataset.training_annotations(i)],
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


def _epoch(dataset: Dataset, num_workers: int | None) -> Callable[[], None]:
    """Return a function that reads all samples once, here or in persistent workers."""
    batch_size = _BATCH_SIZE if num_workers else 1
    options = {"num_workers": num_workers or 0, "persistent_workers": bool(num_workers)}
    loader = DataLoader(dataset, batch_size, collate_fn=list, **options)

    def read() -> None:
        for _ in loader:
            pass

    return read


def _measure_memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the private memory of each worker process while the training loader reads."""
    num_images, num_workers = args.images or 118_000, args.workers or 2
    num_annotations = write_large_set(num_images, folder)
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (f"{folder / 'annotations.json'}@{folder / 'images'}",)
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = num_workers, _BATCH_SIZE
    cfg.MODEL.TENSOR_MASK.NUM_CLASSES, cfg.INPUT.MIN_SIZE_TRAIN, cfg.SEED = 6, (0,), 0
    batches, num_read, readings = build_train_loader(cfg), 0, []
    for share in _READINGS:
        while num_read < share * min(num_images, _MAX_IMAGES_READ):
            num_read += len(next(batches))
        private = [_private_mb(process.pid) for process in multiprocessing.active_children()]
        mean = sum(private) / len(private)
        readings.append({"images": num_read, "mean MB": mean, "highest MB": max(private)})
    print(f"{num_workers} workers; {num_annotations} annotations of {num_images} images")
    print(format_records(readings))
    return {"num_annotations": num_annotations, "readings": readings}


def write_large_set(num_images: int, folder: Path) -> int:
    """Write `annotations.json` with drawn images, each many times; the number of annotations."""
    write_split("val", _NUM_DRAWN, folder)
    content = json.loads((folder / "annotations.json").read_text(encoding="utf-8"))
    drawn = [
        [a for a in content["annotations"] if a["image_id"] == i["id"]] for i in content["images"]
    ]
    ids = range(num_images)
    images = [{**content["images"][i % _NUM_DRAWN], "id": i} for i in ids]
    objects = [{**a, "image_id": i} for i in ids for a in drawn[i % _NUM_DRAWN]]
    annotations = [{**a, "id": i} for i, a in enumerate(objects, start=1)]
    content |= {"images": images, "annotations": annotations}
    (folder / "annotations.json").write_text(json.dumps(content), encoding="utf-8")
    return len(annotations)


def _private_mb(pid: int | None) -> float:
    """Return the memory of a process that no other process shares, as Linux counts it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    kib = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return 1024 * kib / 1e6
