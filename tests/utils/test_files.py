"""Files that are whole or not there, and a full disk that says so."""

import errno
import os
import resource
import subprocess
import sys

import pytest

from tensormask.utils.files import DiskFullError, remove_leftovers, write_atomically


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_name_appears_only_when_the_content_is_whole(tmp_path):
    path = tmp_path / "file"

    def look(file):
        file.write(b"all")
        file.flush()
        assert not path.exists()
        assert len(os.listdir(tmp_path)) == 1  # in the same folder, so that the rename is atomic

    write_atomically(path, look)
    with open(path, "rb") as of_a_reader:
        write_atomically(path, lambda file: file.write(b"new"))
        assert of_a_reader.read() == b"all"
    assert path.read_bytes() == b"new"


def fail_with(error):
    def write(file):
        file.write(b"half")
        raise error

    return write


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_space_says_what_is_whole_and_what_to_do(tmp_path, code):
    path = tmp_path / "model.pth"
    with pytest.raises(DiskFullError, match=r"make space.*--resume.*model\.pth") as caught:
        write_atomically(path, fail_with(OSError(code, os.strerror(code))))
    assert caught.value.errno == code
    assert os.listdir(tmp_path) == []


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (ValueError("a bug"), PermissionError(errno.EACCES, "no")):
        with pytest.raises(type(error)):
            write_atomically(tmp_path / "file", fail_with(error))


@pytest.mark.parametrize("size", [700, 20_000, 399_000])
def test_a_checkpoint_that_does_not_fit(tmp_path, size):
    """torch.save turns the system's error into its own, in another way at each place."""
    script = f"""
import resource, torch
from tensormask.engine.resume import write_torch
from tensormask.utils.files import DiskFullError
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {resource.RLIM_INFINITY}))
try:
    write_torch({str(tmp_path / "model.pth")!r}, {{"a": torch.zeros(100_000)}})
except DiskFullError as error:
    print("full", error.errno)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == f"full {errno.EFBIG}\n", done.stderr
    assert os.listdir(tmp_path) == []


def test_only_temporary_files_are_leftovers(tmp_path):
    names = {"model.pth", ".model.pth.tmp", ".lock", "x.12.tmp", ".model_0000009.pth.4711.tmp"}
    for name in names:
        (tmp_path / name).touch()
    assert remove_leftovers(tmp_path) == [".model_0000009.pth.4711.tmp"]
    assert set(os.listdir(tmp_path)) == names - {".model_0000009.pth.4711.tmp"}
