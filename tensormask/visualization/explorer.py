"""The windows explorer: a page on which every window of a model can be looked at.

`tensormask visualize windows IMAGE --html` writes it. For each level and window size it contains
what the mask head's last convolution predicts, in 4 bits a value. From it the page computes the
masks of windows (`windows_tensors.js`), by the formulas of `layers.representation` and
`layers.swap_align2nat`: so it needs no more room for the tensor bipyramid, whose natural masks are
``lambda**2`` times larger than its predictions, than for other heads.

A code is ``round(15 p)`` of the probability p = sigmoid(logit). Two codes make a byte. Each tensor
is compressed by zlib, which is `DecompressionStream("deflate")` in a browser, and then in base64.
"""

import base64
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensormask.modeling.inspect import Inspection, predicted_tensor
from tensormask.modeling.mask_head import MaskHead
from tensormask.visualization.html.page import image_uri, write_page
from tensormask.visualization.instances import class_name
from tensormask.visualization.windows import MARK, MASK_COLORS

MAX_CODE = 15
PAD_VAL = -6.0  # the logit outside of the grid
# The logits that codes stand for. Most of 0 and 15 are saturated: on nuclei, 8 gives masks closest
# to the model's, with a mean IoU of 0.96.
_SATURATED = 8.0
CODE_LOGITS = (
    -_SATURATED,
    *(math.log(code / (MAX_CODE - code)) for code in range(1, MAX_CODE)),
    _SATURATED,
)


def mask_codes(logits: Tensor) -> Tensor:
    """Return the codes of mask logits, uint8 of the same shape: 8..15 if positive, else 0..7."""
    return (logits.sigmoid() * MAX_CODE).round().to(torch.uint8)


def pack_codes(codes: Tensor) -> str:
    """Return codes of any shape, in row-major order: two a byte, the first in its high half."""
    flat = codes.flatten().cpu().numpy()
    pairs = np.append(flat, np.zeros(len(flat) % 2, np.uint8)).reshape(-1, 2)
    return compress(pairs[:, 0] << 4 | pairs[:, 1])


def compress(content: np.ndarray) -> str:
    """Return the bytes of a uint8 array, compressed, in base64."""
    return base64.b64encode(zlib.compress(content.tobytes(), 9)).decode()


def is_read(mask_head: MaskHead, level: int, num_windows: int, side: int, extent: int) -> Tensor:
    """Return which entries of an aligned tensor the windows of a level read, along one axis pair.

    Args:
        num_windows: rows of the level's grid.
        side, extent: V and H of the predicted tensor.

    Returns:
        Tensor[V, H]: bool. False: no mask depends on the entry ``A(v, :, y, :)``, because it is of
        windows outside of the grid.
    """
    steps = mask_head.steps[level]  # from window to window
    alpha = steps * mask_head.upscale  # from mask pixel to mask pixel
    offsets = alpha * (torch.arange(side)[:, None] - (side - 1) / 2)
    location = torch.arange(extent)
    # A mask pixel is interpolated between two predicted ones, and between two locations.
    reach = alpha + 1
    last_window = steps * (num_windows - 1)
    return (location > offsets - reach) & (location < last_window + offsets + reach)


def mask_tensor(inspection: Inspection, level: int, size: int) -> dict[str, Any]:
    """Return the predicted tensor of a level and window size, as `windows_tensors.js` reads it."""
    mask_head = inspection.model.mask_head
    codes = mask_codes(predicted_tensor(mask_head, inspection.features, level, size))
    side, _, height, width = codes.shape
    if mask_head.aligned:
        rows, columns = inspection.features[level].shape[-2:]
        read_y = is_read(mask_head, level, rows, side, height).to(codes.device)
        read_x = is_read(mask_head, level, columns, side, width).to(codes.device)
        codes *= read_y[:, None, :, None] & read_x[None, :, None, :]  # zeros take no room
    return {"side": side, "height": height, "width": width, "codes": pack_codes(codes)}


def explorer_data(
    inspection: Inspection, levels: list[int], class_names: list[str]
) -> dict[str, Any]:
    """Return what the page needs to know about a model and an image, as JSON.

    Args:
        levels: whose windows the page shows, fine to coarse.
        class_names: by label.
    """
    model, found = inspection.model, inspection.detections
    windows, mask_head = model.windows, model.mask_head
    of_levels = []
    for level in levels:
        scores = inspection.class_scores[level]  # (S, num_classes, H, W)
        of_level: dict[str, Any] = {
            "name": windows.level_names[level],
            "stride": windows.strides[level],
            "height": scores.shape[2],
            "width": scores.shape[3],
            "sizes": windows.sizes[level],
            "scores": compress((scores * 255).round().to(torch.uint8).cpu().numpy()),
            "steps": mask_head.steps[level] if mask_head else 1,
        }
        if mask_head is not None:
            sizes = range(windows.num_sizes)
            of_level["masks"] = [mask_tensor(inspection, level, size) for size in sizes]
        of_levels.append(of_level)
    columns = (found.level, found.size, found.y, found.x, found.labels, found.scores)
    names = ("level", "size", "y", "x", "label", "score")
    rows = zip(*(column.tolist() for column in columns), strict=True)
    detections = [dict(zip(names, row, strict=True)) for row in rows if row[0] in levels]
    for detection in detections:
        detection["level"] = levels.index(detection["level"])
    data = {
        "classes": [class_name(label, class_names) for label in range(scores.shape[1])],
        "threshold": inspection.threshold,
        "mask_iou": model.head.mask_iou,
        "levels": of_levels,
        "detections": detections,
        "colors": MASK_COLORS,
        "mark": MARK,
        "logits": CODE_LOGITS,
        "padding": PAD_VAL,
    }
    if mask_head is not None:
        data |= {
            "aligned": mask_head.aligned,
            "bipyramid": mask_head.bipyramid,
            "zoom": mask_head.zoom,
            "upscale": mask_head.upscale,
            "upscale_mode": mask_head.upscale_mode,
        }
    return data


def write_explorer(
    path: str | Path,
    inspection: Inspection,
    rgb: np.ndarray,
    levels: list[int],
    *,
    class_names: list[str],
    model_name: str,
    image_name: str,
) -> Path:
    """Write the page of a model on an image to one file, and return its path.

    Args:
        rgb: the network's input, uint8 `(H, W, 3)`.
        levels, class_names: as of `explorer_data`.
        model_name, image_name: for its title.

    Raises:
        UserError: jinja2 is not installed.
    """
    data = explorer_data(inspection, levels, class_names)
    data |= {"image": image_uri(rgb, 90), "width": rgb.shape[1], "height": rgb.shape[0]}
    return write_page(
        path, "windows.html.j2", data=data, model_name=model_name, image_name=image_name
    )
