"""Files read as data: what old and new versions of Python, NumPy and PyTorch write."""

import pickle
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from foreign import torch_bytes

from tensormask.checkpoint.files import read_checkpoint, read_description, read_weights

ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big-endian": np.arange(4, dtype=">i4"),
    "scalar": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float16),
    "bool": np.array([True, False]),
    "part": np.arange(10, dtype=np.uint8)[2:8:2],
}


def write(folder: Path, data: bytes, name: str = "model.pth") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def assert_arrays(weights: dict[str, torch.Tensor]) -> None:
    assert list(weights) == list(ARRAYS)
    for name, array in ARRAYS.items():
        native = array.astype(array.dtype.newbyteorder("="))
        assert weights[name].numpy().dtype == native.dtype, name
        assert np.array_equal(weights[name].numpy(), native), name


# ---- formats ----


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("before_numpy_2", [False, True])
def test_pickles(tmp_path, protocol: int, before_numpy_2: bool) -> None:
    content = {
        "model": OrderedDict(ARRAYS),
        "iteration": np.float64(2.5),
        "other": (1, -(2**70), 2.5, None, "ä", b"\xff", [True, False], Counter({3: 2})),
    }
    data = pickle.dumps(content, protocol)
    if before_numpy_2 and protocol < 4:  # names as plain text, of any length
        assert b"numpy._core.multiarray" in data
        data = data.replace(b"numpy._core.", b"numpy.core.")
    path = write(tmp_path, data, "model.anything")
    assert_arrays(read_weights(path))
    read = read_checkpoint(path)
    assert read["iteration"] == 2.5
    assert read["other"] == content["other"]


PYTHON_2 = {
    0: b"(dp0\nS'a'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n(I0\ntp4\n"
    b"S'b'\np5\ntp6\nRp7\n(I1\n(L2L\ntp8\ncnumpy\ndtype\np9\n(S'f4'\np10\nI0\nI1\ntp11\nRp12\n(I3\n"
    b"S'<'\np13\nNNNI-1\nI-1\nI0\ntp14\nbI00\nS'\\x00\\x00\\x80?\\x00\\x00@\\xc0'\np15\ntp16\nbs"
    b"S'lr'\np17\nF0.5\ns.",
    1: b"}q\x00(U\x01aq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02(cnumpy\nndarray\nq\x03"
    b"(K\x00tq\x04U\x01bq\x05tq\x06Rq\x07(K\x01(K\x02tq\x08cnumpy\ndtype\nq\x09(U\x02f4q\x0aK\x00"
    b"K\x01tq\x0bRq\x0c(K\x03U\x01<q\x0dNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0ebI00\n"
    b"U\x08\x00\x00\x80?\x00\x00@\xc0q\x0ftq\x10bU\x02lrq\x11G?\xe0\0\0\0\0\0\0u.",
    2: b"\x80\x02}q\x01(U\x01aq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\n"
    b"q\x04K\x00\x85q\x05U\x01b\x87q\x06Rq\x07(K\x01\x8a\x01\x02\x85cnumpy\ndtype\nq\x08U\x02f4"
    b"K\x00K\x01\x87Rq\x09(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    b"U\x08\x00\x00\x80?\x00\x00@\xc0tbX\x02\x00\x00\x00lrq\x0aG?\xe0\0\0\0\0\0\0u.",
}


@pytest.mark.parametrize("protocol", PYTHON_2)
def test_pickles_of_python_2(tmp_path, protocol: int) -> None:
    data = PYTHON_2[protocol]
    assert pickle.loads(data, encoding="latin1")["a"].tolist() == [1, -3]  # it is a good pickle
    read = read_checkpoint(write(tmp_path, data))
    assert read["a"].tolist() == [1, -3]
    assert read["lr"] == 0.5


def test_names_that_are_bytes(tmp_path) -> None:
    data = pickle.dumps({b"model": {b"a": ARRAYS["float32"]}})
    assert list(read_weights(write(tmp_path, data))) == ["a"]


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_formats_give_what_torch_gives(tmp_path, legacy: bool) -> None:
    base = torch.arange(24.0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    dtypes = [
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    ]
    tensors = {
        **{str(dtype): torch.arange(3).to(dtype) for dtype in dtypes},
        **{"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "view": base[3:9]},
        **{"transposed": base.view(4, 6).t(), "parameter": torch.nn.Parameter(base)},
    }
    content = {
        "model": model.state_dict() | tensors,
        "optimizer": optimizer.state_dict(),
        "size": torch.Size([2, 3]),
        "milestones": Counter([3, 3, 4]),
        "array": ARRAYS["float32"],
    }
    path = write(tmp_path, torch_bytes(content, legacy=legacy))
    read = read_checkpoint(path)
    assert list(read) == list(content)
    for name, value in content["model"].items():
        assert torch.equal(read["model"][name], value), name
        assert read["model"][name].dtype == value.dtype, name
        assert read["model"][name].stride() == value.stride(), name
    assert list(read["model"]) == list(content["model"])
    assert str(read["optimizer"]) == str(content["optimizer"])
    assert read["size"] == (2, 3)
    assert read["milestones"] == {3: 2, 4: 1}
    assert np.array_equal(read["array"], ARRAYS["float32"])


def test_safetensors(tmp_path) -> None:
    tensors = {
        "a": torch.ones(2, 3),
        "b": torch.tensor(3),
        "c": torch.ones(2, dtype=torch.bfloat16),
    }
    described = {"class_names": '["cat", "dog"]', "category_ids": "[3, 4]", "format": "pt"}
    path = write(tmp_path, safetensors.torch.save(tensors, described), "model.pth")
    read = read_weights(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert read_description(path) == {"class_names": ["cat", "dog"], "category_ids": [3, 4]}
    path = write(tmp_path, safetensors.torch.save(tensors, {"class_names": "cat, dog"}))
    assert read_description(path) == {}


@pytest.mark.parametrize(
    "description, expected",
    [
        ({"class_names": ["a"], "category_ids": [7]}, {"class_names": ["a"], "category_ids": [7]}),
        ({"class_names": ["a"], "category_ids": [7, 8]}, {"class_names": ["a"]}),
        ({"class_names": ["a"], "category_ids": [7.5]}, {"class_names": ["a"]}),
        ({"class_names": ["a"]}, {"class_names": ["a"]}),
        ({"class_names": [1], "category_ids": [7]}, {}),
        ({"class_names": "cats", "category_ids": [7]}, {}),
        ({"class_names": torch.ones(2)}, {}),
        ({"category_ids": [7]}, {}),
    ],
)
def test_description(tmp_path, description: dict, expected: dict) -> None:
    path = write(tmp_path, torch_bytes({"model": {"a": torch.ones(1)}, **description}))
    assert read_description(path) == expected


@pytest.mark.parametrize("inside", [("model",), ("blobs",), ("model", "blobs"), ()])
def test_where_the_weights_stand(tmp_path, inside: tuple[str, ...]) -> None:
    content: dict = dict(ARRAYS)
    for key in reversed(inside):
        content = {key: content}
    assert_arrays(read_weights(write(tmp_path, pickle.dumps(content))))


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "no dict of weights in it, but list"),
        ({}, "the dict of weights in it is empty"),
        ({"model": {}, "iteration": 3}, "the dict of weights in it is empty"),
        (3, "no dict of weights in it, but int"),
        ({"model": {"a": "text"}}, "entry a is str, not an array of numbers"),
        ({"a": {"b": 1}}, "entry a is dict"),
        ({"a": np.ones(2), 3: np.ones(2)}, "entry 3 is ndarray"),
        ({"x" * 500: None}, r"entry x{97}\.\.\. is NoneType"),
        ({"a\n\x1b[31m": None}, r"entry 'a\\n\\x1b\[31m' is NoneType"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, message: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.pth: {message}"):
        read_weights(write(tmp_path, pickle.dumps(content)))


def test_a_missing_file(tmp_path) -> None:
    for path in (tmp_path / "nothing.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="no weights at"):
            read_weights(path)
