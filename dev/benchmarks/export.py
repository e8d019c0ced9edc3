"""Detection by onnxruntime, with a file of `tensormask export`, in turn with the model itself."""

import argparse
from typing import Any

import torch

from benchmarks.measure import compare, time_in_turn
from tensormask.commands.export import read_images
from tensormask.export.runtime import OnnxPredictor
from tensormask.predictor import Predictor
from tensormask.utils.errors import UserError
from tensormask.utils.extras import require
from tensormask.utils.tables import format_records

_EAGER, _ONNX = "eager", "onnxruntime"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("file", metavar="FILE", help="an ONNX file")
    parser.add_argument("--weights", default="tensormask_v2_nuclei", help="of the same model")
    parser.add_argument("--config-file", default="", help="of weights without a config")
    parser.add_argument("--images", nargs="+", default=[], help="the first is taken")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default: 7")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print tables, and return their numbers."""
    onnxruntime = require("onnxruntime", extra="export")
    torch.set_num_threads(args.threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = args.threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = ["CPUExecutionProvider"]
    onnx = OnnxPredictor(args.file, session_options=options, providers=providers)
    weights = args.weights if args.config_file else None
    model = Predictor(args.config_file or args.weights, weights, "cpu").model
    image = next(read_images(args.images), None)
    if image is None:
        raise UserError("there is no image")
    pixels = onnx.letterbox(image).pixels
    tensor = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    counts = {_ONNX: int(onnx.run(pixels[None])["num_detections"][0])}

    def eager() -> None:
        with torch.inference_mode():
            counts[_EAGER] = len(model.detect([tensor])[0]["scores"])

    calls = {_EAGER: eager, _ONNX: lambda: onnx.run(pixels[None])}
    times = time_in_turn(calls, rounds=args.rounds)
    rows = [{**compare(times, name, _EAGER), "detections": counts[name]} for name in calls]
    height, width = onnx.input_size
    print(f"{height} x {width} px, {args.threads} threads, medians of {args.rounds} rounds")
    print(format_records(rows))
    return {"times": rows}
