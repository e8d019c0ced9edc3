"""Photometric distortion: random brightness, contrast, saturation and hue.

The distortion of SSD (Liu et al., arXiv 1512.02325) with the ranges of torchvision's
`RandomPhotometricDistort`. The operations are torchvision's on PIL images, whose results do not
depend on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from torchvision.transforms.v2 import functional

_OPERATIONS = {
    "brightness": functional.adjust_brightness,
    "contrast": functional.adjust_contrast,
    "saturation": functional.adjust_saturation,
    "hue": functional.adjust_hue,
}
# Factors; for the hue the shift in turns of the color circle.
_RANGES = {
    "brightness": (0.875, 1.125),
    "contrast": (0.5, 1.5),
    "saturation": (0.5, 1.5),
    "hue": (-0.05, 0.05),
}
# Contrast is changed before or after the colors, with equal probability.
_ORDERS = (
    ("brightness", "contrast", "saturation", "hue"),
    ("brightness", "saturation", "hue", "contrast"),
)


@dataclass(frozen=True)
class Distortion:
    """Changes of an RGB image: names of operations with their factors, in order.

    Example:
        >>> image = Image.new("RGB", (1, 1), (100, 50, 200))
        >>> Distortion((("brightness", 0.5),))(image).getpixel((0, 0))
        (50, 25, 100)
    """

    steps: tuple[tuple[str, float], ...]

    def __call__(self, image: Image.Image) -> Image.Image:
        for name, factor in self.steps:
            image = _OPERATIONS[name](image, factor)
        return image


def draw_distortion(probability: float, rng: np.random.Generator) -> Distortion:
    """Draw a distortion that has each of the operations with this probability."""
    order = _ORDERS[int(rng.integers(len(_ORDERS)))]
    drawn = [(name, float(rng.uniform(*_RANGES[name])), rng.random()) for name in order]
    return Distortion(tuple((name, factor) for name, factor, p in drawn if p < probability))
