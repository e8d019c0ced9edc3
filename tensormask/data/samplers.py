"""Which images form which training batch, and the random streams of training.

All randomness of training is a function of (seed, position), where the position counts the images
shown since the first iteration. So a batch does not depend on the number of workers, and a resumed
run gets the same batches as an uninterrupted one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set

import numpy as np

# The random streams of a seed: the order of an epoch, the augmentation of a sample, the
# replacements of an image that cannot be read, a user's mapper, and the repeats in an epoch.
ORDER, AUGMENTATION, REPLACEMENT, MAPPER, REPEATS = 0, 1, 2, 3, 4


def random_stream(seed: int, purpose: int, number: int) -> np.random.Generator:
    """Return the generator of `purpose` (such as `ORDER`) for an epoch or position."""
    return np.random.Generator(np.random.PCG64([seed, purpose, number]))


class ShareSampler:
    """Yield one process's share of each batch: the slices of length `size` from `starts` on."""

    def __init__(
        self, batches: Iterable[list[tuple[int, int]]], starts: Sequence[int], size: int
    ) -> None:
        self.batches = batches
        self.starts = starts
        self.size = size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches:
            yield [key for start in self.starts for key in batch[start : start + self.size]]


def repeat_factors(
    classes: Sequence[Set[int]], threshold: float, *, sqrt: bool = True
) -> np.ndarray:
    """Return how often an epoch shows each image, so that rare classes are shown more often.

    A class in a share `f` of the images has the factor `max(1, sqrt(threshold / f))`, and an image
    has the largest factor of its classes (LVIS, arXiv 1908.03195).

    Args:
        classes: by image, the classes of its objects.
        threshold: the share of images below which a class is rare.
        sqrt: whether to take the square root.

    Returns:
        float64 `(N,)`, 1 or more.

    Example:
        >>> repeat_factors([{0}, {0}, {0}, {0, 1}], 0.5, sqrt=False).tolist()
        [1.0, 1.0, 1.0, 2.0]
    """
    counts = Counter(label for labels in classes for label in labels)
    ratio = {label: threshold * len(classes) / count for label, count in counts.items()}
    factors = np.array([max((ratio[label] for label in labels), default=1) for labels in classes])
    return np.maximum(1.0, np.sqrt(factors) if sqrt else factors)


class BatchSampler:
    """Yield endless batches of (position, index), each from one group of images.

    Each epoch shows every image once, or by `repeats`, in a random order of (seed, epoch). A group
    takes its images in that order, and a batch is yielded when its last image is reached. The
    images that remain at the end of an epoch start the group's next batch. The state at batch
    `start` is computed from the sizes of the groups, so a late start costs the order of a few
    epochs at most.

    Args:
        groups: the group of each image.
        batch_size: images in a batch.
        seed: seed of the orders.
        start: number of the first batch.
        repeats: how often an epoch shows each image on average, 1 or more; the fraction is the
            probability of one more time. None for once.

    Example:
        >>> batches = iter(BatchSampler([0, 1, 0, 1], batch_size=2, seed=0))
        >>> [index % 2 for _, index in next(batches)] in ([0, 0], [1, 1])
        True
    """

    def __init__(
        self,
        groups: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        start: int = 0,
        repeats: np.ndarray | None = None,
    ) -> None:
        if len(groups) == 0 or batch_size < 1 or start < 0:
            raise ValueError(
                f"no batches of {batch_size} from {len(groups)} images, starting at batch {start}"
            )
        self.groups = np.unique(groups, return_inverse=True)[1]
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.repeats = repeats
        # How many images of each group come before each epoch, as far as it was needed.
        self._totals = [np.zeros(self.groups.max() + 1, dtype=np.int64)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # At most `start` batches come before this epoch, because groups only delay batches.
        longest = len(self.groups) if self.repeats is None else np.ceil(self.repeats).sum()
        epoch = int(self.start * self.batch_size // longest)
        while self._num_batches(epoch + 1) <= self.start:
            epoch += 1
        skip = self.start - self._num_batches(epoch)
        while True:
            yield from self._epoch_batches(epoch)[skip:]
            epoch, skip = epoch + 1, 0

    def _num_batches(self, epoch: int) -> int:
        """Return the number of batches that are completed before an epoch."""
        return int((self._num_before(epoch) // self.batch_size).sum())

    def _num_before(self, epoch: int) -> np.ndarray:
        """Return how many images of each group are shown before an epoch."""
        if self.repeats is None:
            return epoch * np.bincount(self.groups)
        while len(self._totals) <= epoch:
            shown = self.groups[self._indices(len(self._totals) - 1)]
            self._totals.append(self._totals[-1] + np.bincount(shown))
        return self._totals[epoch]

    def _indices(self, epoch: int) -> np.ndarray:
        """Return the images of an epoch, ascending."""
        indices = np.arange(len(self.groups))
        if self.repeats is None:
            return indices
        whole = np.floor(self.repeats)
        drawn = random_stream(self.seed, REPEATS, epoch).random(len(indices))
        return np.repeat(indices, (whole + (drawn < self.repeats - whole)).astype(np.int64))

    def _epoch_batches(self, epoch: int) -> list[list[tuple[int, int]]]:
        """Return the batches that are completed in an epoch, in that order."""
        batches = []
        for group in range(len(self._totals[0])):
            stream = np.concatenate([self._left_over(epoch, group), self._stream(epoch, group)])
            complete = len(stream) // self.batch_size * self.batch_size
            batches.extend(stream[:complete].reshape(-1, self.batch_size, 2).tolist())
        batches.sort(key=lambda batch: batch[-1][0])
        return [[(position, index) for position, index in batch] for batch in batches]

    def _stream(self, epoch: int, group: int) -> np.ndarray:
        """Return rows (position, index) of a group in the order of an epoch."""
        indices = self._indices(epoch)
        order = indices[random_stream(self.seed, ORDER, epoch).permutation(len(indices))]
        steps = np.flatnonzero(self.groups[order] == group)
        return np.stack([self._num_before(epoch).sum() + steps, order[steps]], axis=1)

    def _left_over(self, epoch: int, group: int) -> np.ndarray:
        """Return the rows of a group from before an epoch that are not in a batch yet."""
        missing = int(self._num_before(epoch)[group]) % self.batch_size
        parts: list[np.ndarray] = [np.empty((0, 2), dtype=np.int64)]
        while missing > 0:
            epoch -= 1
            parts.append(self._stream(epoch, group)[-missing:])
            missing -= len(parts[-1])
        return np.concatenate(parts[::-1])
