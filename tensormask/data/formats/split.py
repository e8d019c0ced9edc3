"""Split images into training and validation such that each class is in both in the same share."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np


def stratified_split(
    classes: Sequence[Collection[str]], fraction: float, seed: int = 0
) -> list[bool]:
    """Choose the images for training, by iterative stratification (Sechidis et al., 2011).

    The rarest class is distributed first, and each of its images goes where the class lacks most.
    A class of two images or more is in both parts if an exchange of single images allows it. The
    result depends on the arguments only.

    Args:
        classes: per image, the names of the classes of its objects.
        fraction: share of the images for training, in 0..1.

    Returns:
        Per image, whether it is for training. Of two images or more, each part has one at least.

    Example:
        >>> stratified_split([{"a"}, {"a"}, {"b"}, {"b"}], 0.5)
        [True, False, True, False]
    """
    num = len(classes)
    names = sorted({name for of_image in classes for name in of_image})
    has = np.array([[name in of_image for name in names] for of_image in classes], bool)
    has = has.reshape(num, len(names))
    totals = has.sum(axis=0)
    # What each part, (validation, training), lacks of each class, and of images.
    lacks = _shares(totals, fraction)
    lacks_images = _shares(np.array([num]), fraction)[:, 0]
    rank = np.random.default_rng(seed).permutation(num)
    part = np.full(num, -1)
    while (todo := part < 0).any():
        left = has[todo].sum(axis=0)
        if left.any():
            rarest = int(np.where(left > 0, left, num + 1).argmin())
            candidates, lacking = np.flatnonzero(todo & has[:, rarest]), lacks[:, rarest]
        else:  # images without objects
            candidates, lacking = np.flatnonzero(todo), lacks_images
        image = candidates[rank[candidates].argmin()]
        # Of equal needs, that for images decides; then the order of the seed.
        needs = [(lacking[p], lacks_images[p], rank[image] % 2 == p) for p in (0, 1)]
        chosen = int(needs[1] >= needs[0])
        part[image] = chosen
        lacks[chosen] -= has[image]
        lacks_images[chosen] -= 1
    _put_classes_in_both(part, has, totals, rank)
    if num > 1 and len({*part.tolist()}) == 1:
        part[rank.argmin()] = 1 - part[0]
    return [bool(value) for value in part]


def _shares(totals: np.ndarray, fraction: float) -> np.ndarray:
    """Return the wanted numbers `(2, C)` of validation and training; of 2 or more, 1 at least."""
    training = np.rint(totals * fraction)
    training = np.where(totals > 1, training.clip(1, np.maximum(totals - 1, 1)), totals)
    return np.stack([totals - training, training])


def _put_classes_in_both(
    part: np.ndarray, has: np.ndarray, totals: np.ndarray, rank: np.ndarray
) -> None:
    """Move single images for as long as this puts a class into both parts and none out of one."""

    def num_in_both(part: np.ndarray) -> int:
        training = has[part == 1].sum(axis=0)
        return int(((training > 0) & (training < totals)).sum())

    best = num_in_both(part)
    moved = True
    while moved:
        moved = False
        training = has[part == 1].sum(axis=0)
        for lacking in np.flatnonzero((totals > 1) & ((training == 0) | (training == totals))):
            images = np.flatnonzero(has[:, lacking])
            for image in sorted(images, key=lambda i: (has[i].sum(), rank[i])):
                part[image] ^= 1
                if (now := num_in_both(part)) > best:
                    best, moved = now, True
                    break
                part[image] ^= 1
