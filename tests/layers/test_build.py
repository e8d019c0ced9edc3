"""The compiled library: where it is put, which one is found, and the command."""

import os
from pathlib import Path

import pytest
import torch
from setuptools.command.build_ext import build_ext

from tensormask.commands import build_ops
from tensormask.layers import build

pytestmark = pytest.mark.skipif(os.name != "posix", reason="compiled on Linux only")


@pytest.fixture
def folders(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """An installed package's folder and the cache's, with sources of their own."""
    package, cache = tmp_path / "package", tmp_path / "cache"
    (package / "csrc").mkdir(parents=True)
    (package / "csrc" / "operators.cpp").write_text("old")
    monkeypatch.setattr(build, "PACKAGE", package)
    monkeypatch.setattr(build, "SOURCES", package / "csrc")
    monkeypatch.setenv("TENSORMASK_CACHE", str(cache))
    return package, cache / "operators"


def compile_to(monkeypatch, text: str) -> None:
    """Replace the compiler."""

    class BuildExtension(build_ext):
        def run(self) -> None:
            if text == "":
                raise RuntimeError("the compiler's error")
            Path(self.build_lib, "tensormask").mkdir()
            Path(self.build_lib, "tensormask", "_C.abi3.so").write_text(text)

    arguments = {"cmdclass": {"build_ext": BuildExtension}}
    monkeypatch.setattr(build, "setup_arguments", lambda sources: arguments)


def test_the_newest_library_of_the_sources_is_found(folders, monkeypatch) -> None:
    package, _ = folders
    assert build.find_library() is None
    compile_to(monkeypatch, "compiled")
    library = build.build_library()
    assert (library.parent, library.read_text()) == (package, "compiled")
    assert build.find_library() == library
    assert [*package.glob("_C*")] == [library]  # no partial file

    installed = package / "_C.abi3.so"  # by setup.py
    for age, expected in ((60, library), (-60, installed)):
        installed.touch()
        os.utime(installed, (0, library.stat().st_mtime - age))
        assert build.find_library() == expected

    (package / "csrc" / "operators.cpp").write_text("new")
    installed.unlink()
    assert build.find_library() is None


def test_a_package_that_cannot_be_written(folders, tmp_path, monkeypatch) -> None:
    """The library is in the cache then, for this version of PyTorch's CUDA."""
    package, cache = folders
    monkeypatch.setattr(build, "PACKAGE", package / "csrc" / "operators.cpp")  # is no folder
    compile_to(monkeypatch, "compiled")
    library = build.build_library()
    assert library.parent == cache
    assert build.find_library() == library
    monkeypatch.setattr(torch.version, "cuda", "1.0")
    assert build.find_library() is None
    monkeypatch.setenv("TENSORMASK_CACHE", str(library))  # is no folder
    with pytest.raises(OSError, match="operators"):
        build.build_library()


def test_the_command_reports_a_failure(folders, tmp_path, monkeypatch, capsys) -> None:
    compile_to(monkeypatch, "")
    assert build_ops.main([]) == 2
    assert capsys.readouterr().err == "error: the compilation failed: the compiler's error\n"
    compile_to(monkeypatch, "compiled")
    assert build_ops.main(["--output", str(tmp_path / "new")]) == 0
    (library,) = (tmp_path / "new").iterdir()
    assert capsys.readouterr().out == f"compiled: {library}\n"

    monkeypatch.setattr(build_ops, "CHECK", "print('another.so')")
    assert build_ops.main([]) == 2
    assert capsys.readouterr().err == "error: the library is not used: another.so\n"
