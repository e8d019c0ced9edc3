"""Converts images in memory (PIL, NumPy, tensors) to 8-bit RGB, as `images` does for files.

What has a single meaning is converted. Everything else is refused, and the error gives the call
that makes an image of it.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image

from tensormask.data.images import stretch_to_8_bits, to_rgb
from tensormask.utils.errors import UserError

CHANNEL_ORDERS = ("RGB", "BGR")
_MAX_FLOAT = 1 + 1e-4  # of a floating image, with the error of a resize
# What mends a tensor, by what mends the same array.
_CALLS_OF_TORCH = {
    ".astype(np.uint8)": ".to(torch.uint8)",
    "np.nan_to_num(image)": "image.nan_to_num()",
    "tensormask.data.images.stretch_to_8_bits(image)": "image / image.max()",
}


def image_to_rgb(image: Any, channel_order: str = "RGB") -> np.ndarray:
    """Return an image in memory as uint8 RGB `(H, W, 3)`, without a copy where none is needed.

    Args:
        image: one of

            - a PIL image of any mode, converted as `read_image` does, but not rotated by EXIF: the
              result has the image's size;
            - an array `(H, W, 3)`, `(H, W, 4)`, whose alpha is dropped, or grey `(H, W)` or
              `(H, W, 1)`: uint8, or floating in 0..1; grey can also be uint16, which is stretched
              (`stretch_to_8_bits`) as in files;
            - a tensor `(3, H, W)` on any device: uint8, or floating in 0..1.
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
    pixels = _to_8_bits(_with_channels_last(np.asarray(image)))  # a matrix stays 2-dimensional
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    pixels = pixels[:, :, :3]
    return np.ascontiguousarray(pixels[:, :, ::-1] if channel_order == "BGR" else pixels)


def _pil_to_rgb(image: Image.Image) -> np.ndarray:
    if 0 in image.size:
        raise UserError(f"the image has no pixels: its size is {image.width} x {image.height}")
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:  # PIL reads files only now
        raise UserError(f"the PIL image cannot be read: {error}") from error
    return to_rgb(image)


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


def _with_channels_last(image: np.ndarray) -> np.ndarray:
    """Return `(H, W, C)` with C 1, 3 or 4, or refuse the shape."""
    shape = image.shape
    if not image.size:
        raise UserError(f"the image has no pixels: its shape is {shape}")
    if len(shape) == 2:
        return image[:, :, None]
    if len(shape) == 3 and shape[2] in (1, 3, 4):
        return image
    hint = None
    if len(shape) == 3 and shape[0] in (1, 3, 4):
        hint = "image.transpose(1, 2, 0)"
    elif len(shape) == 4:
        hint = "list(images), for a list of results"
    raise UserError(_refusal(f"an array must be (H, W, 3) or grey (H, W), got {shape}", hint))


def _to_8_bits(image: np.ndarray) -> np.ndarray:
    """Convert the values of an image `(H, W, C)` to uint8, or refuse them."""
    kind = image.dtype
    if kind == np.uint8:
        return image
    if kind.kind == "b":
        raise UserError(_refusal("the image is bool", "image.astype(np.uint8) * 255"))
    if kind.kind not in "iuf":
        raise UserError(f"the image has the dtype {kind}; an image is uint8, or floating in 0..1")
    if kind == np.uint16 and image.shape[2] == 1:
        return stretch_to_8_bits(image)
    if kind.kind == "f" and not np.isfinite(image).all():
        raise UserError(_refusal("the image has NaN or infinity", "np.nan_to_num(image)"))
    low, high = image.min(), image.max()
    if kind.kind == "f" and low >= 0 and high <= _MAX_FLOAT:
        return np.round(image.clip(0, 1) * 255).astype(np.uint8)
    given = f"the image is {kind} with values from {low:.4g} to {high:.4g}"
    if low < 0 and kind.kind == "f" and image.shape[2] > 1:
        raise UserError(f"{given}: give the image as it was before normalization")
    if low >= 0 and high <= 255:
        raise UserError(_refusal(given, "image.astype(np.uint8)"))
    if kind == np.uint16:
        raise UserError(_refusal(given, "(image // 256).astype(np.uint8)"))
    raise UserError(_refusal(given, "tensormask.data.images.stretch_to_8_bits(image)"))


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
