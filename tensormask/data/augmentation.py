"""What is drawn at random for an image: its size, flip, crop, rotation and so on.

`Augmentation.draw` returns a `Geometry`; what it does to pixels, boxes and masks depends only on
it. The default draws what detectron2's mapper draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tensormask.config import CfgNode
from tensormask.data.geometry import FLIPS, Geometry, Region
from tensormask.utils.errors import UserError

SAMPLINGS = ("choice", "range")
CROP_TYPES = ("relative_range", "relative", "absolute", "absolute_range")
_MAX_ZOOM_OUT = 4.0  # the largest side of SSD's canvas, in sides of the image


@dataclass(frozen=True)
class RandomCrop:
    """detectron2's RandomCrop of the image, before it is resized.

    Attributes:
        kind: how the size is drawn: "relative_range" (each side uniform between the share and all
            of the image's), "relative" (a share of each side), "absolute" (pixels), or
            "absolute_range" (each side uniform between two numbers of pixels).
        size: two shares (of height and width), or two numbers of pixels: height and width, or for
            the range the lowest and the highest. A larger crop than the image is the whole side.

    Raises:
        ValueError: a value is not valid.
    """

    kind: str
    size: tuple[float, float]

    def __post_init__(self) -> None:
        if self.kind not in CROP_TYPES:
            raise UserError(f"INPUT.CROP.TYPE is one of {CROP_TYPES}, not {self.kind!r}.")
        size, wanted = self.size, "two whole numbers of pixels"
        valid = _is_pair(size) and min(size) > 0
        if self.kind.startswith("relative"):
            wanted = "two shares above 0 and up to 1"
            valid = valid and max(size) <= 1
        else:
            valid = valid and all(float(length).is_integer() for length in size)
        if self.kind == "absolute_range":
            wanted += ", the lower one first"
            valid = valid and size[0] <= size[1]
        if not valid:
            raise UserError(f"INPUT.CROP.SIZE is {size}; the type {self.kind!r} takes {wanted}.")

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> Region:
        """Draw the crop of an image of `size` (height, width) in pixels."""
        height, width = (max(1, min(drawn, side)) for drawn, side in self._draw_sides(size, rng))
        top = int(rng.integers(size[0] - height + 1))
        left = int(rng.integers(size[1] - width + 1))
        return Region(top, left, height, width)

    def _draw_sides(self, size: tuple[int, int], rng: np.random.Generator) -> list[tuple[int, int]]:
        """Return the drawn length of each side beside the image's."""
        first, second = self.size
        if self.kind == "absolute":
            lengths = [int(first), int(second)]
        elif self.kind == "absolute_range":
            limits = [(min(side, int(first)), min(side, int(second))) for side in size]
            lengths = [int(rng.integers(low, high + 1)) for low, high in limits]
        else:
            shares = np.array(self.size)
            if self.kind == "relative_range":
                shares = shares + rng.random(2) * (1 - shares)
            lengths = [int(side * share + 0.5) for side, share in zip(size, shares, strict=True)]
        return list(zip(lengths, size, strict=True))


@dataclass(frozen=True)
class Augmentation:
    """Random changes of an image; the default resizes the shortest edge and nothing else.

    Attributes:
        min_sizes: the shorter side in pixels: values to choose from, or (lowest, highest) of a
            range; 0 keeps the image's size.
        max_size: the upper limit of the longer side in pixels.
        sampling: "choice" or "range".
        flip: "horizontal" or "vertical" with probability 1/2, "both" (each with probability 1/2,
            independently) or "none".
        rotate: rotate by 0, 90, 180 or 270 degrees with equal probability.
        crop: crop the image first.
        scale_jitter: (lowest, highest) factor of a random size, instead of `min_sizes` and
            `max_size`; None for no jitter. The image is resized so that it just fits into
            `jitter_size` times the factor.
        jitter_size: (height, width) in pixels of the random window of the image after scale
            jitter; the image is padded to it on the right and at the bottom.
        zoom_out: probability of a smaller image in a padded canvas of the size that it would have.
        photometric: probability of each change of `draw_distortion`.
        copy_paste: probability that objects of another image are pasted.

    Raises:
        ValueError: a value is not valid.
    """

    min_sizes: tuple[int, ...]
    max_size: int
    sampling: str = "choice"
    flip: str = "none"
    rotate: bool = False
    crop: RandomCrop | None = None
    scale_jitter: tuple[float, float] | None = None
    jitter_size: tuple[int, int] = (1024, 1024)
    zoom_out: float = 0.0
    photometric: float = 0.0
    copy_paste: float = 0.0

    def __post_init__(self) -> None:
        if self.sampling not in SAMPLINGS:
            raise UserError(f"the sampling of sizes is one of {SAMPLINGS}, not {self.sampling!r}.")
        if self.flip not in FLIPS:
            raise UserError(f"the flip is one of {FLIPS}, not {self.flip!r}.")
        sizes = self.min_sizes
        if not sizes or min(sizes) < 0:
            raise UserError(f"the shorter side takes lengths in pixels, 0 or more, not {sizes}.")
        if self.sampling == "range" and (len(sizes) != 2 or sizes[0] > sizes[1]):
            raise UserError(f"a range of sizes is (lowest, highest), not {sizes}.")
        jitter, window = self.scale_jitter, self.jitter_size
        if jitter is not None and not (_is_pair(jitter) and 0 < jitter[0] <= jitter[1] < np.inf):
            raise UserError(
                f"INPUT.SCALE_JITTER is {jitter}; give (lowest, highest) factor, such as (0.1, 2), "
                "or () for no jitter."
            )
        if not (_is_pair(window) and min(window) > 0 and all(isinstance(n, int) for n in window)):
            raise UserError(
                f"INPUT.SCALE_JITTER_SIZE is {window}; give (height, width) in pixels, such as "
                "(1024, 1024)."
            )
        for key in ("zoom_out", "photometric", "copy_paste"):
            probability = getattr(self, key)
            if not 0 <= probability <= 1:
                raise UserError(
                    f"INPUT.{key.upper()} is {probability}; it is a probability, from 0 to 1."
                )

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> Geometry:
        """Draw a random geometry for an image of `size` (height, width) in pixels."""
        if self.sampling == "range":
            short = int(rng.integers(self.min_sizes[0], self.min_sizes[1] + 1))
        else:
            short = self.min_sizes[int(rng.integers(len(self.min_sizes)))]
        flip = self._draw_flip(rng)
        quarter_turns = int(rng.integers(4)) if self.rotate else 0
        crop = self.crop.draw(size, rng) if self.crop is not None else None
        cropped = size if crop is None else (crop.height, crop.width)
        jitter_size = self.jitter_size[::-1] if quarter_turns % 2 else self.jitter_size
        if self.scale_jitter is not None:
            canvas = fitted_size(cropped, jitter_size, rng.uniform(*self.scale_jitter))
        else:
            canvas = cropped if short == 0 else resized_size(cropped, short, self.max_size)
        new_size, top, left = canvas, 0, 0
        if self.zoom_out and rng.random() < self.zoom_out:
            ratio = rng.uniform(1, _MAX_ZOOM_OUT)
            new_size = _rounded(canvas[0] / ratio, canvas[1] / ratio)
            top, left = (
                int(rng.integers(whole - part + 1))
                for whole, part in zip(canvas, new_size, strict=True)
            )
        window = None if new_size == canvas else Region(-top, -left, *canvas)
        if self.scale_jitter is not None:
            y, x = (
                int(rng.integers(max(0, whole - part) + 1))
                for whole, part in zip(canvas, jitter_size, strict=True)
            )
            window = Region(y - top, x - left, *jitter_size)
        return Geometry(size, new_size, flip, quarter_turns, crop, window)

    def _draw_flip(self, rng: np.random.Generator) -> str:
        first = rng.random() < 0.5
        if self.flip != "both":
            return self.flip if first else "none"
        vertical = rng.random() < 0.5
        return ("none", "horizontal", "vertical", "both")[first + 2 * vertical]


def build_train_transform(cfg: CfgNode) -> Augmentation:
    """Return the training augmentation of a config."""
    options = cfg.INPUT
    if options.MASK_FORMAT not in ("polygon", "bitmask"):
        raise UserError(
            f'INPUT.MASK_FORMAT is {options.MASK_FORMAT!r}; set it to "polygon" or "bitmask" '
            "(both are read as bitmaps)."
        )
    crop = options.CROP
    return Augmentation(
        min_sizes=_as_sizes(options.MIN_SIZE_TRAIN),
        max_size=options.MAX_SIZE_TRAIN,
        sampling=options.MIN_SIZE_TRAIN_SAMPLING,
        flip=options.RANDOM_FLIP,
        rotate=options.ROTATE_90,
        crop=RandomCrop(crop.TYPE, tuple(crop.SIZE)) if crop.ENABLED else None,
        scale_jitter=tuple(options.SCALE_JITTER) or None,
        jitter_size=tuple(options.SCALE_JITTER_SIZE),
        zoom_out=options.ZOOM_OUT,
        photometric=options.PHOTOMETRIC,
        copy_paste=options.COPY_PASTE,
    )


def build_test_transform(cfg: CfgNode) -> Augmentation:
    """Return the resize before inference of a config."""
    return Augmentation(
        min_sizes=_as_sizes(cfg.INPUT.MIN_SIZE_TEST), max_size=cfg.INPUT.MAX_SIZE_TEST
    )


def resized_size(size: tuple[int, int], short: int, longest: int) -> tuple[int, int]:
    """Return (height, width) with a shorter side of `short` px and a longer of at most `longest`.

    Example:
        >>> resized_size((480, 640), 800, 1333)
        (800, 1067)
    """
    height, width = size
    scale = short / min(height, width)
    new_height, new_width = (short, scale * width) if height < width else (scale * height, short)
    if max(new_height, new_width) > longest:
        shrink = longest / max(new_height, new_width)
        new_height, new_width = new_height * shrink, new_width * shrink
    return _rounded(new_height, new_width)


def fitted_size(size: tuple[int, int], target: tuple[int, int], factor: float) -> tuple[int, int]:
    """Return the largest (height, width) with the aspect of `size` within `factor * target`.

    Example:
        >>> fitted_size((480, 640), (1024, 1024), 0.5)
        (384, 512)
    """
    scale = min(factor * target[0] / size[0], factor * target[1] / size[1])
    return _rounded(size[0] * scale, size[1] * scale)


def _is_pair(values: Sequence[object]) -> bool:
    """Return whether these are two numbers."""
    return len(values) == 2 and all(type(value) in (int, float) for value in values)


def _rounded(height: float, width: float) -> tuple[int, int]:
    # A side that would round to 0 keeps one pixel, because PIL rejects 0.
    return max(1, int(height + 0.5)), max(1, int(width + 0.5))


def _as_sizes(sizes: int | Sequence[int]) -> tuple[int, ...]:
    """Return sizes as a tuple; detectron2 also takes a single number."""
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)
