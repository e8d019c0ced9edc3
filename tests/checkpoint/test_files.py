"""Read the files of old and new versions of Python, NumPy, PyTorch and safetensors."""

import pickle
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from foreign import torch_bytes

from tensormask.checkpoint.files import get_description, read_checkpoint, read_weights
from tensormask.engine import resume
from tensormask.utils.errors import UserError

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
        "other": (1, -(2**70), 2.5, None, "ä", b"\xff", b"", [True, False], Counter({3: 2})),
        "state": torch.nn.BatchNorm1d(2).state_dict()._metadata,
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


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files(tmp_path, legacy: bool, mmap: bool) -> None:
    base = torch.arange(24.0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    dtypes = "float16 bfloat16 float32 float64 bool uint8 int8 int16 int32 int64"
    tensors = {
        **{dtype: torch.arange(3).to(getattr(torch, dtype)) for dtype in dtypes.split()},
        **{"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "view": base[3:9]},
        **{"transposed": base.view(4, 6).t(), "parameter": torch.nn.Parameter(base)},
    }
    content = {
        "model": model.state_dict() | tensors,
        "optimizer": optimizer.state_dict(),
        "size": torch.Size([2, 3]),
        "milestones": Counter([3, 3, 4]),
        "array": ARRAYS["float32"],
        "number": np.float64(2.5),
    }
    path = write(tmp_path, torch_bytes(content, legacy=legacy))
    read = read_checkpoint(path, mmap=mmap)
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
    assert read["number"] == 2.5
    assert not any(weight.requires_grad for weight in read_weights(path).values())


def test_tensors_are_mapped_or_copied(tmp_path) -> None:
    """Only copies stay the same when the file is changed in place, as a resumed run needs it."""
    content = {"model": {"a": torch.zeros(1000)}, **dict.fromkeys(resume.KEYS[1:])}
    path = write(tmp_path, torch_bytes(content))
    mapped, copied = read_checkpoint(path), read_checkpoint(path, mmap=False)
    to_resume = resume.load_checkpoint(path)
    offset = path.read_bytes().index(bytes(4000))
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(np.ones(1000, np.float32).tobytes())
    assert mapped["model"]["a"].eq(1).all()
    assert copied["model"]["a"].eq(0).all()
    assert to_resume["model"]["a"].eq(0).all()


def test_a_checkpoint_with_very_many_issues(tmp_path) -> None:
    """More than a million instructions in the pickle, as lists of this library's first version."""
    issues = [["train", "object_too_small", i] for i in range(160_000)]
    path = write(tmp_path, torch_bytes({"model": {"a": torch.ones(2)}, "faults": issues}))
    assert read_checkpoint(path)["faults"] == issues


def test_safetensors(tmp_path) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.tensor(3), "c": torch.ones(2).bfloat16()}
    described = {"class_names": '["cat", "dog"]', "category_ids": "[3, 4]", "format": "pt"}
    path = write(tmp_path, safetensors.torch.save(tensors, described), "model.pth")
    read = read_weights(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    description = get_description(read_checkpoint(path))
    assert description == {"class_names": ["cat", "dog"], "category_ids": [3, 4]}
    path = write(tmp_path, safetensors.torch.save(tensors, {"class_names": "cat, dog"}))
    assert get_description(read_checkpoint(path)) == {}


@pytest.mark.parametrize(
    "description, expected",
    [
        ({"class_names": ["a"], "category_ids": [7]}, {"class_names": ["a"], "category_ids": [7]}),
        ({"class_names": ["a"], "category_ids": [7, 8]}, {"class_names": ["a"]}),
        ({"class_names": ["a"], "category_ids": [7.5]}, {"class_names": ["a"]}),
        ({"class_names": ["a"], "category_ids": [True]}, {"class_names": ["a"]}),
        ({"class_names": [*"ab"], "category_ids": ["x", 7]},) * 2,
        ({"class_names": ["a"]}, {"class_names": ["a"]}),
        ({"class_names": [1], "category_ids": [7]}, {}),
        ({"class_names": "cats", "category_ids": [7]}, {}),
        ({"class_names": torch.ones(2)}, {}),
        ({"category_ids": [7]}, {}),
        ({"config": "SEED: 1"}, {"config": "SEED: 1"}),
        ({"config": {"SEED": 1}}, {}),
        ({"score_threshold": 0.4}, {"score_threshold": 0.4}),
        ({"score_threshold": 1.0}, {}),
        ({"score_threshold": float("nan")}, {}),
        ({"score_threshold": torch.tensor(0.4)}, {}),
    ],
)
def test_description(description: dict, expected: dict) -> None:
    assert get_description({"model": {"a": torch.ones(1)}, **description}) == expected


@pytest.mark.parametrize("inside", [("model",), ("blobs",), ("model", "blobs"), ()])
def test_keys_of_the_weights(tmp_path, inside: tuple[str, ...]) -> None:
    content: dict = dict(ARRAYS)
    for key in reversed(inside):
        content = {key: content}
    assert_arrays(read_weights(write(tmp_path, pickle.dumps(content))))


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "it contains list, not a dict of weights"),
        ({}, "the dict of weights is empty"),
        ({"model": {}, "iteration": 3}, "the dict of weights is empty"),
        (3, "it contains int, not a dict of weights"),
        ({"model": {"a": "text"}}, "entry a is str, not an array of numbers"),
        ({"a": {"b": 1}}, "entry a is dict"),
        ({"a": np.ones(2), 3: np.ones(2)}, "the name 3 of an entry is not a text"),
        ({"x" * 500: None}, r"entry x{97}\.\.\. is NoneType"),
        ({"a\n\x1b[31m": None}, r"entry 'a\\n\\x1b\[31m' is NoneType"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, message: str) -> None:
    with pytest.raises(UserError, match=rf"model\.pth: {message}"):
        read_weights(write(tmp_path, pickle.dumps(content)))


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(
    "tensor, kind",
    [
        (torch.eye(2).to_sparse(), "torch.sparse_coo"),
        (torch.zeros(2, device="meta"), "on meta"),
        (torch.zeros(2, dtype=torch.complex64), "torch.complex64"),
    ],
)
def test_other_tensors_are_refused(tmp_path, tensor: torch.Tensor, kind: str) -> None:
    path = write(tmp_path, torch_bytes({"model": {"a": tensor}}))
    with pytest.raises(UserError, match=f"entry a is a Tensor of .*{kind}.*, not an array of num"):
        read_weights(path)


def test_a_missing_file(tmp_path) -> None:
    for path in (tmp_path / "missing.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="no weights file at"):
            read_weights(path)
