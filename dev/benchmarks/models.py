"""torchvision's Mask R-CNN beside our model, and what the comparisons with it share.

Weights are random and scores made up (`tensormask.commands.synthetic`): both models have as many
candidates and detections as on a photograph, on levels as for objects of COCO's sizes.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from benchmarks import ROOT
from benchmarks.measure import in_fresh_process
from tensormask.commands.benchmark import add_model_options, model_config, seeded_model
from tensormask.commands.synthetic import keep_signal, objects_per_level, scatter_logits
from tensormask.config import CfgNode
from tensormask.modeling.build import resolve_device, use_channels_last
from tensormask.utils.errors import UserError
from tensormask.utils.tables import format_records

OURS, THEIRS = "tensormask", "torchvision"
CONFIG_FILE = str(ROOT / "configs" / "tensormask_R_50_FPN_1x.yaml")
_NUM_CLASSES = 91  # of torchvision's COCO models, the background first
_CANDIDATES = 500  # above Mask R-CNN's score threshold


def add_options(
    parser: argparse.ArgumentParser,
    size: tuple[int, int],
    rounds: int,
    *,
    without: Sequence[str] = (),
    choose_models: bool = False,
) -> None:
    """Add the options of a comparison with torchvision's model, and their defaults.

    Args:
        without: tables that `--without` can leave out.
        choose_models: add `--versus` and `--models`.
    """
    names = [OURS, THEIRS]
    parser.set_defaults(versus=None, models=names)
    parser.add_argument("--config-file", default=CONFIG_FILE, metavar="FILE", help="our model")
    parser.add_argument("--rounds", type=int, default=rounds, metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    if choose_models:
        parser.add_argument(
            "--versus",
            metavar="FILE",
            help="instead of torchvision's model, the base is a model of ours with this config",
        )
        parser.add_argument("--models", nargs="+", default=names, choices=names)
    if without:
        parser.add_argument("--without", nargs="+", default=[], choices=without)
    parser.epilog = "Put another option between a list, as of --without, and KEY VALUE."
    add_model_options(parser)
    parser.set_defaults(size=size)


def configure(args: argparse.Namespace) -> dict[str, CfgNode]:
    """Return a config for each model; set the threads and the precision of this process.

    The one of torchvision's model is ours, for what it says of precision and detections. With
    `--versus` the base is named after its file.
    """
    for name in ("rounds", "threads"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
    torch.set_num_threads(args.threads)
    cfg = model_config(args)
    if not args.versus:
        return dict.fromkeys(args.models, cfg)
    versus = argparse.Namespace(**{**vars(args), "config_file": args.versus})
    return {OURS: cfg, Path(args.versus).stem: model_config(versus)}


def base_of(args: argparse.Namespace) -> str:
    """Return the name of the model that the others are compared with."""
    return Path(args.versus).stem if args.versus else THEIRS


def describe(args: argparse.Namespace, cfg: CfgNode) -> str:
    """Return the options in words, for the line above a table."""
    height, width = args.size
    where = cfg.MODEL.DEVICE if cfg.MODEL.DEVICE != "cpu" else f"cpu, {args.threads} threads"
    words = [f"{args.batch} x {height} x {width} px", args.dtype, where, *args.opts]
    base = f"the time of {base_of(args)}"
    return f"{', '.join(words)}; {args.rounds} rounds in turn; `/ base`: {base}"


def build_model(cfg: CfgNode, name: str, size: tuple[int, int], **options: Any) -> Any:
    """Build one of the models in eval mode."""
    return build_mask_rcnn(cfg, size, **options) if name == THEIRS else seeded_model(cfg)


def build_mask_rcnn(cfg: CfgNode, size: tuple[int, int], *, positive_iou: float = 0.5) -> MaskRCNN:
    """Build torchvision's model for images of one size, with what our config says of precision.

    Like the one with ImageNet weights it has frozen batch norms, and a frozen stem and layer1.
    """
    torch.manual_seed(0)
    model = MaskRCNN(
        resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3),
        _NUM_CLASSES,
        box_score_thresh=cfg.MODEL.TENSOR_MASK.SCORE_THRESH_TEST,
        box_detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
        box_fg_iou_thresh=positive_iou,
        box_bg_iou_thresh=positive_iou,
    )
    keep_signal(model.backbone.body)
    set_image_size(model, size)
    if use_channels_last(cfg.MODEL.CHANNELS_LAST, resolve_device(cfg.MODEL.DEVICE)):
        model.to(memory_format=torch.channels_last)
    if cfg.MODEL.COMPILE:
        roi = model.roi_heads
        for module in (
            *(model.backbone.body, model.backbone.fpn, model.rpn.head),
            *(roi.box_head, roi.box_predictor, roi.mask_head, roi.mask_predictor),
        ):
            module.compile(mode=cfg.MODEL.COMPILE, dynamic=False)
    return model.to(cfg.MODEL.DEVICE).eval()


def set_image_size(model: MaskRCNN, size: tuple[int, int]) -> None:
    """Let images of a size (height, width) keep it."""
    model.transform.min_size, model.transform.max_size = (min(size),), max(size)


def make_up_mask_rcnn_scores(model: MaskRCNN, size: tuple[int, int], batch: int) -> None:
    """Replace the scores of proposals and boxes, so that a Mask R-CNN detects all it can."""
    num_proposals = model.rpn.post_nms_top_n()
    # Half of the proposals may be suppressed by others.
    strong, weak = torch.linspace(4, 0, 2 * num_proposals), torch.zeros(0)
    objectness: list[Tensor] = []

    def proposals(module: Any, inputs: Any, outputs: tuple[list[Tensor], Any]) -> Any:
        logits, deltas = outputs
        if [x.shape[1:] for x in objectness] != [x.shape[1:] for x in logits]:
            largest = [2**0.5 * 32 * 2**level for level in range(len(logits))]
            counts = objects_per_level(largest, size, num_proposals)
            shapes = [x.shape[1:] for x in logits]
            objectness[:] = scatter_logits(shapes, counts, strong, weak)
        return [
            x.to(like).expand_as(like) for x, like in zip(objectness, logits, strict=True)
        ], deltas

    def classes(module: Any, inputs: Any, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        logits, deltas = torch.full_like(outputs[0], -20), outputs[1]
        logits[:, 0] = 0
        row = torch.arange(len(logits), device=logits.device) % (len(logits) // batch)
        first = (row < _CANDIDATES).nonzero()[:, 0]
        values = torch.linspace(2, -2, _CANDIDATES).to(logits)
        logits[first, 1 + row[first] % (_NUM_CLASSES - 1)] = values[row[first]]
        return logits, deltas

    model.rpn.head.register_forward_hook(proposals)
    model.roi_heads.box_predictor.register_forward_hook(classes)


def measure_memory(
    args: argparse.Namespace, peak_of: Callable[[argparse.Namespace, str], float | None]
) -> list[dict[str, Any]]:
    """Print and return the peak memory of each model; `peak_of` is a function of a module."""
    names = configure(args)
    rows = [{"model": n, "peak MiB": in_fresh_process(peak_of, args, n)} for n in names]
    print("\npeak memory above that after a call of 128 x 128 px, each in a fresh process")
    print(format_records(rows))
    return rows
