"""Damaged and hostile files: no command in a file is run, and each ends in one clear error.

``TENSORMASK_FUZZ_EXAMPLES=20000`` fuzzes longer.
"""

import codecs
import io
import json
import os
import pickle
import tempfile
import zipfile
from collections import Counter, OrderedDict
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from foreign import FORMATS, Call, command, torch_bytes, torch_zip
from fuzz import fuzz_examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy._core.multiarray import _reconstruct, scalar
from numpy._core.numeric import _frombuffer
from torch import Tensor

from tensormask.checkpoint import files
from tensormask.checkpoint.files import read_checkpoint, read_weights
from tensormask.utils.errors import UserError

# ---- commands ----


@pytest.mark.parametrize(
    "part", ["a weight", "beside the weights", "in a list", "in an array", "as a key"]
)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_command_is_not_run(tmp_path, kind: str, part: str) -> None:
    write, load_blindly = FORMATS[kind]
    marker = tmp_path / "has_run"
    run = command(marker)
    content = {"model": {"a": np.zeros(2)}}
    content |= {
        "a weight": {"model": {"a": run}},
        "beside the weights": {"optimizer": {"state": run}},
        "in a list": {"optimizer": [1, [run]]},
        "in an array": {"model": {"a": np.array([run], dtype=object)}},
        "as a key": {("b", run): 1},
    }[part]
    path = tmp_path / "model.safetensors"  # the suffix has no meaning
    path.write_bytes(write(content))
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    asks = f"{path} asks for {os.mkdir.__module__}.mkdir"
    assert ("dtype O8" if part == "in an array" else asks) in str(error.value)
    assert "weights_only" not in str(error.value)  # PyTorch's advice, which would run it
    assert not marker.exists()
    load_blindly(path.read_bytes())  # the control: plain pickle runs the command
    assert marker.exists()


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


@pytest.mark.parametrize(
    "program",
    [
        b"(V{marker}\nios\nmkdir\n.",  # INST
        b"(cos\nmkdir\nV{marker}\no.",  # OBJ
        b"\x80\x02cos\nmkdir\nV{marker}\n\x85\x81.",  # NEWOBJ
        b"\x80\x04" + text("os") + text("mkdir") + b"\x93V{marker}\n\x85R.",  # STACK_GLOBAL
        b"\x80\x04" + text("pathlib") + text("os.mkdir") + b"\x93V{marker}\n\x85R.",
    ],
)
def test_a_command_by_each_instruction(tmp_path, program: bytes) -> None:
    marker, path = tmp_path / "has_run", tmp_path / "model.pkl"
    path.write_bytes(program.replace(b"{marker}", str(marker).encode()))
    with pytest.raises(UserError, match=r"asks for (os|pathlib\.os)\.mkdir"):
        read_checkpoint(path)
    assert not marker.exists()


CHANGES = {  # the name, a state, and an attribute that it would set
    "a class": ("numpy ndarray", {"__setstate__": 1}, None),
    "a class by slots": ("numpy ndarray", None, {"__setstate__": 1}),
    "a dtype": ("numpy dtype", None, {"__setstate__": 1}),
    "a function": ("numpy.core.multiarray scalar", None, {"__func__": 1}),
    "a container": ("collections OrderedDict", None, {"__init__": 1}),
    "a counter": ("collections Counter", None, {"update": 1}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_cannot_change_what_it_names(tmp_path, change: str) -> None:
    """The instruction BUILD sets attributes, also of classes."""
    name, state, slots = CHANGES[change]
    before = [vars(kind).copy() for kind in (files._Array, files._Dtype, OrderedDict, Counter)]
    path = tmp_path / "model.pkl"
    named = b"c" + name.replace(" ", "\n").encode() + b"\n"
    path.write_bytes(b"\x80\x02" + named + pickle.dumps((state, slots), 2)[2:-1] + b"b.")
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(path)
    assert before == [vars(kind) for kind in (files._Array, files._Dtype, OrderedDict, Counter)]


# ---- damage ----


def array_call(shape: object = (2,), data: object = b"12345678") -> Call:
    """Return what NumPy writes for an array of float32, with any content."""
    state = (1, shape, np.dtype("<f4"), False, data)
    return Call(_reconstruct, np.ndarray, (0,), b"b", state=state)


def in_model(value: object) -> bytes:
    return pickle.dumps({"model": {"a": value}}, 4)


def forged_dtype(state: bytes) -> bytes:
    """Return a pickle with an array of a dtype that has a forged state."""
    return (
        b"\x80\x02}X\x01\0\0\0acnumpy.core.numeric\n_frombuffer\n(C\x08ABCDEFGHcnumpy\ndtype\n"
        b"X\x02\0\0\0f8\x85R" + state + b"bK\x01\x85X\x01\0\0\0CtRs."
    )


def safetensors_bytes(header: object, numbers: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + numbers


def entry(size: int) -> dict:
    return {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}


def compressed_copy(data: bytes) -> bytes:
    """Return the archive as other programs write it, for example after a new `zip -r`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    return file.getvalue()


GOOD = {"model": {"a": torch.arange(300.0)}}
DAMAGED = "cannot be read as a checkpoint of plain data: it is damaged, or not a checkpoint ("
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", DAMAGED),
    "junk": (b"junk", DAMAGED),
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>", DAMAGED),
    "a pointer of git lfs": (b"version https://git-lfs.github.com/spec/v1\n", DAMAGED),
    # pickles
    "truncated": (in_model(np.zeros(9))[:-20], DAMAGED),
    "huge shape": (in_model(array_call((10**12,))), DAMAGED),
    "huge product": (in_model(array_call((2**62,) * 30)), DAMAGED),
    "negative axis": (in_model(array_call((-2, -1))), DAMAGED),
    "invalid shape": (in_model(array_call("ab")), DAMAGED),
    "short data": (in_model(array_call((3,))), DAMAGED),
    "a list as data": (in_model(array_call(data=[1, 2])), DAMAGED),
    "short buffer": (in_model(Call(_frombuffer, b"1234", np.dtype("f4"), (10**9,), "C")), DAMAGED),
    "short scalar": (in_model(Call(scalar, np.dtype("f8"), b"1234")), DAMAGED),
    "another class": (in_model(Call(_reconstruct, np.memmap, (0,), b"b")), "numpy.memmap"),
    "objects": (in_model(np.array([1, "a"], object)), "it has an array of dtype O8"),
    "texts": (in_model(np.array(["a" * 100])), "dtype U100, not of numbers"),
    "structure": (in_model(np.zeros(3, "f4,i4")), "dtype V8"),
    "complex": (in_model(np.zeros(3, complex)), "dtype c16"),
    "masked": (in_model(np.ma.zeros(3)), "asks for numpy.ma"),
    "bytearray": (in_model(Call(bytearray, 10**12)), "asks for builtins.bytearray"),
    "a class": (in_model(Path("a")), "asks for pathlib.PosixPath, which is neither an array"),
    "a long name": (b"\x80\x02c" + b"a" * 3000 + b"\nb\n.", "asks for aaaaa"),
    "another encoding": (in_model(Call(codecs.encode, "a", "zip")), DAMAGED),
    "invalid byte order": (forged_dtype(b"(K\x03K\x07NNNt"), DAMAGED),
    "a dtype that is a text": (in_model(Call(_frombuffer, b"1234", "O", (1,), "C")), "not written"),
    # torch.save
    "torch, truncated": (torch_bytes(GOOD)[:-200], DAMAGED),
    "old torch, truncated": (torch_bytes(GOOD, legacy=True)[:-20], DAMAGED),
    "torch, missing storage": (torch_bytes(GOOD).replace(b"/data/0", b"/data/7"), DAMAGED),
    "compressed": (compressed_copy(torch_bytes(GOOD)), "it is a compressed zip file"),
    "another zip": (torch_zip(b"").replace(b"data.pkl", b"data.npy"), DAMAGED),
    # safetensors
    "header too long": (safetensors_bytes({"a": entry(1)}, bytes(4), 2**50), DAMAGED),
    "empty header": (safetensors_bytes(b"{}"), "is empty"),
    "invalid JSON": (safetensors_bytes(b"{" * 1000), DAMAGED),
    "beyond the end": (safetensors_bytes({"a": entry(9)}, bytes(4)), DAMAGED),
    "safetensors, truncated": (safetensors.torch.save({"a": torch.ones(10)})[:-8], DAMAGED),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_ends_in_one_clear_error(tmp_path, name: str) -> None:
    data, message = BAD_FILES[name]
    path = tmp_path / "model.pth"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read_weights(path)
    assert message in str(error.value)
    assert len(str(error.value)) < 500 + len(str(path))
    assert "\n" not in str(error.value)


def test_a_state_of_a_dtype_gives_its_byte_order_only(tmp_path) -> None:
    """NumPy would take the flags of an array of objects, and read the numbers as addresses."""
    path = tmp_path / "model.pkl"
    path.write_bytes(forged_dtype(pickle.dumps((3, "<", None, None, None, -1, -1, 63), 2)[2:-1]))
    assert read_weights(path)["a"].tolist() == np.frombuffer(b"ABCDEFGH").tolist()


# ---- any bytes ----

# In the seeds: the same name each time.
MARKER = Path(tempfile.gettempdir(), "tensormask_fuzz_has_run")
fuzz = settings(max_examples=fuzz_examples(60), deadline=10_000)  # milliseconds


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.pth"


def check_outcome(path: Path, data: bytes) -> None:
    """Read a file: tensors or one `UserError`, and no command was run."""
    path.write_bytes(data)
    try:
        content = read_weights(path)
    except UserError as error:
        message = str(error).removeprefix(str(path))
        assert len(message) < 500
        assert "\n" not in message
    else:
        for name, value in content.items():
            assert type(name) is str
            assert isinstance(value, Tensor)
            if value.numel() < 1_000_000:
                value.double().sum()  # reads all numbers
    assert not MARKER.exists()


def make_seeds() -> list[bytes]:
    arrays = {
        "a": np.arange(4, dtype=np.float32).reshape(2, 2),
        "b.c": np.asfortranarray(np.ones((2, 3), ">f8")),
        "empty": np.zeros((0, 2), np.int64),
    }
    tensors = {name: torch.tensor(array.tolist()) for name, array in arrays.items()}
    tensors |= {"view": torch.arange(12.0).view(3, 4).t(), "half": torch.ones(3).bfloat16()}
    beside = {"class_names": ["a", "b"], "iteration": 3}
    good = [pickle.dumps({"model": OrderedDict(arrays), **beside}, p) for p in (0, 2, 4, 5)]
    good += [torch_bytes({"model": tensors, **beside}, legacy=old) for old in (False, True)]
    evil = {"z": command(MARKER)}
    evils = [pickle.dumps({"model": arrays, **evil}, p) for p in (0, 2, 4)]
    evils += [torch_bytes({"model": tensors, **evil}, legacy=old) for old in (False, True)]
    solid = {name: value.contiguous() for name, value in tensors.items()}
    return [*good, safetensors.torch.save(solid, {"class_names": '["a"]'}), *evils]


SEEDS = make_seeds()
# Sizes, counts and indices that overflow.
NUMBERS = [n.to_bytes(size, "little") for size in (1, 2, 4, 8) for n in (0, 1, 2 ** (8 * size) - 1)]


@st.composite
def damaged_files(draw) -> bytes:
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        end = start + draw(st.integers(0, 40))
        match draw(st.sampled_from("bit cut remove repeat insert number other".split())):
            case "bit":
                data[start : start + 1] = bytes(b ^ 1 << end % 8 for b in data[start : start + 1])
            case "cut":
                del data[start:]
            case "remove":
                del data[start:end]
            case "repeat":
                data[start:start] = data[start:end] * draw(st.integers(1, 50))
            case "insert":
                data[start:start] = draw(st.binary(max_size=20))
            case "number":
                number = draw(st.sampled_from(NUMBERS))
                data[start : start + len(number)] = number
            case "other":
                other = draw(st.sampled_from(SEEDS))
                data[start:] = other[draw(st.integers(0, len(other))) :]
    return bytes(data)


@fuzz
@given(data=damaged_files())
def test_damaged_files(path: Path, data: bytes) -> None:
    check_outcome(path, data)
    check_outcome(path, torch_zip(data, _0=bytes(16), _1=bytes(8)))  # past the directory of a zip


NAMES = [
    *("numpy._core.multiarray _reconstruct", "numpy.core.multiarray scalar", "numpy ndarray"),
    *("numpy._core.numeric _frombuffer", "numpy dtype", "_codecs encode", "__builtin__ bytes"),
    *("collections OrderedDict", "collections Counter", "torch FloatStorage", "torch Size"),
    *("torch._utils _rebuild_tensor_v2", "os mkdir", "builtins eval", "copyreg _reconstructor"),
]
TEXTS = [str(MARKER), *"model a latin1 f4 O8 storage 0 cpu < __setstate__".split()]
CODES = b"()]}lt\x85\x86\x87aesuRbo\x81\x8f\x92\x93Q20N\x88"
INSTRUCTIONS = st.one_of(
    st.sampled_from([bytes([code]) for code in CODES]),
    st.sampled_from(NAMES).map(lambda name: b"c" + name.replace(" ", "\n").encode() + b"\n"),
    st.sampled_from(TEXTS).map(text),
    st.integers(0, 3).map(lambda n: bytes([ord("K"), n])),
    st.tuples(st.sampled_from(b"qh"), st.integers(0, 3)).map(bytes),
    st.binary(max_size=24).map(lambda data: b"C" + bytes([len(data)]) + data),
)


@fuzz
@given(data=st.lists(INSTRUCTIONS, max_size=40).map(b"".join))
def test_random_programs(path: Path, data: bytes) -> None:
    check_outcome(path, b"\x80\x02" + data + b".")
    check_outcome(path, torch_zip(b"\x80\x02" + data + b".", _0=bytes(16), _1=bytes(8)))


def test_the_seeds_are_good_files(path: Path) -> None:
    """Undamaged, they are read: the fuzzer does not only meet refusals at the first byte."""
    for i, data in enumerate(SEEDS):
        path.write_bytes(data)
        with pytest.raises(UserError, match="mkdir") if i >= 7 else nullcontext():
            assert len(read_weights(path)) >= 3
