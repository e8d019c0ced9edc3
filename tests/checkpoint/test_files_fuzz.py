"""Whatever bytes a checkpoint has: tensors or one ValueError, and nothing has run.

``TENSORMASK_FUZZ_EXAMPLES=20000`` runs longer.
"""

import io
import json
import pickle
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from foreign import command, torch_bytes, torch_zip
from fuzz import fuzz_examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tensormask.checkpoint.files import read_checkpoint, read_description, read_weights

FOLDER = Path(tempfile.gettempdir())
MARKER = FOLDER / "tensormask_fuzz_has_run"  # in the seeds: their names must be the same each time
TIME_LIMIT = 10_000  # milliseconds for a file of some kilobytes: more is a loop

fuzz = settings(max_examples=fuzz_examples(60), deadline=TIME_LIMIT)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.pth"


def check_outcome(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    for read in (read_weights, read_checkpoint, read_description):
        try:
            content = read(path)
        except ValueError as error:
            message = str(error).removeprefix(str(path))
            assert len(message) < 500
            assert "\n" not in message
            assert "MemoryError" not in message
        else:
            assert isinstance(content, dict)
            if read is read_weights:
                for name, value in content.items():
                    assert type(name) is str
                    assert type(value) is Tensor
                    value.double().sum()  # looks at all of its numbers
                assert sum(value.nbytes for value in content.values()) <= 4 * len(data)
    assert not MARKER.exists()


# ---- good files, damaged ----


def seeds() -> list[bytes]:
    arrays = {
        "a": np.arange(4, dtype=np.float32).reshape(2, 2),
        "b.c": np.asfortranarray(np.ones((2, 3), ">f8")),
        "empty": np.zeros((0, 2), np.int64),
    }
    tensors = {name: torch.tensor(array.tolist()) for name, array in arrays.items()}
    tensors |= {"view": torch.arange(12.0).view(3, 4).t(), "half": torch.ones(3).bfloat16()}
    beside = {"class_names": ["a", "b"], "category_ids": [1, 2], "iteration": 3}
    evil = {"z": command(MARKER)}
    pickles = [pickle.dumps({"model": OrderedDict(arrays), **beside}, p) for p in range(6)]
    torches = [
        torch_bytes({"model": content, **beside}, legacy=legacy)
        for content in (tensors, torch.nn.BatchNorm1d(2).state_dict())
        for legacy in (False, True)
    ]
    commands = [pickle.dumps({"model": arrays, **evil}, p) for p in (0, 2, 4)]
    commands += [torch_bytes({"model": tensors, **evil}, legacy=legacy) for legacy in (False, True)]
    described = {key: json.dumps(value) for key, value in beside.items()}
    solid = {name: value.contiguous() for name, value in tensors.items()}
    return [*pickles, *torches, *commands, safetensors.torch.save(solid, described)]


SEEDS = seeds()
DAMAGES = ["bit", "byte", "cut", "out", "twice", "in", "number", "other"]
# Sizes, counts and places that overflow something.
NUMBERS = [n.to_bytes(size, "little") for size in (1, 2, 4, 8) for n in (0, 1, 2 ** (8 * size) - 1)]
NUMBERS += [(2 ** (8 * size - 1) - 1).to_bytes(size, "little") for size in (4, 8)]


@st.composite
def damaged_files(draw) -> bytes:
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        end = place + draw(st.integers(0, 40))
        match draw(st.sampled_from(DAMAGES)):
            case "bit":
                data[place : place + 1] = bytes(b ^ 1 << end % 8 for b in data[place : place + 1])
            case "byte":
                data[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del data[place:]
            case "out":
                del data[place:end]
            case "twice":
                data[place:place] = data[place:end] * draw(st.integers(1, 50))
            case "in":
                data[place:place] = draw(st.binary(max_size=20))
            case "number":
                number = draw(st.sampled_from(NUMBERS))
                data[place : place + len(number)] = number
            case "other":
                other = draw(st.sampled_from(SEEDS))
                start = draw(st.integers(0, len(other)))
                data[place:] = other[start:]
    return bytes(data)


@fuzz
@given(data=damaged_files())
def test_damaged_files(path: Path, data: bytes) -> None:
    check_outcome(path, data)


@fuzz
@given(data=damaged_files())
def test_damaged_pickles_in_whole_archives(path: Path, data: bytes) -> None:
    """Past the checksums of a zip file."""
    check_outcome(path, torch_zip(data, _0=bytes(16), _1=bytes(8)))


@fuzz
@given(data=st.binary(max_size=200))
def test_random_bytes(path: Path, data: bytes) -> None:
    check_outcome(path, data)
    check_outcome(path, b"\x80\x02" + data)


# ---- pickles, instruction by instruction ----


SMALL = st.integers(0, 3)
HUGE = st.sampled_from([10**6, 2**31 - 1, 2**62, 2**63, -1, -(2**31), 10**30])
INTEGERS = st.one_of(SMALL, SMALL, HUGE)
GLOBALS = [
    *("numpy._core.multiarray _reconstruct", "numpy.core.multiarray scalar", "numpy ndarray"),
    *("numpy._core.numeric _frombuffer", "numpy dtype", "_codecs encode", "__builtin__ bytes"),
    *("collections OrderedDict", "collections Counter", "torch Size", "torch FloatStorage"),
    *("torch LongStorage", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"),
    *("os system", "posix mkdir", "builtins eval", "builtins bytearray", "torch Tensor"),
]
TEXTS = ["a", "b", "f4", "<", "latin1", "storage", "0", "cpu", "model", "C", "x" * 2000]
TEXTS.append(str(MARKER))
BARE = b"0124.()]}NteasudlbRQ\x81\x85\x86\x87\x88\x89\x94"  # instructions without an argument


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def named(value: str) -> bytes:
    return b"c" + value.replace(" ", "\n").encode() + b"\n"


INSTRUCTIONS = st.one_of(
    st.sampled_from([bytes([code]) for code in BARE]),
    st.sampled_from(GLOBALS).map(named),
    st.sampled_from(TEXTS).map(text),
    INTEGERS.map(number),
    st.tuples(st.sampled_from(b"qh"), SMALL).map(bytes),
    st.tuples(st.sampled_from(b"rj"), st.sampled_from([0, 255])).map(
        lambda pair: bytes([pair[0]]) + bytes([pair[1]] * 4)
    ),
    st.binary(max_size=24).map(lambda data: b"C" + bytes([len(data)]) + data),
    st.binary(max_size=24).map(lambda data: b"U" + bytes([len(data)]) + data),
    st.binary(min_size=1, max_size=6),
)


@st.composite
def tuples_of(draw, parts: list[st.SearchStrategy[bytes]]) -> bytes:
    return b"(" + b"".join(draw(part) for part in parts) + b"t"


SIZES = st.lists(INTEGERS, max_size=3).map(lambda sizes: b"(" + b"".join(map(number, sizes)) + b"t")


def called(name: str, *parts: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return tuples_of(list(parts)).map(lambda arguments: named(name) + arguments + b"R")


FLAGS = st.sampled_from([b"\x88", b"\x89", b"N", number(0), text("C")])
BYTES = st.binary(max_size=32).map(lambda data: b"C" + bytes([len(data)]) + data)
CODES = st.sampled_from("f4 f8 i8 b1 u1 f2 O8 S4 V8 c8 f16".split()).map(text)
DTYPES = st.tuples(
    called("numpy dtype", CODES, FLAGS, FLAGS),
    tuples_of([st.just(number(3)), st.sampled_from("<>|=").map(text), st.just(b"NNN")]),
).map(lambda parts: b"".join(parts) + b"b")
ARRAYS = st.tuples(
    called("numpy.core.multiarray _reconstruct", st.just(named("numpy ndarray")),
           st.just(b"K\0\x85"), st.just(b"C\x01b")),
    tuples_of([st.just(number(1)), SIZES, DTYPES, FLAGS, BYTES]),
).map(lambda parts: b"".join(parts) + b"b")  # fmt: skip
BUFFERS = called("numpy._core.numeric _frombuffer", BYTES, DTYPES, SIZES, st.just(text("C")))
STORAGES = tuples_of([
    st.just(text("storage")),
    st.sampled_from(["torch FloatStorage", "torch LongStorage"]).map(named),
    st.sampled_from(["0", "1", "2"]).map(text), st.just(text("cpu")),
    st.sampled_from([4, 2, 16, 8, 10**12, 0, -1]).map(number),
]).map(lambda identity: identity + b"Q")  # fmt: skip
VIEWS = called(
    "torch._utils _rebuild_tensor_v2", STORAGES, INTEGERS.map(number), SIZES, SIZES, FLAGS
)
VALUES = st.one_of(ARRAYS, BUFFERS, VIEWS, INSTRUCTIONS)


@st.composite
def programs(draw, values: st.SearchStrategy[bytes]) -> bytes:
    """A dict of such values, now and then with another instruction in between."""
    items = draw(st.lists(st.tuples(st.sampled_from(TEXTS[:4]).map(text), values), max_size=4))
    parts = [b"}("] + [part for item in items for part in item] + [b"u."]
    for _ in range(draw(st.integers(0, 2))):
        parts.insert(draw(st.integers(0, len(parts))), draw(INSTRUCTIONS))
    return b"\x80\x02" + b"".join(parts)


@fuzz
@given(data=st.lists(INSTRUCTIONS, max_size=40).map(b"".join))
def test_random_programs(path: Path, data: bytes) -> None:
    check_outcome(path, data + b".")
    check_outcome(path, torch_zip(data + b".", _0=bytes(16), _1=bytes(8)))


@fuzz
@given(data=programs(VALUES))
def test_programs_of_arrays(path: Path, data: bytes) -> None:
    check_outcome(path, data)
    check_outcome(path, torch_zip(data, _0=bytes(16), _1=bytes(8)))


def old_format(program: bytes, sizes: list[int]) -> bytes:
    """A program that needs storages of these sizes, each of which is 16 bytes in fact."""
    program = program.replace(b"K\x04tQ", b"K\x04NtQ")  # an identity has one more part
    empty = b"\x80\x02}q\x00."
    start, _, _ = torch_bytes({}, legacy=True).rpartition(empty + pickle.dumps([], 2))
    assert start
    keys = pickle.dumps([str(i) for i in range(len(sizes))], 2)
    return start + program + keys + b"".join(n.to_bytes(8, "little") + bytes(16) for n in sizes)


@fuzz
@given(data=programs(VALUES), sizes=st.lists(st.sampled_from([0, 4, 2**31, 2**62]), max_size=3))
def test_programs_in_the_old_format(path: Path, data: bytes, sizes: list[int]) -> None:
    check_outcome(path, old_format(data, sizes))


# ---- archives and headers ----


@fuzz
@given(data=st.data())
def test_archives(path: Path, data: st.DataObject) -> None:
    """Any names, sizes and methods of compression."""
    names = ["a/data.pkl", "a/data/0", "b/data/0", "a/byteorder", "data.pkl", "../x", "a/data.pkl"]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in data.draw(st.lists(st.sampled_from(names), max_size=5, unique=True)):
            info = zipfile.ZipInfo(name)
            info.compress_type = data.draw(st.sampled_from([0, 0, 0, zipfile.ZIP_DEFLATED]))
            content = data.draw(programs(VIEWS)) if "pkl" in name else bytes(16)
            archive.writestr(info, content)
            for field in ("file_size", "compress_size", "header_offset"):
                if data.draw(st.sampled_from([False] * 15 + [True])):
                    setattr(info, field, data.draw(st.sampled_from([0, 1, 100, 2**20])))
    check_outcome(path, file.getvalue())


HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "", "__metadata__", "x" * 300]),
    st.one_of(
        st.fixed_dictionaries({
            "dtype": st.sampled_from(["F32", "F64", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "Q"]),
            "shape": st.lists(INTEGERS, max_size=3),
            "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16, 2**63, -1]), max_size=3),
        }),
        st.recursive(st.none() | st.text(max_size=3) | INTEGERS, st.lists, max_leaves=5),
    ),
    max_size=3,
)  # fmt: skip


@fuzz
@given(header=HEADERS, lie=st.sampled_from([0, 0, 0, 1, -1, 2**40, 2**63]), size=st.integers(0, 24))
def test_safetensors(path: Path, header: dict, lie: int, size: int) -> None:
    text = json.dumps(header).encode()
    check_outcome(path, max(0, len(text) + lie).to_bytes(8, "little") + text + bytes(size))


def test_the_fuzzers_reach_what_is_read(path: Path) -> None:
    """Their parts, undamaged, are good files: what they find is not all refused at the door."""
    for data in SEEDS[:10] + SEEDS[-1:]:
        path.write_bytes(data)
        assert len(read_weights(path)) >= 3
        assert read_checkpoint(path)["class_names"] == ["a", "b"]
    array = (
        named("numpy.core.multiarray _reconstruct") + b"(" + named("numpy ndarray")
        + b"K\0\x85C\x01btR(K\x01(K\x01t" + named("numpy dtype") + b"(" + text("f4")
        + b"\x89\x88tR(K\x03" + text("<") + b"NNNtb\x89C\x04\0\0\x80?tb"
    )  # fmt: skip
    view = (
        named("torch._utils _rebuild_tensor_v2") + b"((" + text("storage")
        + named("torch FloatStorage") + text("0") + text("cpu") + b"K\x04tQK\x00(K\x02K\x02t"
        + b"(K\x02K\x01t\x89tR"
    )  # fmt: skip
    data = b"\x80\x02}(" + text("a") + array + text("b") + view + b"u."
    path.write_bytes(torch_zip(data, _0=np.arange(4, dtype=np.float32).tobytes()))
    weights = read_weights(path)
    assert weights["a"].tolist() == [1]
    assert weights["b"].tolist() == [[0, 1], [2, 3]]
    path.write_bytes(old_format(data, [4]))
    assert read_weights(path)["b"].shape == (2, 2)
