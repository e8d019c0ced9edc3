"""Atomic writes, and the error for a full disk."""

import errno
import os
import resource
import threading

import pytest
import torch
from fork import CONTEXT

from tensormask.engine.resume import write_torch
from tensormask.utils.files import (
    DiskFullError,
    remove_leftovers,
    wait_for_file,
    write_atomically,
)


def fail_with(error):
    def write(file):
        file.write(b"half")
        raise error

    return write


def test_a_failed_write_does_not_change_the_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail_with(OSError("disk full")))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_appears_only_with_all_of_its_content(tmp_path):
    path = tmp_path / "file"

    def write(file):
        file.write(b"all")
        file.flush()
        assert not path.exists()
        assert len(os.listdir(tmp_path)) == 1  # in the same folder, so that the rename is atomic

    write_atomically(path, write)
    with open(path, "rb") as earlier:
        write_atomically(path, lambda file: file.write(b"new"))
        assert earlier.read() == b"all"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_helpful_error(tmp_path, code):
    path = tmp_path / "model.pth"
    with pytest.raises(DiskFullError, match=r"intact; make space.*--resume.*model\.pth") as caught:
        write_atomically(path, fail_with(OSError(code, os.strerror(code))))
    assert caught.value.errno == code
    assert os.listdir(tmp_path) == []


def test_other_errors_are_not_changed(tmp_path):
    for error in (ValueError("a bug"), PermissionError(errno.EACCES, "no")):
        with pytest.raises(type(error)):
            write_atomically(tmp_path / "file", fail_with(error))


@pytest.mark.parametrize("size", [700, 20_000, 399_000])
def test_a_checkpoint_larger_than_the_disk(tmp_path, size):
    """torch.save turns the system's error into its own, differently at each position."""

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        with pytest.raises(DiskFullError) as caught:
            write_torch(tmp_path / "model.pth", {"a": torch.zeros(100_000)})
        assert caught.value.errno == errno.EFBIG

    process = CONTEXT.Process(target=write)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert os.listdir(tmp_path) == []


def test_only_temporary_files_are_leftovers(tmp_path):
    names = {"model.pth", ".model.pth.tmp", ".lock", "x.12.tmp", ".model_0000009.pth.4711.tmp"}
    for name in names:
        (tmp_path / name).touch()
    assert remove_leftovers(tmp_path) == [".model_0000009.pth.4711.tmp"]
    assert set(os.listdir(tmp_path)) == names - {".model_0000009.pth.4711.tmp"}


def test_a_file_of_another_machine_appears_late(tmp_path):
    path = tmp_path / "part"
    path.write_bytes(b"of an earlier run")
    timer = threading.Timer(0.3, path.write_bytes, [b"all"])
    timer.start()
    wait_for_file(path, 3)
    assert path.read_bytes() == b"all"
    timer.join()
    with pytest.raises(FileNotFoundError, match="the same folder on a shared disk"):
        wait_for_file(path, 4, timeout=0)
