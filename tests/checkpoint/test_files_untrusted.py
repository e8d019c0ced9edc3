"""Files that lie about what is in them: one clear error, and memory like that of the file."""

import codecs
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from foreign import Call, torch_bytes, torch_zip
from numpy._core.multiarray import _reconstruct
from numpy._core.numeric import _frombuffer


def array_call(shape=(2,), dtype="<f4", data: object = b"12345678", version=(1,)) -> Call:
    """What NumPy writes for an array, with anything in it."""
    state = (*version, shape, np.dtype(dtype), False, data)
    return Call(_reconstruct, np.ndarray, (0,), b"b", state=state)


def in_model(*values: object, protocol: int = 4) -> bytes:
    return pickle.dumps({"model": {str(i): value for i, value in enumerate(values)}}, protocol)


def again_and_again(function: bytes, arguments: bytes) -> bytes:
    """A list of the results of one call on the same long arguments, which the memo gives."""
    called = b"h\x01" + arguments + b"R"
    return (
        b"\x80\x02" + text("a" * 200_000) + b"q\x00" + function + b"q\x01](" + called * 5000 + b"e."
    )


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def many_entries(folder: Path, num: int) -> bytes:
    path = folder / "made.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"}.")
        for i in range(num):
            entry = zipfile.ZipInfo(str(i))
            entry.header_offset = entry.file_size = entry.compress_size = entry.CRC = 0
            archive.filelist.append(entry)
    return path.read_bytes()


def torch_data(pickled_tensor: bytes) -> bytes:
    return b"\x80\x02}X\x05\x00\x00\x00modelq\x00}X\x01\x00\x00\x00aq\x01" + pickled_tensor + b"ss."


def tensor_call(numel: int, offset: int, size: tuple, stride: tuple) -> bytes:
    """The instructions of `torch.save` for a tensor on storage 0."""
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    )
    numbers = (pickle.dumps(n, 2)[2:-1] for n in (numel, offset, size, stride))
    n, o, sizes, strides = numbers
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + n + b"tQ" + o + sizes + strides
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def many_names_of_one_entry(folder: Path, num: int) -> bytes:
    """A zip file whose directory has one large file under many names."""
    path = folder / "made.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", torch_data(tensor_call(250_000, 0, (1,), (1,))))
        archive.writestr("archive/data/0", bytes(1_000_000))
        for i in range(1, num):
            entry = zipfile.ZipInfo(f"archive/data/{i}")
            for field in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(entry, field, getattr(archive.getinfo("archive/data/0"), field))
            archive.filelist.append(entry)
    return path.read_bytes()


def safetensors_bytes(header: object, numbers: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + numbers


def entry(shape: list[int], *offsets: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


GOOD = {"model": {"a": torch.arange(300.0)}}


def lies(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Files, none of them larger than 3 MB, and a part of what is to be said of each."""
    good, old = torch_bytes(GOOD), torch_bytes(GOOD, legacy=True)
    storage = tensor_call(4, 0, (4,), (1,))
    huge, deep = 10**12, b"]" * 300_000 + b"a" * 299_999
    laughs = (
        b"N" + b"q\x00h\x00\x86" * 70
    )  # a pair of the last pair, and so on: 2**70 when written out
    other = "damaged, or of another kind"
    return {
        "nothing": (b"", other),
        "junk": (b"junk", other),
        "a page": (b"<!DOCTYPE html><html><body>404</body></html>", other),
        "a pointer of git lfs": (b"version https://git-lfs.github.com/spec/v1\n", other),
        # pickles
        "truncated": (in_model(np.zeros(9))[:-20], other),
        "huge state": (in_model(array_call((huge,))), "shape (1000000000000,) and 8 bytes"),
        "huge product": (in_model(array_call((2**62,) * 60)), "and 8 bytes for it"),
        "many axes": (in_model(array_call((1,) * 100)), "shape is none"),
        "negative axis": (in_model(array_call((-2, -1))), "shape is none"),
        "no shape": (in_model(array_call("ab")), "shape is none"),
        "short data": (in_model(array_call((3,))), "shape (3,) and 8 bytes"),
        "huge start": (
            in_model(Call(_reconstruct, np.ndarray, (huge,), b"b")),
            "that NumPy has not written",
        ),
        "another class": (in_model(Call(_reconstruct, np.memmap, (0,), b"b")), "numpy.memmap"),
        "ndarray": (in_model(Call(np.ndarray, (huge,))), "a call of what is no function"),
        "frombuffer": (
            in_model(Call(_frombuffer, b"1234", np.dtype("f4"), (huge,), "C")),
            "shape (1000000000000,) and 4 bytes",
        ),
        "bytearray": (in_model(Call(bytearray, huge)), "builtins.bytearray"),
        "objects": (in_model(np.array([1, "a"], object)), "dtype O8"),
        "texts": (in_model(np.array(["a" * 100])), "dtype U100, not of numbers"),
        "structure": (in_model(np.zeros(3, "f4,i4")), "dtype V8"),
        "complex": (in_model(np.zeros(3, complex)), "dtype c16"),
        "masked": (in_model(np.ma.zeros(3)), "numpy.ma"),
        "a list as data": (in_model(array_call(data=[1, 2])), "array of objects"),
        "a class": (in_model(Path("a")), "pathlib.PosixPath"),
        "a set": (in_model({1, 2}), "EMPTY_SET"),
        "no state": (b"\x80\x02}X\x01\0\0\0acnumpy\ndtype\nX\x02\0\0\0f4\x85Rs.", "is _Unbuilt"),
        "far memo": (b"\x80\x02}r\xff\xff\xff\xff.", "is empty"),
        "no memo": (b"\x80\x02h\x05.", other),
        "no operands": (b"\x80\x02a.", other),
        "below a mark": (b"\x80\x02](K\x01\x85aa.", other),
        "long length": (b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"ab.", other),
        "many steps": (b"\x80\x02" + b"}" * 2_000_000 + b".", "more than 1,000,000 instructions"),
        "deep": (b"\x80\x02}X\x01\0\0\0a" + deep + b"s.", "entry a is list"),
        "laughing key": (b"\x80\x02}" + laughs + b"Ns.", "keys are tuple"),
        "laughing value": (b"\x80\x02}X\x01\0\0\0a" + laughs + b"s.", "entry a is tuple"),
        "laughing shape": (
            b"\x80\x02}X\x01\0\0\0acnumpy._core.numeric\n_frombuffer\n(X\x01\0\0\0a"
            b"cnumpy\ndtype\n(X\x02\0\0\0f4tR(K\x03X\x01\0\0\0<tb" + laughs + b"X\x01\0\0\0CtRs.",
            "shape is none",
        ),
        "encoded again and again": (
            again_and_again(b"c_codecs\nencode\n", b"h\x00" + text("latin1") + b"\x86"),
            "far beyond its size",
        ),
        "copied again and again": (
            again_and_again(b"ctorch\nSize\n", b"h\x00\x85"), "far beyond its size"
        ),
        "called with many again and again": (
            b"\x80\x02" + b"(" + b"N" * 200_000 + b"tq\x00](" + 5000 * (
                b"ctorch._utils\n_rebuild_parameter\nh\x00R"
            ) + b"e.",
            "far beyond its size",
        ),
        "laughing name": (b"\x80\x04" + text("os") + laughs + b"\x93.", "name that is no text"),
        "another encoding": (in_model(Call(codecs.encode, "a", "zip")), "latin1"),
        "long name": (pickle.dumps({"a" * 5000: np.zeros(2)}), "name of 5,000 characters"),
        "huge number as key": (pickle.dumps({2**70: 1}), "keys are int"),
        "many names of one array": (
            b"\x80\x02}" + pickle.dumps(np.zeros(25_000), 3)[2:-1] + b"q\x4f0("
            + b"".join(b"X\x04\0\0\0%04dh\x4f" % i for i in range(1000)) + b"u.",
            "would take 200,000,000 bytes",
        ),
        # torch.save
        "torch, truncated": (good[:-200], other),
        "torch, a bit": (good.replace(np.float32(77).tobytes(), np.float32(78).tobytes()), "CRC"),
        "old torch, truncated": (old[:-20], "before all of its numbers"),
        "old torch, huge": (
            old.replace((300).to_bytes(8, "little"), (2**60).to_bytes(8, "little")),
            "before all of its numbers",
        ),
        "huge storage": (
            torch_zip(torch_data(tensor_call(huge, 0, (4,), (1,))), _0=bytes(16)),
            "not all of them there",
        ),
        "small storage": (torch_zip(torch_data(storage), _0=bytes(12)), "not all of them there"),
        "no storage": (torch_zip(torch_data(storage)), other),
        "expanded": (torch_bytes({"a": torch.zeros(1).expand(huge)}), "1 numbers for it"),
        "expanded, old": (
            torch_bytes({"a": torch.zeros(1).expand(huge)}, legacy=True),
            "1 numbers for it",
        ),
        "out of bounds": (
            torch_zip(torch_data(tensor_call(4, 2, (3,), (1,))), _0=bytes(16)),
            "4 numbers for it",
        ),
        "wide strides": (
            torch_zip(torch_data(tensor_call(4, 0, (2, 2), (3, 1))), _0=bytes(16)),
            "4 numbers for it",
        ),
        "negative offset": (
            torch_zip(torch_data(tensor_call(4, -1, (2,), (1,))), _0=bytes(16)),
            "shape is none",
        ),
        "bytearray in torch": (
            torch_zip(torch_data(b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R")),
            "__builtin__.bytearray",
        ),
        "a call of Tensor": (
            torch_zip(torch_data(b"ctorch\nTensor\nJ\xff\xff\xff\x7f\x85R")), "torch.Tensor"
        ),
        "sparse": (torch_bytes({"a": torch.eye(2).to_sparse()}), "_rebuild_sparse_tensor"),
        "meta": (torch_bytes({"a": torch.zeros(2, device="meta")}), "_rebuild_meta_tensor"),
        "compressed": (
            torch_zip(torch_data(storage), zipfile.ZIP_DEFLATED, _0=bytes(200_000_000)),
            "compressed",
        ),
        "compressed, small": (
            torch_zip(torch_data(storage), zipfile.ZIP_LZMA, _0=bytes(16)), "compressed"
        ),
        "many names of one entry": (many_names_of_one_entry(folder, 200), "compressed"),
        "many entries": (many_entries(folder, 50_000), "is empty"),
        "another zip": (torch_zip(b"").replace(b"data.pkl", b"data.npy"), "has not written"),
        "many views": (
            torch_zip(
                b"\x80\x02}(" + b"".join(
                    b"X\x04\0\0\0%04d" % i + tensor_call(250_000, 0, (250_000,), (1,))
                    for i in range(300)
                ) + b"u.",
                _0=bytes(1_000_000),
            ),
            "would take 300,000,000 bytes",
        ),
        # safetensors
        "header too long": (safetensors_bytes({"a": entry([1], 0, 4)}, bytes(4), 2**50), other),
        "no header": (safetensors_bytes(b"{}"), "is empty"),
        "no JSON": (safetensors_bytes(b"{" * 1_000_000), other),
        "deep JSON": (safetensors_bytes(b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}"), other),
        "huge tensor": (safetensors_bytes({"a": entry([huge], 0, 4)}, bytes(4)), other),
        "beyond the end": (safetensors_bytes({"a": entry([huge], 0, 4 * huge)}, bytes(4)), other),
        "overlapping": (
            safetensors_bytes({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)), other
        ),
        "unknown dtype": (safetensors_bytes({"a": entry([1], 0, 4, dtype="Q9")}, bytes(4)), other),
        "safetensors, truncated": (
            safetensors.torch.save({"a": torch.ones(10)})[:-8], other
        ),
    }  # fmt: skip


CHILD = """
import json, resource, sys
from pathlib import Path
from tensormask.checkpoint.files import read_weights
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 800_000_000,) * 2)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, said = peak(), {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        said[path.name] = "read: " + str(list(read_weights(path)))
    except ValueError as error:
        said[path.name] = str(error)
    except BaseException as error:
        said[path.name] = "raised " + type(error).__name__
print(json.dumps([peak() - before, said]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory by /proc")
def test_lies_end_in_one_clear_error_and_little_memory(tmp_path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    files = lies(tmp_path)
    for name, (data, _) in files.items():
        assert len(data) < 3_000_000, name
        (folder / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    grown, said = json.loads(done.stdout)
    wrong = {
        name: (part, said[name][-400:])
        for name, (_, part) in files.items()
        if part not in said[name] or len(said[name]) > 500 + len(str(folder))
    }
    assert wrong == {}
    assert not any("MemoryError" in text for text in said.values())
    assert grown < 150_000_000
