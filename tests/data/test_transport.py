"""Messages between processes: any value comes back as it was, masks in few bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import tv_tensors

from tensormask.data import transport


def cross(value):
    return transport.unpack(transport.pack(value))


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.bool, torch.uint8, torch.bfloat16, torch.float64, torch.int64]),
    high=st.sampled_from([1, 2, 200]),
    seed=st.integers(0, 99),
)
def test_tensors_of_any_shape_and_type(shape, dtype, high, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, high, shape, generator=generator).to(dtype)
    x[..., : shape[-1] // 2] = 0
    for tensor in (x, x.flip(-1), x.transpose(0, -1), x[..., ::2]):
        other = cross(tensor)
        assert (other.shape, other.dtype) == (tensor.shape, dtype)
        assert torch.equal(other, tensor)
    y = cross([x, x])
    assert y[0] is y[1]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(2.5),
        torch.ones(2, 1).expand(2, 4),
        torch.ones(3, requires_grad=True),
        torch.eye(3).to_sparse(),
        torch.ones(2, dtype=torch.complex64).mul(1j).conj(),
        tv_tensors.Mask(torch.ones(2, 3, 3, dtype=torch.bool)),
        tv_tensors.BoundingBoxes(torch.ones(2, 4), format="XYXY", canvas_size=(5, 6)),
    ],
)
def test_special_tensors(tensor):
    other = cross(tensor)
    assert type(other) is type(tensor)
    assert (other.layout, other.requires_grad) == (tensor.layout, tensor.requires_grad)
    assert torch.equal(other.to_dense().resolve_conj(), tensor.to_dense().resolve_conj())
    assert getattr(other, "format", None) == getattr(tensor, "format", None)


def test_nested_values():
    value = {
        "arrays": [np.arange(6).reshape(2, 3).T, np.array(["a", None], dtype=object), np.ones(0)],
        "nested": ("x", {"y": [torch.arange(3), b"bytes", 2**70]}, None),
    }
    other = cross(value)
    for array, expected in zip(other["arrays"], value["arrays"], strict=True):
        np.testing.assert_array_equal(array, expected)
    assert other["nested"][1]["y"][0].tolist() == [0, 1, 2]
    assert other["nested"][1]["y"][1:] == [b"bytes", 2**70]
    other["arrays"][0][0] = 7  # writable
    other["nested"][1]["y"][0][0] = 7


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_masks_cross_as_the_bits_of_their_extents(dtype):
    masks = torch.zeros(40, 200, 300, dtype=dtype)
    for k in range(1, 40):
        masks[k, k : k + 16, 2 * k : 2 * k + 20] = 1
    assert len(transport.pack(masks)) < 40 * (16 * 20 / 8 + 40) + 500
    assert torch.equal(cross(masks), masks)
    # Data that is not masks is never larger than it is.
    for values in (masks + (1 if dtype == torch.uint8 else 0), torch.zeros(0, 200, 300).bool()):
        assert len(transport.pack(values)) <= values.nbytes + 1000
