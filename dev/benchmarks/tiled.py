"""`Predictor.predict_tiled` on a large image of nuclei: peak memory, and tiles against one pass."""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from pycocotools import mask as rle_tools

from benchmarks import ROOT
from benchmarks.measure import in_fresh_process
from tensormask.data import get_dataset
from tensormask.data.checks.segmentation import segmentation_to_rle
from tensormask.data.large_images import open_large_image
from tensormask.detections import Detections
from tensormask.evaluation.cropped import CroppedMask, Region
from tensormask.evaluation.seams import TileGrid, TileJoiner
from tensormask.predictor import Predictor
from tensormask.utils.tables import format_records

CELL = 256  # pixels: the part of each image that is taken
NUCLEI = ROOT.parent / "shared" / "data" / "nuclei_dsb2018"
SET = f"{NUCLEI / 'instances_val.json'}@{NUCLEI / 'val'}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add = parser.add_argument
    add("--size", nargs=2, type=int, default=(20_000, 20_000), metavar=("H", "W"), help="in px")
    add("--data-set", default=SET, metavar="SET", help="default: nuclei_dsb2018's val split")
    add("--weights", default="tensormask_v2_nuclei", help="default: %(default)s")
    add("--input-side", type=int, default=0, help="to which a tile is resized (default: not)")
    add("--tile", type=int, default=1024, help="default: 1024")
    add("--overlap", type=int, default=128, help="default: 128")
    add("--truth", action="store_true", help="the model finds the ground truth, in no time")
    add("--alike", action="store_true", help="images of like brightness only, as of one slide")
    add("--compare", type=int, default=0, metavar="SIDE", help="a crop against one pass instead")


class Mosaic:
    """Fluorescence images (the frequent kind), of `CELL` x `CELL` px, in random order and turns."""

    def __init__(self, data_set: str, size: tuple[int, int], alike: bool) -> None:
        self.cells: list[tuple[np.ndarray, list[CroppedMask]]] = []
        dataset = get_dataset(data_set)
        for image_id in dataset.image_ids:
            rgb, annotations = dataset.load(image_id)
            if min(rgb.shape[:2]) < CELL or rgb.mean() > 100:
                continue
            codes = [segmentation_to_rle(a["segmentation"], rgb.shape[:2]) for a in annotations]
            masks = [rle_tools.decode(code)[:CELL, :CELL].astype(bool) for code in codes]
            for turns in range(4):
                turned = [CroppedMask(0, 0, np.rot90(mask, turns)) for mask in masks]
                cell = np.ascontiguousarray(np.rot90(rgb[:CELL, :CELL], turns))
                self.cells.append((cell, [mask for mask in turned if mask.area >= 20]))
        if alike:
            self.cells.sort(key=lambda cell: float(cell[0].mean()))
            self.cells = self.cells[len(self.cells) // 3 : 2 * len(self.cells) // 3]
        self.size = size
        rows, columns = (-(-side // CELL) for side in size)
        self.order = np.random.default_rng(0).integers(len(self.cells), size=(rows, columns))

    def write(self, path: Path) -> None:
        """Write a tiled TIFF."""
        parts = (self.cells[number][0] for number in self.order.ravel().tolist())
        tifffile.imwrite(
            path,
            parts,
            shape=(*self.size, 3),
            dtype=np.uint8,
            tile=(CELL, CELL),
            photometric="rgb",
            bigtiff=True,
        )

    def nuclei(self, region: Region) -> Iterator[CroppedMask]:
        """Yield the nuclei in a region of the image, cut by it, in its pixels."""
        x0, y0, x1, y1 = region
        for row in range(y0 // CELL, -(-y1 // CELL)):
            for column in range(x0 // CELL, -(-x1 // CELL)):
                left, top = column * CELL, row * CELL
                inside = Region(x0 - left, y0 - top, x1 - left, y1 - top)
                for mask in self.cells[self.order[row, column]][1]:
                    if common := mask.extent & inside:
                        corner = common.x0 + left - x0, common.y0 + top - y0
                        yield CroppedMask(*corner, mask.within(common))


def truth_in(mosaic: Mosaic, tile: Region) -> dict[str, Any]:
    """Return the ground truth in a tile as a model's detections."""
    masks = [mask for mask in mosaic.nuclei(tile) if mask.area]
    boxes = torch.tensor([mask.extent for mask in masks]).view(-1, 4).float()
    return {
        "boxes": boxes,
        "scores": torch.full((len(masks),), 0.9),
        "labels": torch.zeros(len(masks), dtype=torch.int64),
        "windows": boxes,
        "window_masks": [torch.from_numpy(mask.array()).float() for mask in masks],
    }


def load(args: argparse.Namespace, side: int) -> Predictor:
    """Return the model, which takes its inputs at `side` px, and has no limits on their objects."""
    options = ["INPUT.MIN_SIZE_TEST", side, "INPUT.MAX_SIZE_TEST", max(side, 1)]
    options += ["TEST.DETECTIONS_PER_IMAGE", 20_000]
    options += ["MODEL.TENSOR_MASK.TOPK_CANDIDATES_TEST", 100_000]
    return Predictor(args.weights, device="cpu", overrides=options, threshold=0.4)


def measure(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Detect, write results and drawing, and return the peak of memory above the model."""
    torch.set_num_threads(1)
    mosaic = Mosaic(args.data_set, tuple(args.size), args.alike)
    predictor = load(args, args.input_side)
    before, start = peak_memory(), time.process_time()
    if args.truth:
        large = open_large_image(path)
        grid = TileGrid(large.size, args.tile, args.overlap)
        joiner = TileJoiner(grid)
        for number, tile in enumerate(grid.tiles):
            large.read(tile.y0, tile.y1, tile.x0, tile.x1)
            joiner.add(number, truth_in(mosaic, tile))
        names = {"all_class_names": ["nucleus"], "category_ids": [1]}
        detections = Detections(joiner.join(), size=large.size, image=large, **names)
    else:
        detections = predictor.predict_tiled(path, tile=args.tile, overlap=args.overlap)
    seconds = time.process_time() - start
    of_tiles = peak_memory() - before
    detections.save(path.with_suffix(".json"))
    detections.save(path.with_suffix(".png"))
    whole = Region(0, 0, args.size[1], args.size[0])
    return {
        "px": f"{args.size[0]} x {args.size[1]}",
        "nuclei": sum(1 for _ in mosaic.nuclei(whole)),
        "detections": detections.num_detections,
        "CPU s": seconds,
        "GiB above the model": of_tiles,
        "with results and drawing": peak_memory() - before,
    }


def peak_memory() -> float:
    """Return the highest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def compare(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Return how many detections of tiles match those of one pass over the same pixels."""
    torch.set_num_threads(1)
    mosaic = Mosaic(args.data_set, (args.compare, args.compare), args.alike)
    mosaic.write(path)
    tiled = load(args, args.input_side).predict_tiled(path, tile=args.tile, overlap=args.overlap)
    side = round(args.input_side / args.tile * args.compare)
    whole = load(args, side).predict_tiled(path, tile=args.compare, overlap=0)
    tiled.save(ROOT / "output" / "tiled.png")
    codes = [[result["segmentation"] for result in x.to_coco()] for x in (tiled, whole)]
    region = Region(0, 0, args.compare, args.compare)
    nuclei = [whole_code(mask, args.compare) for mask in mosaic.nuclei(region)]
    ious = iou(*codes)
    row: dict[str, Any] = {"tiles": len(codes[0]), "one pass": len(codes[1])}
    for level in (0.5, 0.75, 0.9):
        row[f"matched at {level}"] = float((ious.max(0) >= level).mean())
    sure = (whole["scores"] >= 0.5).numpy()
    row["of scores >= 0.5, at 0.9"] = float((ious.max(0) >= 0.9)[sure].mean())
    grid = TileGrid(tiled.size, args.tile, args.overlap)
    near = np.array([is_near_seam(grid, mask.extent) for mask in whole["window_masks"].masks])
    row["near a seam, at 0.9"] = float((ious.max(0) >= 0.9)[near].mean())
    row["elsewhere, at 0.9"] = float((ious.max(0) >= 0.9)[~near].mean())
    for name, found in zip(("tiles", "one pass"), codes, strict=True):
        pairs = np.triu(iou(found, found), 1)
        row[f"{name}: pairs of IoU 0.5"] = int((pairs >= 0.5).sum())
        row[f"{name}: pairs of IoU 0.75"] = int((pairs >= 0.75).sum())
        row[f"{name}: recall at 0.5"] = float((iou(found, nuclei).max(0) >= 0.5).mean())
    return row


def is_near_seam(grid: TileGrid, region: Region) -> bool:
    """Return whether several tiles see parts of a region."""
    return sum(1 for tile in grid.tiles if tile & region) > 1


def whole_code(mask: CroppedMask, side: int) -> dict[str, Any]:
    return rle_tools.encode(np.asfortranarray(mask.within(Region(0, 0, side, side)).view(np.uint8)))


def iou(first: list[Any], second: list[Any]) -> np.ndarray:
    return rle_tools.iou(first, second, [0] * len(second))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure in a fresh process, print a table, and return its numbers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nuclei.tif"
        if args.compare:
            row = in_fresh_process(compare, args, path)
        else:
            Mosaic(args.data_set, tuple(args.size), args.alike).write(path)
            row = in_fresh_process(measure, args, path)
    print(format_records([{"": name, "value": value} for name, value in row.items()]))
    return row
