"""BatchSampler: against an image-by-image reference, epochs, late starts, errors."""

import itertools

import numpy as np
import pytest

from tensormask.data.samplers import BatchSampler


def slow_batches(groups, batch_size, count, orders):
    """Fill the batches image by image, as the docstring of BatchSampler describes it."""
    waiting, batches, position = {}, [], 0
    while len(batches) < count:
        order = orders(position // len(groups))
        image = int(order[position % len(groups)])
        bucket = waiting.setdefault(groups[image], [])
        bucket.append((position, image))
        if len(bucket) == batch_size:
            batches.append(waiting.pop(groups[image]))
        position += 1
    return batches


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize(
    "groups", [[0], [0] * 5, [0, 1, 0, 0, 1, 0, 0], [1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]]
)
def test_batches_equal_the_slow_reference(groups, batch_size):
    def orders(epoch):
        return np.random.Generator(np.random.PCG64([9, 0, epoch])).permutation(len(groups))

    expected = slow_batches(groups, batch_size, 24, orders)
    for start in (*range(6), 13, 19):
        sampler = BatchSampler(groups, batch_size=batch_size, seed=9, start=start)
        assert list(itertools.islice(sampler, 4)) == expected[start : start + 4]


def test_an_epoch_has_each_image_once_in_its_own_order():
    batches = list(itertools.islice(BatchSampler([0] * 12, batch_size=4, seed=0), 9))
    orders = [[image for batch in batches[i : i + 3] for _, image in batch] for i in (0, 3, 6)]
    for order in orders:
        assert sorted(order) == list(range(12))
    assert orders[0] != orders[1] != orders[2]


def test_a_late_start_is_cheap(monkeypatch):
    groups = ([0] * 7 + [1] * 3) * 100
    sampler = BatchSampler(groups, batch_size=16, seed=0, start=500_000)
    epochs = []
    stream = BatchSampler._stream
    monkeypatch.setattr(BatchSampler, "_stream", lambda *a: (epochs.append(a[1]), stream(*a))[1])
    batch = next(iter(sampler))
    assert len(batch) == 16
    assert batch[-1][0] >= 500_000 * 16 - 16 * 2
    assert len(epochs) <= 8


@pytest.mark.parametrize("groups, batch_size, start", [([], 2, 0), ([0], 0, 0), ([0], 2, -1)])
def test_invalid_arguments_are_refused(groups, batch_size, start):
    with pytest.raises(ValueError, match="no batches of"):
        BatchSampler(groups, batch_size=batch_size, seed=0, start=start)
