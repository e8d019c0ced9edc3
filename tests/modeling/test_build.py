"""setup.py: what it decides and says, and a wheel from the sdist that works elsewhere."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VARIABLES = ("FORCE_CUDA", "CUDA_HOME", "TENSORMASK_WITHOUT_EXT", "TORCH_CUDA_ARCH_LIST")
# A PyTorch of which setup.py sees what it looks at. BuildExtension compiles nothing.
TORCH = """
__version__ = {version!r}
class version: cuda = {cuda!r}
class cuda:
    @staticmethod
    def is_available(): return {gpu}
"""
CPP_EXTENSION = """
from setuptools import Extension
from setuptools.command.build_ext import build_ext
CUDA_HOME = {home!r}
def CppExtension(name, sources, **options):
    import os
    print("sources:", len(sources), "architectures:", os.environ.get("TORCH_CUDA_ARCH_LIST"))
    options["extra_compile_args"] = []
    return Extension(name, sources, **options)
CUDAExtension = CppExtension
BuildExtension = build_ext
"""


def clean_environment(**variables: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in VARIABLES} | variables


def decide(tmp_path, version="2.11.0", cuda="13.0", gpu=False, home=None, **variables: str):
    """Runs setup.py as far as its decision, with a stand-in for PyTorch."""
    utils = tmp_path / "torch" / "utils"
    utils.mkdir(parents=True)
    (utils / "__init__.py").touch()
    (utils / "cpp_extension.py").write_text(CPP_EXTENSION.format(home=home))
    (tmp_path / "torch" / "__init__.py").write_text(
        TORCH.format(version=version, cuda=cuda, gpu=gpu)
    )
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--help"],
        cwd=ROOT,
        env=clean_environment(PYTHONPATH=str(tmp_path), **variables),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def toolkit(tmp_path) -> str:
    (tmp_path / "cuda" / "include").mkdir(parents=True)
    (tmp_path / "cuda" / "include" / "cuda_runtime.h").touch()
    return str(tmp_path / "cuda")


def test_cpu_where_no_gpu_is_in_sight(tmp_path) -> None:
    code, text = decide(tmp_path, home=toolkit(tmp_path))
    assert code == 0, text
    assert "no GPU in sight and FORCE_CUDA is not set: no CUDA kernels" in text
    assert "compiling swap_align2nat for the CPU\n" in text
    assert "sources: 6" in text


@pytest.mark.parametrize("variables, gpu", [({"FORCE_CUDA": "1"}, False), ({}, True)])
def test_cuda_where_asked_for_or_in_sight(tmp_path, variables, gpu) -> None:
    code, text = decide(tmp_path, home=toolkit(tmp_path), gpu=gpu, **variables)
    assert code == 0, text
    assert "compiling swap_align2nat for the CPU and CUDA" in text
    # Without a GPU PyTorch would stop at an empty list of architectures.
    assert f"sources: 7 architectures: {None if gpu else '8.0;8.6;9.0+PTX'}" in text


def test_without_extension(tmp_path) -> None:
    code, text = decide(tmp_path, version="1.0", TENSORMASK_WITHOUT_EXT="1")
    assert code == 0, text
    assert "no compiled op: TENSORMASK_WITHOUT_EXT is set" in text
    assert "sources" not in text


@pytest.mark.parametrize(
    "options, message",
    [
        ({"version": "2.10.1"}, "needs PyTorch 2.11 or newer, this is 2.10.1"),
        ({"cuda": None, "FORCE_CUDA": "1"}, "is built without CUDA"),
        ({"home": None, "FORCE_CUDA": "1"}, "no CUDA toolkit in CUDA_HOME=None"),
        ({"home": "/usr/nowhere", "FORCE_CUDA": "1"}, "no CUDA toolkit in CUDA_HOME=/usr/nowhere"),
        ({"home": "/usr/nowhere", "gpu": True}, "no CUDA toolkit in CUDA_HOME=/usr/nowhere"),
    ],
)
def test_traps_are_named(tmp_path, options, message) -> None:
    code, text = decide(tmp_path, **options)
    assert code == 1
    assert message in text


def test_a_gpu_without_toolkit_gets_the_cpu_kernels(tmp_path) -> None:
    code, text = decide(tmp_path, gpu=True, home=None)
    assert code == 0, text
    assert "a GPU is in sight, but no CUDA toolkit (nvcc): no CUDA kernels" in text


def test_build_isolation_is_explained(tmp_path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError(\"No module named 'torch'\")\n")
    done = subprocess.run(
        [sys.executable, "setup.py", "bdist_wheel", "--help"],
        cwd=ROOT,
        env=clean_environment(PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "pip install --no-build-isolation --no-deps -e ." in done.stderr


CHECK = """
import sys, torch
import tensormask
from tensormask.layers import _native, op_backend, swap_align2nat
assert tensormask.__file__.startswith(sys.argv[1]), tensormask.__file__
assert str(_native.LIBRARY).startswith(sys.argv[1]), (_native.LIBRARY, _native.REASON)
x = torch.randn(1, 9, 12, 10)
with op_backend("native"):
    native = swap_align2nat(x, 2)
with op_backend("reference"):
    torch.testing.assert_close(native, swap_align2nat(x, 2))
print("it works")
"""


@pytest.mark.skipif("TENSORMASK_WITHOUT_EXT" in os.environ, reason="nothing is compiled")
def test_wheel_from_the_sdist_in_a_clean_environment(tmp_path) -> None:
    def setup_py(folder: Path, *arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "setup.py", "--quiet", *arguments, "--dist-dir", str(tmp_path)],
            cwd=folder,
            env=clean_environment(CUDA_VISIBLE_DEVICES=""),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    setup_py(ROOT, "egg_info", "--egg-base", str(tmp_path), "sdist")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    setup_py(source, "bdist_wheel")
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-linux_" in wheel.name
    assert "tensormask/_C.abi3.so" in zipfile.ZipFile(wheel).namelist()

    # An environment with nothing but the wheel; what it needs is seen by its path.
    clean = tmp_path / "clean"
    venv.create(clean, with_pip=False)
    (packages,) = clean.glob("lib/python*/site-packages")
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(clean)]
    subprocess.run([*pip, "install", "-q", "--no-index", "--no-deps", str(wheel)], check=True)
    done = subprocess.run(
        [clean / "bin" / "python", "-I", "-c", CHECK, str(clean)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "it works\n", done.stderr
