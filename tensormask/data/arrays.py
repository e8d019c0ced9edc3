"""Converts images in memory (PIL, NumPy, tensors) to 8-bit RGB, with the pixels of their files.

What has a single meaning is converted. Everything else is refused, and the error gives the call
that makes an image of it.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image

from tensormask.data.decoding.pixels import STRETCH, values_to_rgb
from tensormask.data.images import is_out_of_resources, to_rgb
from tensormask.utils.errors import UserError

CHANNEL_ORDERS = ("RGB", "BGR")
# What mends a tensor, by what mends the same array.
_CALLS_OF_TORCH = {
    ".astype(np.uint8)": ".to(torch.uint8)",
    ".view(np.uint8)": ".view(torch.uint8)",
    "np.nan_to_num(image, ": "image.nan_to_num(",
    STRETCH: "torch.from_numpy("
    + STRETCH.replace("(image)", "(image.detach().cpu().float().numpy())")
    + ")",
}


def image_to_rgb(image: Any, channel_order: str = "RGB") -> np.ndarray:
    """Return an image in memory as uint8 RGB `(H, W, 3)`, without a copy where none is needed.

    Args:
        image: one of

            - a PIL image of any mode, converted and rotated by its EXIF orientation as
              `read_image` does;
            - an array `(H, W, 3)` or grey `(H, W)` or `(H, W, 1)`, also with alpha, which is
              dropped, `(H, W, 4)` and `(H, W, 2)`: uint8, bool, floating in 0..1, or integers of
              more than 8 bits, which are stretched (`stretch_to_8_bits`) as in files;
            - a tensor `(3, H, W)` on any device, with the same values.
        channel_order: "RGB" or "BGR", of arrays and tensors.

    Raises:
        UserError: anything else, with the call that mends it.

    Example:
        >>> image_to_rgb(np.full((1, 1), 0.2)).tolist()
        [[[51, 51, 51]]]
    """
    if channel_order not in CHANNEL_ORDERS:
        raise UserError(f'channel_order is "RGB" or "BGR", got {channel_order!r}')
    if image is None:
        raise UserError(
            "the image is None, which cv2.imread returns for a file that it cannot read: give the "
            "path instead, to see the reason"
        )
    if isinstance(image, Image.Image):
        return _pil_to_rgb(image)
    if isinstance(image, torch.Tensor):
        try:
            return image_to_rgb(_tensor_to_array(image), channel_order)
        except UserError as error:
            message = str(error)
            for of_numpy, of_torch in _CALLS_OF_TORCH.items():
                message = message.replace(of_numpy, of_torch)
            raise UserError(message) from None
    if not isinstance(image, np.ndarray):
        raise UserError(_describe_other(image))
    values = np.asarray(image)  # a matrix stays 2-dimensional
    _check_shape(values.shape)
    return values_to_rgb(values, channel_order)


def _pil_to_rgb(image: Image.Image) -> np.ndarray:
    if 0 in image.size:
        raise UserError(f"the image has no pixels: its size is {image.width} x {image.height}")
    try:
        return to_rgb(image)
    except Exception as error:  # PIL reads files only now, and fails in many ways
        if is_out_of_resources(error):
            raise
        reason = str(error) or type(error).__name__
        raise UserError(f"the PIL image cannot be read: {reason}") from error


def _tensor_to_array(image: torch.Tensor) -> np.ndarray:
    """Convert a tensor (3, H, W) to an array (H, W, 3)."""
    shape = tuple(image.shape)
    hint = {2: "image.expand(3, -1, -1)", 4: "list(images), for a list of results"}.get(len(shape))
    if len(shape) == 3 and shape[0] != 3:
        hint = {1: "image.expand(3, -1, -1)", 4: "image[:3]"}.get(shape[0])
        hint = "image.permute(2, 0, 1)" if shape[2] in (3, 4) else hint
    if len(shape) != 3 or shape[0] != 3:
        raise UserError(_refusal(f"a tensor must be (3, H, W), got {shape}", hint))
    image = image.detach().cpu().permute(1, 2, 0)
    return (image.float() if image.is_floating_point() else image).numpy()


def _check_shape(shape: tuple[int, ...]) -> None:
    """Refuse the shape of an array unless it is an image's."""
    if 0 in shape:
        raise UserError(f"the image has no pixels: its shape is {shape}")
    if len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 2, 3, 4)):
        return
    hint = None
    if len(shape) == 3 and shape[0] in (1, 2, 3, 4):
        hint = "image.transpose(1, 2, 0)"
    elif len(shape) == 4:
        hint = "list(images), for a list of results"
    raise UserError(_refusal(f"an array must be (H, W, 3) or grey (H, W), got {shape}", hint))


def _refusal(reason: str, call: str | None) -> str:
    return f"{reason}: give {call}" if call else reason


def _describe_other(image: Any) -> str:
    """Say what an object that is no image is."""
    kind = f"{type(image).__name__} is not an image"
    if isinstance(image, bytes | bytearray | memoryview):
        return f"{kind}: give PIL.Image.open(io.BytesIO(data))"
    if hasattr(image, "read"):
        return f"{kind}: give PIL.Image.open(file)"
    if isinstance(image, Iterable) and not isinstance(image, dict | list | tuple):
        return f"{kind}: give iter(images), for a generator of results"
    return (
        f"{kind}: give a path, a URL, a PIL image, an array (H, W, 3), a tensor (3, H, W), or "
        "a list or iterator of them"
    )
