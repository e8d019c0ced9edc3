"""A model that detects the bright pixels of each channel, for tests of `Predictor`."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from tensormask.config import CfgNode, get_cfg

CHANNELS = ("red", "green", "blue")
SCORES = (0.9, 0.65, 0.4)


class BrightModel(nn.Module):
    """Detect the bright pixels of each channel as one object, with the score of the channel."""

    windows = SimpleNamespace(mask_sizes=())  # as `load_weights` needs
    size_divisor = 32

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.seen: list[list[tuple[int, ...]]] = []  # the shapes of each batch
        self.options: list[dict] = []

    def detect(self, images, output_sizes, **options):
        assert not self.training
        self.seen.append([tuple(image.shape) for image in images])
        self.options.append(options)
        return [self._detect_one(*pair) for pair in zip(images, output_sizes, strict=True)]

    def _detect_one(self, image, output_size):
        (height, width), boxes, masks, labels = output_size, [], [], []
        scale = torch.tensor([width / image.shape[2], height / image.shape[1]] * 2)
        for label, channel in enumerate(image):
            bright = channel > 128
            if bright.any():
                rows, columns = bright.any(1).nonzero(), bright.any(0).nonzero()
                x0, y0, x1, y1 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
                boxes.append(torch.tensor([x0, y0, x1, y1]) * scale)
                masks.append(bright[y0:y1, x0:x1].float())
                labels.append(label)
        boxes = torch.stack(boxes) if boxes else torch.zeros(0, 4)
        scores = torch.tensor([SCORES[label] for label in labels])
        labels = torch.tensor(labels, dtype=torch.int64)
        found = {"boxes": boxes, "scores": scores, "labels": labels}
        return found | {"windows": boxes, "window_masks": masks}


def bright_cfg() -> CfgNode:
    """Return a config of three classes, which resizes to 64 pixels, at most 90."""
    cfg = get_cfg()
    cfg.MODEL.TENSOR_MASK.NUM_CLASSES = 3
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.INPUT.MAX_SIZE_TEST = 90
    return cfg


def checkpoint(tmp_path, name="model.pth", **extra):
    path = tmp_path / name
    torch.save({"model": {"bias": torch.ones(1)}, **extra}, path)
    return path


def make_image(height=48, width=96):
    """Return a black image with a red rectangle and a green one below it."""
    rgb = np.zeros((height, width, 3), np.uint8)
    rgb[6:18, 12:36, 0] = 255
    rgb[24:42, 48:84, 1] = 255
    return rgb


def same(a, b) -> bool:
    tensors = ("boxes", "scores", "labels", "masks")
    return a["class_names"] == b["class_names"] and all(torch.equal(a[k], b[k]) for k in tensors)
