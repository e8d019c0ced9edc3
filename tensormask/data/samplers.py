"""Which images form which training batch, and the random streams of training.

All randomness of training is a function of (seed, position), where the position counts the images
shown since the first iteration. So a batch does not depend on the number of workers, and a resumed
run gets the same batches as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

# The random streams of a seed: the order of an epoch, the augmentation of a sample, and the
# replacements of an image that cannot be read.
ORDER, AUGMENTATION, REPLACEMENT, MAPPER = 0, 1, 2, 3


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


class BatchSampler:
    """Yield endless batches of (position, index), each from one group of images.

    Each epoch shows every image once, in a random order of (seed, epoch). A group takes its images
    in that order, and a batch is yielded when its last image is reached. The images that remain at
    the end of an epoch start the group's next batch. The state at batch `start` is computed from
    the sizes of the groups, so a late start costs the order of a few epochs at most.

    Args:
        groups: the group of each image.
        batch_size: images in a batch.
        seed: seed of the orders.
        start: number of the first batch.

    Example:
        >>> batches = iter(BatchSampler([0, 1, 0, 1], batch_size=2, seed=0))
        >>> [index % 2 for _, index in next(batches)] in ([0, 0], [1, 1])
        True
    """

    def __init__(
        self, groups: Sequence[int], *, batch_size: int, seed: int, start: int = 0
    ) -> None:
        if len(groups) == 0 or batch_size < 1 or start < 0:
            raise ValueError(
                f"no batches of {batch_size} from {len(groups)} images, starting at batch {start}"
            )
        self.groups = np.asarray(groups)
        self.batch_size = batch_size
        self.seed = seed
        self.start = start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # At most `start` batches come before this epoch, because groups only delay batches.
        epoch = self.start * self.batch_size // len(self.groups)
        sizes = np.unique(self.groups, return_counts=True)[1].tolist()
        skip = self.start - sum(epoch * size // self.batch_size for size in sizes)
        while True:
            batches = self._epoch_batches(epoch)
            yield from batches[skip:]
            skip = max(0, skip - len(batches))
            epoch += 1

    def _epoch_batches(self, epoch: int) -> list[list[tuple[int, int]]]:
        """Return the batches that are completed in an epoch, in that order."""
        batches = []
        for group in np.unique(self.groups):
            stream = np.concatenate([self._left_over(epoch, group), self._stream(epoch, group)])
            complete = len(stream) // self.batch_size * self.batch_size
            batches.extend(stream[:complete].reshape(-1, self.batch_size, 2).tolist())
        batches.sort(key=lambda batch: batch[-1][0])
        return [[(position, index) for position, index in batch] for batch in batches]

    def _stream(self, epoch: int, group: int) -> np.ndarray:
        """Return rows (position, index) of a group in the order of an epoch."""
        num_images = len(self.groups)
        order = random_stream(self.seed, ORDER, epoch).permutation(num_images)
        steps = np.flatnonzero(self.groups[order] == group)
        return np.stack([epoch * num_images + steps, order[steps]], axis=1)

    def _left_over(self, epoch: int, group: int) -> np.ndarray:
        """Return the rows of a group from before an epoch that are not in a batch yet."""
        size = np.count_nonzero(self.groups == group)
        missing = epoch * size % self.batch_size
        parts: list[np.ndarray] = [np.empty((0, 2), dtype=np.int64)]
        while missing > 0:
            epoch -= 1
            parts.append(self._stream(epoch, group)[-missing:])
            missing -= len(parts[-1])
        return np.concatenate(parts[::-1])
