"""Converts pixel values of any type to 8-bit RGB: the one conversion of files and of memory.

bool is False 0 and True 255, uint8 is taken as it is, all other integers are stretched over one
range for all channels of an image, and floating values are 0..1. Alpha is dropped.
"""

from collections.abc import Iterable

import numpy as np

from tensormask.utils.errors import UserError

STRETCH = "tensormask.data.images.stretch_to_8_bits(image)"
_FINITE = "np.nan_to_num(image, nan=0, posinf=1, neginf=0)"
_TOLERANCE = 1e-4  # of floating values beyond 0..1, the error of a resize
_DARK_PERCENTILE, _BRIGHT_PERCENTILE = 0.1, 99.9
_LARGE = 1 << 17  # values, twice the number of different ones in 16 bits


def stretch_to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale values of any range to uint8, so that the image uses 0 to 255.

    The scale is linear from the 0.1th to the 99.9th percentile of the finite values, of all
    channels together, and clips there: a microscope often uses few of 16 bits, and single hot
    pixels must not set the scale. If the two percentiles are equal, lowest and highest value are
    used; a constant image is black. Infinities become 0 and 255, NaN becomes 0.

    Example:
        >>> stretch_to_8_bits(np.array([100, 150, 200])).tolist()
        [0, 128, 255]
    """
    has_table = values.dtype.kind in "iu" and values.dtype.itemsize <= 2
    if has_table and values.size > _LARGE:  # 4 times faster
        return _stretch_by_table(values)
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    low = high = 0.0
    if len(finite):
        low, high = np.percentile(finite, (_DARK_PERCENTILE, _BRIGHT_PERCENTILE))
        if low == high:
            low, high = finite.min(), finite.max()
    return _stretch(np.nan_to_num(values, nan=low, posinf=high, neginf=low), low, high)


def _stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    # `or 1` avoids a division by zero in a constant image.
    stretched = (values - low) / (high - low or 1)
    return np.round(stretched.clip(0, 1) * 255).astype(np.uint8)


def _stretch_by_table(values: np.ndarray) -> np.ndarray:
    """Return the same for a large image of up to 16 bits, from the number of pixels per value."""
    lowest, table = stretching_table([values], values.dtype)
    return table[values.astype(np.int64) - lowest]


def stretching_table(parts: Iterable[np.ndarray], dtype: np.dtype) -> tuple[int, np.ndarray]:
    """Return what `stretch_to_8_bits` makes of each value of an image that is read by parts.

    Args:
        parts: of the image, each of its pixels once.
        dtype: of the values, integers of up to 16 bits.

    Returns:
        - the lowest value of the dtype;
        - uint8, from this value on: item `value - lowest` is the value in 8 bits.
    """
    limits = np.iinfo(dtype)
    first = int(limits.min)
    counts = np.zeros(int(limits.max) - first + 1, np.int64)
    for part in parts:
        counts += np.bincount(part.ravel().astype(np.int64) - first, minlength=len(counts))
    levels = np.arange(first, first + len(counts), dtype=np.float64)
    ends = counts.cumsum()

    def percentile(percent: float) -> float:
        """As np.percentile, which interpolates between two of the sorted values."""
        position = percent / 100 * (int(ends[-1]) - 1)
        index = int(position)
        lower, upper = levels[np.searchsorted(ends, (index, index + 1), side="right")]
        share = position - index
        if share >= 0.5:
            return float(upper - (upper - lower) * (1 - share))
        return float(lower + (upper - lower) * share)

    low, high = percentile(_DARK_PERCENTILE), percentile(_BRIGHT_PERCENTILE)
    if low == high:
        present = levels[counts > 0]
        low, high = present[0], present[-1]
    return first, _stretch(levels, low, high)


def values_to_rgb(
    values: np.ndarray, channel_order: str = "RGB", *, stretches_floats: bool = False
) -> np.ndarray:
    """Convert pixel values to uint8 RGB `(H, W, 3)`, without a copy where none is needed.

    Args:
        values: `(H, W)` or `(H, W, 1)`, grey; `(H, W, 2)`, grey and alpha; `(H, W, 3)`; or
            `(H, W, 4)`, with alpha.
        channel_order: "RGB" or "BGR".
        stretches_floats: stretch floating values outside of 0..1, and replace those that are not
            finite, instead of refusing them: for files, in which nobody can change them.

    Raises:
        UserError: the values have no single meaning; the error gives the call that mends it.
    """
    if values.ndim == 2:
        values = values[:, :, None]
    num_colors = 1 if values.shape[2] < 3 else 3
    pixels = _to_8_bits(values[:, :, :num_colors], stretches_floats)
    if num_colors == 1:
        return np.repeat(pixels, 3, axis=2)
    return np.ascontiguousarray(pixels[:, :, ::-1] if channel_order == "BGR" else pixels)


def _to_8_bits(image: np.ndarray, stretches_floats: bool) -> np.ndarray:
    """Convert the values of an image `(H, W, C)` to uint8, or refuse them."""
    dtype = image.dtype
    if dtype == np.uint8:
        return image
    if dtype.kind == "b":
        return image.astype(np.uint8) * np.uint8(255)
    if dtype.kind in "iu" and dtype.itemsize > 1:
        return stretch_to_8_bits(image)
    if dtype.kind == "i":
        raise UserError("the image is int8: give image.view(np.uint8)")
    if dtype.kind != "f":
        raise UserError(f"the image has the dtype {dtype}; an image is uint8, or floating in 0..1")
    finite = image[np.isfinite(image)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
    is_unit = low >= -_TOLERANCE and high <= 1 + _TOLERANCE
    if stretches_floats and not is_unit:
        return stretch_to_8_bits(image)
    if not stretches_floats and not (is_unit and finite.size == image.size):
        raise UserError(_refusal(image, low, high, is_unit))
    finite_image = np.nan_to_num(image, nan=0, posinf=1, neginf=0)
    return np.round(finite_image.clip(0, 1) * 255).astype(np.uint8)


def _refusal(image: np.ndarray, low: float, high: float, is_unit: bool) -> str:
    """Say why a floating image is refused, and how to mend it."""
    if is_unit:
        return f"the image has NaN or infinity: give {_FINITE}"
    given = f"the image is {image.dtype} with values from {low:.4g} to {high:.4g}"
    if low < 0 and image.shape[2] > 1:
        return f"{given}: give the image as it was before normalization"
    if low >= 0 and high <= 255 and np.isfinite(image).all():
        return f"{given}: give image.astype(np.uint8)"
    return f"{given}: give {STRETCH}"
