"""PackedList: a list whose items lie in one buffer."""

import pickle

import pytest
import torch

from tensormask.data.packed import PackedList

ITEMS = [{"a": [1.5, None]}, "text", ("tuple", b"bytes"), []]


def test_it_is_a_list():
    packed = PackedList(iter(ITEMS))
    assert len(packed) == 4
    assert list(packed) == ITEMS
    assert packed[-1] == []
    assert packed[-4] == ITEMS[0]
    for outside in (4, -5):
        with pytest.raises(IndexError, match="4"):
            packed[outside]


def test_items_are_made_anew():
    packed = PackedList(ITEMS)
    packed[0]["a"].append("more")
    assert packed[0] == ITEMS[0]


def test_an_empty_one():
    assert list(PackedList([])) == []


def test_it_holds_tensors_only():
    # These are what processes share: anything else would be copied into each.
    packed = PackedList(ITEMS * 100)
    assert all(isinstance(value, torch.Tensor) for value in vars(packed).values())
    assert list(pickle.loads(pickle.dumps(packed))) == ITEMS * 100
