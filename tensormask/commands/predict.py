"""Detect and draw objects: `tensormask predict images/ --weights model_final.pth`.

Without weights, it is the model that comes with the package, which finds cell nuclei.

Inputs are images, folders, globs, URLs, videos and cameras; outputs are drawings, videos,
COCO results and label images.
"""

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tensormask.checkpoint.downloads import has_packaged_file, packaged_file
from tensormask.checkpoint.zoo import PACKAGED
from tensormask.commands import EXIT_INTERRUPTED
from tensormask.commands.common import (
    CommandParser,
    add_config_file,
    add_overrides,
    exits_on_user_error,
    log_to_stderr,
)
from tensormask.commands.inputs import find_inputs, list_suffixes
from tensormask.commands.prediction import InputProcessor, output_stems
from tensormask.data.decoding.formats import UNREAD_SUFFIXES
from tensormask.evaluation.results import ResultsWriter
from tensormask.predictor import Predictor
from tensormask.utils.errors import UserError

logger = logging.getLogger("tensormask.commands.predict")

DETECTIONS_FILE = "detections.json"
DEFAULT_THRESHOLD = 0.5
DEFAULT_OVERLAP = 128
SMALL_SIDE = 640  # pixels, of the network's input
KINDS = ("image", "video", "json", "labels")
DEFAULT_KINDS = "image,video,json"
EXIT_UNREAD = 1


def build_parser() -> CommandParser:
    """Return the parser of the command; its options include those of detectron2's demo."""
    parser = CommandParser(
        "predict",
        description="Detect the objects in images and videos, and draw them. Without --weights "
        "and --config-file, the objects are cell nuclei: the model is the one that comes with the "
        f"package, {PACKAGED}.",
        example="images/ --weights output/quickstart/model_final.pth",
    )
    add = parser.add_argument
    add(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="image, video, folder (without its subfolders), quoted glob (** matches subfolders), "
        "http(s) URL, name of a data set, or the number of a camera (stop with Ctrl-C)",
    )
    add("--input", nargs="+", default=[], metavar="INPUT", help="more of them")
    add("--video-input", metavar="INPUT", help=argparse.SUPPRESS)  # of detectron2's demo, as next
    add("--webcam", action="store_true", help=argparse.SUPPRESS)
    add(
        "--weights",
        default="",
        metavar="FILE",
        help="a checkpoint, by path or URL, or a name such as tensormask_R_50_FPN_6x "
        f"(default: MODEL.WEIGHTS of --config-file, or without one {PACKAGED}, which finds cell "
        "nuclei)",
    )
    add_config_file(parser, default="")
    add(
        "--output",
        default="output/predict",
        metavar="DIR",
        help="folder for what --save names (default: %(default)s)",
    )
    add(
        "--save",
        default=DEFAULT_KINDS,
        metavar="KINDS",
        help="what is written: image: a drawing (PNG) per image, named like it (a_2.png for a "
        "second a); video: a drawn video (MP4) per video; "
        f"json: {DETECTIONS_FILE}, a list of COCO results; labels: labels/<name>.png, 16 bits, 0 "
        "is background, n is the n-th detection of the image, the better score on top "
        "(default: %(default)s)",
    )
    add(
        "--threshold",
        "--confidence-threshold",
        type=float,
        metavar="SCORE",
        help="scores are above it (default: the threshold with the best F1 in the checkpoint's "
        f"last evaluation, {DEFAULT_THRESHOLD} if it has none)",
    )
    add("--classes", metavar="A,B", help="names or labels of the classes (default: all)")
    add(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="detect in overlapping tiles of this side in larger images; TIFF and .npy are then "
        "read by parts, and need not fit into memory",
    )
    add(
        "--overlap",
        type=int,
        metavar="PIXELS",
        help=f"of neighboring tiles, at least (default: {DEFAULT_OVERLAP})",
    )
    add("--device", metavar="DEVICE", help="cpu, cuda:0, ... (default: the GPU if there is one)")
    add_overrides(parser)
    return parser


class _NothingReadError(UserError):
    """No input can be read: an older file of results is not overwritten."""


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Set the yielded event at the first Ctrl-C; the second one interrupts as usual."""
    stop, previous = threading.Event(), signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)
        os.write(2, b"\nstopping after the present images; repeat to stop at once\n")

    if threading.current_thread() is not threading.main_thread():  # the only one with handlers
        yield stop
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; `inputs` are all inputs, `save` a set, `opts` the overrides."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    args.inputs += args.input + ([args.video_input] if args.video_input else [])
    args.inputs += ["0"] if args.webcam else []
    if not args.inputs:
        parser.error("name images, folders, videos or URLs")
    if args.overlap is not None and args.tile is None:
        parser.error("--overlap needs --tile")
    args.overlap = DEFAULT_OVERLAP if args.overlap is None else args.overlap
    if args.tile is not None and not 0 <= args.overlap < args.tile:
        parser.error(f"--overlap {args.overlap} must be smaller than --tile {args.tile}")
    has_default = has_packaged_file() and "MODEL.WEIGHTS" not in args.opts
    if not (args.weights or args.config_file or has_default):
        parser.error("name a model: --weights, with a checkpoint or tensormask_R_50_FPN_6x")
    args.save = {kind.strip() for kind in args.save.split(",")}
    if unknown := args.save - set(KINDS):
        parser.error(f"--save takes {','.join(KINDS)}, not {min(unknown)!r}")
    return args


def build_predictor(args: argparse.Namespace) -> tuple[Predictor, dict[str, Any]]:
    """Return the predictor of a command line, and the options of its calls."""
    source, weights = args.config_file or args.weights, args.weights or None
    if not source:
        source = packaged_file()
        print(f"model {PACKAGED}, finds cell nuclei; other objects need --weights")
    predictor = Predictor(
        source, weights if args.config_file else None, args.device, overrides=args.opts
    )
    threshold, reason = args.threshold, "given"
    if threshold is None and predictor.score_threshold is not None:
        threshold, reason = predictor.score_threshold, "the best F1 of the last evaluation"
    elif threshold is None:
        threshold, reason = DEFAULT_THRESHOLD, "the checkpoint has none of an evaluation"
    print(f"threshold {threshold:.3g} ({reason})")
    # Small images are faster together. A large one occupies the device, and its memory, alone.
    is_small = 0 not in predictor.transform.min_sizes and predictor.transform.max_size <= SMALL_SIDE
    options: dict[str, Any] = {"threshold": threshold, "batch_size": 4 if is_small else 1}
    if args.classes:
        names = [name.strip() for name in args.classes.split(",")]
        options["classes"] = [
            int(name) if name.isdecimal() and name not in predictor.class_names else name
            for name in names
        ]
    return predictor, options


@exits_on_user_error
def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 1 if an input could not be read, 2 for a user's error, 130 after Ctrl-C, which is the way
        to stop a camera and gives 0 there. What was done before is complete in all files.
    """
    args = parse_arguments(arguments)
    log_to_stderr("%(levelname)s %(message)s")
    (inputs, others, without), output = find_inputs(args.inputs), Path(args.output)
    stems = output_stems(inputs, output, args.save)
    for message in without:
        logger.error(message)
    if others:
        logger.info("%d other files were left out: %s", others.total(), list_suffixes(others))
    if unread := others & Counter(dict.fromkeys(UNREAD_SUFFIXES, others.total())):
        logger.warning(
            "%s are images in formats that are not read: convert them to JPEG or PNG",
            list_suffixes(unread),
        )
    if not inputs:
        return EXIT_UNREAD
    predictor, options = build_predictor(args)
    output.mkdir(parents=True, exist_ok=True)
    has_camera = any(isinstance(source.location, int) for source in inputs)
    start = time.perf_counter()
    with suppress(_NothingReadError), ExitStack() as stack:
        stop = stack.enter_context(stop_on_interrupt())
        stack.enter_context(logging_redirect_tqdm())
        total = None if has_camera else len(inputs)
        progress = stack.enter_context(tqdm(total=total, unit=" images", disable=None))
        results = None
        if "json" in args.save:
            results = stack.enter_context(ResultsWriter(output / DETECTIONS_FILE))
        processor = InputProcessor(
            predictor, options, output, args.save, results, progress, stop, args.tile, args.overlap
        )
        processor.process(inputs, stems)
        if not processor.num_read:
            raise _NothingReadError("no input could be read")
    num_unread = processor.num_unread + len(without)
    speed = processor.num_read / (time.perf_counter() - start)
    print(
        f"detections: {processor.num_detections} in {processor.num_read} images, in {output} "
        f"({speed:.1f} images a second)"
        + (f"; inputs that could not be read: {num_unread}" if num_unread else "")
    )
    if stop.is_set() and not has_camera:
        print("interrupted: the remaining inputs were not processed", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_UNREAD if num_unread else 0
