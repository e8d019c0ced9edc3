"""What the benchmarks of whole models share: their options, and how a model is made to run so."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

import torch
from torch import nn

from . import bare

bare.prepare()

from tensormask.config import CfgNode, get_cfg  # noqa: E402
from tensormask.engine.precision import set_float32_precision  # noqa: E402
from tensormask.modeling import TensorMask  # noqa: E402
from tensormask.modeling.build import COMPILE_MODES, compile_dense_parts  # noqa: E402

CONFIG_FILE = bare.ROOT / "configs" / "tensormask_R_50_FPN_1x.yaml"

_HALF = ("bfloat16", "float16")
_DTYPES = ("float32", "tf32", *_HALF)


def add_options(parser: argparse.ArgumentParser, *, size: tuple[int, int], rounds: int) -> None:
    """Add the options of `inference` and `train`, with their defaults."""
    parser.add_argument(
        "--config-file", default=str(CONFIG_FILE), metavar="FILE", help="our model (default: R-50)"
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        default=size,
        metavar=("H", "W"),
        help=f"of the image, in pixels (default: {size[0]} {size[1]})",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images (default: 1)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=_DTYPES,
        help="bfloat16 and float16 by autocast; tf32 for a GPU (default: float32)",
    )
    parser.add_argument(
        "--compile",
        nargs="?",
        const=COMPILE_MODES[0],
        choices=COMPILE_MODES,
        metavar="MODE",
        help=f"torch.compile in all models, in one of its modes (default: {COMPILE_MODES[0]})",
    )
    parser.add_argument(
        "--channels-last", action="store_true", help="convolve in channels_last, in all models"
    )
    parser.add_argument(
        "--rounds", type=int, default=rounds, metavar="N", help=f"default: {rounds}"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        metavar="N",
        help="on the CPU (default: PyTorch's, %(default)s)",
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="overrides of our model's config, the last option",
    )


def configure(args: argparse.Namespace) -> None:
    """Set threads and the precision of float32 products in this process.

    Raises:
        ValueError: there is no such device, or a number is below 1.
    """
    for name in ("batch", "rounds", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU is available; leave it out for the CPU")
    if args.dtype == "tf32" and args.device == "cpu":
        raise ValueError("--dtype tf32 is for a GPU: give --device cuda, or another dtype")
    torch.set_num_threads(args.threads)
    set_float32_precision("high" if args.dtype == "tf32" else "highest")


def read_config(args: argparse.Namespace, detections: int = 100) -> CfgNode:
    """The config of our model, with what the options say."""
    half = args.dtype if args.dtype in _HALF else _HALF[0]
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", args.device, "MODEL.CHANNELS_LAST", args.channels_last),
            *("TEST.AMP.ENABLED", args.dtype in _HALF, "TEST.AMP.DTYPE", half),
            *("SOLVER.AMP.ENABLED", args.dtype in _HALF, "SOLVER.AMP.DTYPE", half),
            *("TEST.DETECTIONS_PER_IMAGE", detections),
            *args.opts,
        ]
    )
    return cfg


def autocast(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    """Half precision, if the options ask for it, for what does not set it itself."""
    if args.dtype not in _HALF:
        return contextlib.nullcontext()
    return torch.autocast(args.device, getattr(torch, args.dtype))


def compile_model(args: argparse.Namespace, model: nn.Module) -> None:
    """Compile what `--compile` asks for: in Mask R-CNN all that has weights."""
    if args.compile is None:
        return
    if isinstance(model, TensorMask):
        compile_dense_parts(model, args.compile)
        return
    roi = model.roi_heads
    for module in (
        *(model.backbone.body, model.backbone.fpn, model.rpn.head),
        *(roi.box_head, roi.box_predictor, roi.mask_head, roi.mask_predictor),
    ):
        module.compile(mode=args.compile, dynamic=False)


def describe(args: argparse.Namespace) -> str:
    """The options in words, for the line above a table."""
    words = [f"{args.batch} x {args.size[0]} x {args.size[1]} px", args.dtype, args.device]
    if args.device == "cpu":
        words.append(f"{args.threads} threads")
    words += ["channels_last"] if args.channels_last else []
    words += [f"compile {args.compile}"] if args.compile else []
    words += [" ".join(args.opts)] if args.opts else []
    return ", ".join(words)


def as_json(args: argparse.Namespace) -> dict[str, Any]:
    """The options as another process is given them: `argparse.Namespace(**...)` has them again."""
    return {name: value for name, value in vars(args).items() if name not in ("run", "json")}


def in_mib(peak: dict[str, float]) -> dict[str, float]:
    """What `memory.peak_memory` has measured, as columns of a table."""
    return {f"{name} MiB": value for name, value in peak.items()}
