"""A small model with random weights, every head, and images and targets for tests."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import tensormask
from tensormask.config import CfgNode

CONFIGS = Path(__file__).parent.parent / "configs"
# The paper's heads. The first three are set by detectron2's switches.
HEADS = {
    "natural": {"ALIGNED_ON": False, "BIPYRAMID_ON": False},
    "aligned": {"ALIGNED_ON": True, "BIPYRAMID_ON": False},
    "bipyramid": {"ALIGNED_ON": True, "BIPYRAMID_ON": True},
    "finer_bipyramid": {"HEAD": "bipyramid", "MASK_UNIT": 2},
    "upscale_natural": {"HEAD": "upscale_natural", "UPSCALE_LAMBDA": 3.0},
    "upscale_aligned": {"HEAD": "upscale_aligned", "UPSCALE_LAMBDA": 1.5},
    "upscale_nearest": {
        "HEAD": "upscale_aligned",
        "UPSCALE_LAMBDA": 5.0,
        "UPSCALE_MODE": "nearest",
    },
}


def get_cfg(head: str = "bipyramid", opts: Sequence[object] = ()) -> CfgNode:
    """Return a config of an R-18 with 16 channels, 3 classes and the published windows.

    Upscale heads have one of the two window sizes: only 15 pixels are divisible.
    """
    cfg = tensormask.get_cfg()
    cfg.merge_from_file(str(CONFIGS / "Base-TensorMask.yaml"))
    prefix = "MODEL.TENSOR_MASK."
    switches = [word for key, value in HEADS[head].items() for word in (prefix + key, value)]
    if head.startswith("upscale"):
        switches += ["MODEL.ANCHOR_GENERATOR.SIZES", [[60 * 2**k] for k in range(6)]]
    cfg.merge_from_list([
        "MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.NORM", "GN",
        "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.PIXEL_STD", [57.0, 57.0, 57.0],
        "MODEL.FPN.OUT_CHANNELS", 16, prefix + "CLS_CHANNELS", 16, prefix + "BBOX_CHANNELS", 16,
        prefix + "MASK_CHANNELS", 16, prefix + "NUM_CONVS", 1, prefix + "NUM_CLASSES", 3,
        prefix + "INIT", "he", *switches,
    ])  # fmt: skip
    cfg.merge_from_list(opts)
    return cfg


def build(
    head: str = "bipyramid", opts: Sequence[object] = (), seed: int = 0
) -> tensormask.TensorMask:
    torch.manual_seed(seed)
    return tensormask.build_model(get_cfg(head, opts))


def make_image(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def target(height: int, width: int, boxes: list[list[float]]) -> dict[str, Tensor]:
    """Return objects that fill their boxes, with labels 0, 1, 2, 0, ..."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return {"boxes": boxes, "labels": torch.arange(len(boxes)) % 3, "masks": masks}


def with_detections(model: tensormask.TensorMask) -> tensormask.TensorMask:
    """Return the model in eval mode, with scores and masks that differ from window to window."""
    torch.nn.init.normal_(model.head.cls_score.bias, -1.0, 0.5)
    for pred in model.mask_head.mask_pred if model.mask_head else ():
        torch.nn.init.normal_(pred.weight, std=0.25)
    return model.eval()


# Overrides of the tiny config that change names or shapes of weights.
MODELS = {
    "GN": [],
    "BN": ["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 2],
    "SyncBN": ["MODEL.RESNETS.NORM", "SyncBN"],
    "R-50, frozen": ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.NORM", "FrozenBN"],
    "norm in the pyramid": ["MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", 32],
    "no masks": ["MODEL.MASK_ON", False],
    "one window size": ["MODEL.ANCHOR_GENERATOR.SIZES", [[44 * 2**k] for k in range(6)]],
    "masks of one and of three digits": [
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[28 * 2**k, 400 * 2**k] for k in range(6)])
    ],
    "large windows first": [
        "MODEL.ANCHOR_GENERATOR.SIZES", [[60 * 2**k, 28 * 2**k] for k in range(6)]
    ],
    "p3 to p6": [
        *("MODEL.TENSOR_MASK.IN_FEATURES", ["p3", "p4", "p5", "p6"]),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[88 * 2**k, 120 * 2**k] for k in range(4)]),
    ],
}  # fmt: skip
