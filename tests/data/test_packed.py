"""PackedList: a list whose items are stored in one buffer."""

import pickle

import pytest
import torch

from tensormask.data.packed import PackedList

ITEMS = [{"a": [1.5, None]}, "text", ("tuple", b"bytes"), []]


def test_length_iteration_and_indexing():
    packed = PackedList(iter(ITEMS))
    assert len(packed) == 4
    assert list(packed) == ITEMS
    assert packed[-1] == []
    assert packed[-4] == ITEMS[0]
    for outside in (4, -5):
        with pytest.raises(IndexError, match="4"):
            packed[outside]
    assert list(PackedList([])) == []


def test_each_access_returns_a_new_object():
    packed = PackedList(ITEMS)
    packed[0]["a"].append("more")
    assert packed[0] == ITEMS[0]


def test_all_attributes_are_tensors():
    # Processes share tensors; anything else would be copied into each.
    packed = PackedList(ITEMS * 100)
    assert all(isinstance(value, torch.Tensor) for value in vars(packed).values())
    assert list(pickle.loads(pickle.dumps(packed))) == ITEMS * 100
