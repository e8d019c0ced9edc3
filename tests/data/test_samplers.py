"""BatchSampler: against an image-by-image reference, epochs, repeats, late starts, errors."""

import itertools

import numpy as np
import pytest

from tensormask.data.samplers import BatchSampler, repeat_factors


def slow_batches(groups, batch_size, count, orders):
    """Fill the batches image by image, as the docstring of BatchSampler describes it."""
    waiting, batches, position = {}, [], 0
    for epoch in itertools.count():
        for image in orders(epoch).tolist():
            bucket = waiting.setdefault(groups[image], [])
            bucket.append((position, image))
            if len(bucket) == batch_size:
                batches.append(waiting.pop(groups[image]))
                if len(batches) == count:
                    return batches
            position += 1


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize(
    "groups", [[0], [0] * 5, [0, 1, 0, 0, 1, 0, 0], [1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]]
)
def test_batches_equal_the_slow_reference(groups, batch_size, repeated):
    repeats = np.linspace(1, 3.4, len(groups)) if repeated else np.ones(len(groups))

    def orders(epoch):
        order, extra = (np.random.Generator(np.random.PCG64([9, n, epoch])) for n in (0, 4))
        chance = extra.random(len(groups))
        images = [i for i, r in enumerate(repeats) for _ in range(int(r) + (chance[i] < r % 1))]
        return np.array(images)[order.permutation(len(images))]

    expected = slow_batches(groups, batch_size, 24, orders)
    for start in (*range(6), 13, 19):
        options = {"start": start, "repeats": repeats if repeated else None}
        sampler = BatchSampler(groups, batch_size=batch_size, seed=9, **options)
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


def test_repeat_factors_by_hand():
    classes = [{0}] * 6 + [{0, 1}, {2, 1}, set(), {0}]
    # Shares of the images: class 0 in 8 of 10, class 1 in 2 and class 2 in 1.
    for sqrt, rare, rarest in ((True, 2**0.5, 2.0), (False, 2.0, 4.0)):
        factors = repeat_factors(classes, 0.4, sqrt=sqrt)
        np.testing.assert_allclose(factors, [1] * 6 + [rare, rarest, 1, 1])
    assert (repeat_factors(classes, 0.0) == 1).all()


def test_images_are_repeated_as_often_as_asked_on_average():
    repeats = np.array([1.0, 1.25, 2.5, 1.0])
    sampler = BatchSampler([0] * 4, batch_size=1, seed=0, repeats=repeats)
    images = [batch[0][1] for batch in itertools.islice(sampler, 575 * 4)]  # 400 epochs
    counts = np.bincount(images) / 400
    np.testing.assert_allclose(counts, repeats, atol=0.08)


@pytest.mark.parametrize("groups, batch_size, start", [([], 2, 0), ([0], 0, 0), ([0], 2, -1)])
def test_invalid_arguments_are_refused(groups, batch_size, start):
    with pytest.raises(ValueError, match="no batches of"):
        BatchSampler(groups, batch_size=batch_size, seed=0, start=start)
