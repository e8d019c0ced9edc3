#!/usr/bin/env python
"""Draw the figures of docs/representation.md: `python dev/draw_representation.py`.

They are computed with the library's functions on images of the shapes data set, always with the
same result.
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle_tools
from torch import Tensor

from tensormask.data.checks.segmentation import segmentation_to_rle
from tensormask.data.shapes import generate_image
from tensormask.layers import crop_masks, nat2align, up_align2nat, up_bilinear
from tensormask.modeling.windows import Windows
from tensormask.visualization.grid import (
    captioned,
    enlarge,
    fit,
    montage,
    side_by_side,
    titled,
)
from tensormask.visualization.windows import (
    MARK,
    aligned_view,
    mask_colors,
    natural_view,
    window_crop,
)

DOCS = Path(__file__).parent.parent / "docs"
ORANGE, VIOLET = (255, 150, 0), (170, 0, 220)

# A triangle and a disc in the windows of p2 of 60 px: masks of 15 x 15 pixels of 4 px.
IMAGE, STRIDE, WINDOW, SIDE = 7, 4, 60, 15
BEST = (15, 15)  # row and column of the window that all figures show
FRAMED = {BEST: MARK, (15, 21): ORANGE, (6, 15): VIOLET}
OFFSETS = (-6, -3, 0, 3, 6)  # pixels of the mask, from its center
AT_THE_BORDER = (12, 15)  # two rows above it, windows belong to the disc
LAMBDA = 5  # of the upscaling
# A star, drawn four times as large, in a window of p5.
LARGE_IMAGE, LARGE_OBJECT, LARGE_SCALE, LARGE_STRIDE, LARGE_WINDOW = 18, 1, 4, 32, 480


def read_scene(image: int, scale: int) -> tuple[np.ndarray, Tensor]:
    """Return an image of shapes_val, `scale` times as large, and its masks, bool (M, H, W)."""
    rgb, annotations = generate_image("val", image)
    rgb = enlarge(rgb, scale)
    masks = []
    for annotation in annotations:
        polygons = [
            [scale * coordinate for coordinate in line] for line in annotation["segmentation"]
        ]
        masks.append(rle_tools.decode(segmentation_to_rle(polygons, rgb.shape[:2])))
    return rgb, torch.from_numpy(np.stack(masks)).bool()


def natural_tensor(masks: Tensor) -> Tensor:
    """Return masks, bool (M, H, W), as the natural tensor (V, U, H, W), float 0 and 1.

    A window has the mask of the object with the nearest center.
    """
    height, width = (extent // STRIDE for extent in masks.shape[1:])
    y, x = torch.ones(height, width).nonzero().T
    level = torch.zeros_like(y)
    boxes = Windows((STRIDE,), ((WINDOW,),)).boxes(level, level, y, x)
    centers = torch.stack([mask.nonzero().float().mean(0) for mask in masks])
    locations = torch.stack([y, x], dim=1) * STRIDE
    nearest = torch.cdist(locations.float(), centers).argmin(1)
    natural = crop_masks(masks, nearest, boxes, SIDE)
    return natural.permute(1, 2, 0).unflatten(2, (height, width)).float()


def draw_natural(rgb: np.ndarray, natural: Tensor) -> np.ndarray:
    """Draw the image with three windows, their crops and masks, and masks of a grid of windows."""
    factor = 3
    image = enlarge(rgb, factor)
    pairs = []
    for (y, x), color in FRAMED.items():
        box = [STRIDE * index + half for half in (-WINDOW // 2, WINDOW // 2) for index in (x, y)]
        x0, y0, x1, y1 = (factor * edge for edge in box)
        cv2.rectangle(image, (x0, y0), (x1 - 1, y1 - 1), color, 2)
        cv2.circle(image, ((x0 + x1) // 2, (y0 + y1) // 2), 4, color, cv2.FILLED)
        mask = enlarge(mask_colors(natural[:, :, y, x].numpy()), 6)
        pair = side_by_side(window_crop(rgb, box, len(mask)), mask)
        cv2.rectangle(pair, (0, 0), (len(mask) - 1, len(mask) - 1), color, 2)
        pairs.append(titled(pair, f"window y {y}, x {x}; its mask"))
    rows = columns = range(3, 32, 3)
    tiles = natural[:, :, rows][..., columns].permute(2, 3, 0, 1).numpy()
    view = natural_view(tiles, list(rows), list(columns), 30, FRAMED)
    left = titled(image, "128 x 128 px, three of its windows of 60 x 60 px")
    right = titled(view, "F(:, :, y, x): the masks of every third window")
    return montage([montage([left, right], 2), montage(pairs, 3)], 1)


def draw_aligned(natural: Tensor, aligned: Tensor) -> np.ndarray:
    """Draw channels (v, u) over all windows, natural and aligned, and mark one window's mask."""
    chosen = [offset + SIDE // 2 for offset in OFFSETS]
    panels = []
    for tensor, alpha, title in (
        (natural, 0, "natural: maps F(v, u, :, :)"),
        (aligned, 1, "aligned: maps A(v, u, :, :)"),
    ):
        maps = tensor[chosen][:, chosen].numpy()
        read = [[index + alpha * offset for offset in OFFSETS] for index in BEST]
        panels.append(titled(aligned_view(maps, (OFFSETS, OFFSETS), 96, read), title))
    return captioned(
        montage(panels, 2),
        ["In green: the same 25 of the 15 x 15 pixels of one window's mask."],
    )


def draw_upscaled(natural: Tensor, aligned: Tensor) -> np.ndarray:
    """Draw two masks, and their versions upscaled from five times coarser predictions."""
    blocks = natural.unflatten(0, (-1, LAMBDA)).unflatten(2, (-1, LAMBDA))
    coarse_natural = blocks.mean((1, 3))
    centers = slice(LAMBDA // 2, None, LAMBDA)
    coarse_aligned = aligned[centers, centers]
    upscaled = {
        "natural": up_bilinear(coarse_natural, LAMBDA),
        "aligned": up_align2nat(coarse_aligned, LAMBDA, pad_val=0.0),
    }
    panels = []
    for y, x in (BEST, AT_THE_BORDER):
        truth = natural[:, :, y, x]
        panels.append(titled(large(truth), f"window y {y}, x {x}: 15 x 15"))
        for name, tensor in upscaled.items():
            mask = tensor[:, :, y, x]
            panels.append(titled(large(mask), f"{name}, from 3 x 3: IoU {iou(mask, truth):.2f}"))
    return montage(panels, 1 + len(upscaled))


def draw_bipyramid(rgb: np.ndarray, mask: Tensor) -> np.ndarray:
    """Draw a large object in a window of a coarse level, and its masks on the two pyramids."""
    center = mask.nonzero().float().mean(0)
    y, x = (center / LARGE_STRIDE).round().long().view(2, 1)
    level = torch.zeros_like(y)
    windows = Windows((LARGE_STRIDE,), ((LARGE_WINDOW,),))
    boxes = windows.boxes(level, level, y, x)
    panels = [titled(window_crop(rgb, boxes[0].tolist(), 240), f"window of {LARGE_WINDOW} px")]
    for side, title in ((15, "feature pyramid"), (120, "tensor bipyramid")):
        (cropped,) = crop_masks(mask[None], level, boxes, side)
        panels.append(titled(large(cropped.float()), f"{title}: {side} x {side}"))
    return montage(panels, len(panels))


def large(mask: Tensor) -> np.ndarray:
    return fit(mask_colors(mask.numpy()), 240)


def iou(mask: Tensor, truth: Tensor) -> float:
    mask, truth = mask >= 0.5, truth >= 0.5
    return float((mask & truth).sum() / (mask | truth).sum())


def figures() -> dict[str, np.ndarray]:
    """Return the figures by file name."""
    rgb, masks = read_scene(IMAGE, 1)
    natural = natural_tensor(masks)
    aligned = nat2align(natural, pad_val=0.0)
    large_rgb, large_masks = read_scene(LARGE_IMAGE, LARGE_SCALE)
    return {
        "representation_natural.png": draw_natural(rgb, natural),
        "representation_aligned.png": draw_aligned(natural, aligned),
        "representation_upscaled.png": draw_upscaled(natural, aligned),
        "representation_bipyramid.png": draw_bipyramid(large_rgb, large_masks[LARGE_OBJECT]),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description="Draw the figures of docs/representation.md.")
    parser.add_argument(
        "--output", default=str(DOCS), metavar="DIR", help="folder (default: docs/)"
    )
    args = parser.parse_args(arguments)
    for name, figure in figures().items():
        path = Path(args.output) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(figure).save(path, optimize=True)  # OpenCV's files are twice as large
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
