"""Write a model as one graph: `tensormask export --weights model_final.pth --output model.onnx`.

The file is compared with the model on images before it gets its name.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from tensormask.checkpoint.downloads import packaged_file
from tensormask.checkpoint.zoo import PACKAGED
from tensormask.commands.common import (
    CommandParser,
    add_config_file,
    add_overrides,
    exits_on_user_error,
)
from tensormask.commands.inputs import find_inputs
from tensormask.data import get_dataset
from tensormask.data.images import read_image
from tensormask.export.check import Run, compare
from tensormask.export.files import FORMATS, describe, trace, write_onnx, write_torch
from tensormask.export.graph import DetectionGraph
from tensormask.export.runtime import Letterbox, OnnxPredictor, letterbox
from tensormask.modeling.inputs import padded_size
from tensormask.predictor import Predictor
from tensormask.utils.errors import UserError
from tensormask.utils.extras import require

NUM_IMAGES = 5
EXIT_DIFFERENT = 1
_CHECK_DATASET = "nuclei_val"
# In float32, with all windows, as the graph.
_FIXED = (
    *("MODEL.COMPILE", "", "MODEL.TENSOR_MASK.QUERY_THRESH", 0.0),
    *("TEST.AMP.ENABLED", False, "TEST.AUG.ENABLED", False),
)


def build_parser() -> CommandParser:
    """Return the parser of the command."""
    parser = CommandParser(
        "export",
        description="Write a model as one graph, from images to boxes, scores, labels and masks of "
        "a fixed number of detections (TEST.DETECTIONS_PER_IMAGE). Then run the file on images and "
        "print the largest differences to the model; a file with larger ones than rounding makes "
        "is not kept.",
        epilog="docs/export.md describes the outputs, and how to use an ONNX file without PyTorch.",
        example="--weights output/quickstart/model_final.pth --output model.onnx",
    )
    add = parser.add_argument
    add("--output", required=True, metavar="FILE", help="file to write, .onnx or .pt2")
    add(
        "--weights",
        default="",
        metavar="FILE",
        help="a checkpoint, by path or URL, or a name such as tensormask_R_50_FPN_6x "
        f"(default: MODEL.WEIGHTS of --config-file, or without one {PACKAGED})",
    )
    add_config_file(parser, default="")
    add(
        "--format",
        choices=FORMATS,
        help="onnx, or torch: a program for torch.export.load (default: by the suffix of --output)",
    )
    add(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="of the images, in pixels: others are resized to fit and padded (default: "
        "INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST, rounded up to a multiple of 32)",
    )
    add("--batch", type=int, default=1, metavar="N", help="images of a call (default: 1)")
    add("--dynamic-batch", action="store_true", help="take any number of images in a call")
    add(
        "--images",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help=f"images or folders to compare on, the first {NUM_IMAGES} (default: nuclei)",
    )
    add_overrides(parser)
    return parser


@exits_on_user_error
def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 1 if the file differs from the model, 2 for a user's error.
    """
    args = build_parser().parse_args(arguments)
    output = Path(args.output)
    kind = args.format or {".onnx": "onnx", ".pt2": "torch"}.get(output.suffix)
    if kind is None:
        raise UserError(f"{output}: give a name with .onnx or .pt2, or --format")
    if args.batch < 1:
        raise UserError(f"--batch must be 1 or more, got {args.batch}")
    if kind == "onnx":  # not after minutes
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package, extra="export")
    predictor = build_predictor(args)
    graph = DetectionGraph(predictor.model, input_size(args, predictor)).eval()
    description = describe(predictor, graph)
    boxes = [
        letterbox(
            image,
            graph.size,
            description["min_size"],
            description["max_size"],
            description["padding_color"],
        )
        for image in itertools.islice(read_images(args.images), NUM_IMAGES)
    ]
    start = time.perf_counter()
    program = trace(graph, batch=args.batch, dynamic_batch=args.dynamic_batch)
    unchecked = output.with_name(f".{output.name}.unchecked")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        (write_onnx if kind == "onnx" else write_torch)(program, unchecked, description)
        print(f"written in {time.perf_counter() - start:.0f} s, {_describe_outputs(graph)}")
        run = _repeated(load(unchecked, kind), 1 if args.dynamic_batch else args.batch)
        if not has_small_differences(predictor, run, boxes):
            return EXIT_DIFFERENT
        os.replace(unchecked, output)
    finally:
        unchecked.unlink(missing_ok=True)
    print(f"{output} ({output.stat().st_size / 1e6:.1f} MB)")
    return 0


def build_predictor(args: argparse.Namespace) -> Predictor:
    """Return the model of a command line, on the CPU, with its description."""
    source, weights = args.config_file or args.weights or packaged_file(), args.weights or None
    return Predictor(
        source, weights if args.config_file else None, "cpu", overrides=[*args.opts, *_FIXED]
    )


def input_size(args: argparse.Namespace, predictor: Predictor) -> tuple[int, int]:
    """Return (height, width) of the graph's images."""
    if args.size:
        height, width = args.size
        if height < 1 or width < 1:
            raise UserError(f"--size must be two positive numbers of pixels, got {args.size}")
        return height, width
    (short, *_), longest = predictor.transform.min_sizes, predictor.transform.max_size
    if not short:
        raise UserError("INPUT.MIN_SIZE_TEST is 0, images keep their sizes: give --size H W")
    return padded_size(short, max(short, longest))


def read_images(words: list[str]) -> Iterator[np.ndarray]:
    """Read the images of a command line, or those that come with the package: uint8 (H, W, 3)."""
    if not words:
        dataset = get_dataset(_CHECK_DATASET)
        for image_id in dataset.image_ids:
            yield read_image(dataset.path(dataset.image(image_id)))
        return
    inputs = [source for source in find_inputs(words).inputs if not source.is_video]
    if not inputs:
        raise UserError(f"--images: there are no images in {', '.join(words)}")
    for source in inputs:
        yield read_image(str(source.location))


def load(path: Path, kind: str) -> Run:
    """Return the function of a file, from uint8 (N, height, width, 3) to arrays by their names."""
    if kind == "onnx":
        return OnnxPredictor(path, providers=["CPUExecutionProvider"]).run
    with path.open("rb") as file:
        module = torch.export.load(file).module()

    def run(pixels: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            outputs = module(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
        return {name: x.numpy() for name, x in outputs.items()}

    return run


def _repeated(run: Run, batch: int) -> Run:
    return lambda pixels: run(np.repeat(pixels, batch, axis=0))


def has_small_differences(predictor: Predictor, run: Run, boxes: list[Letterbox]) -> bool:
    """Print the largest differences to the model, and return whether they are rounding."""
    differences = compare(predictor.model, run, [box.pixels for box in boxes])
    print(f"compared with the model on {len(boxes)} images: {differences}")
    if differences.num_detections == 0 and not differences.too_large:
        print("the model detects nothing in these images: give others with --images")
    if differences.too_large:
        print("error: the file differs from the model, and is not kept", file=sys.stderr)
    return not differences.too_large


def _describe_outputs(graph: DetectionGraph) -> str:
    height, width = graph.size
    text = f"images of {height} x {width}, up to {graph.num_outputs} detections"
    if graph.model.mask_head is not None:
        rows, columns = graph.regions.grid
        text += f" with masks of {rows} x {columns}"
    return text
