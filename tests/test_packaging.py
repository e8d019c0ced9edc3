"""setup.py: what it builds and reports, pinned requirements, and a wheel that works elsewhere."""

import io
import itertools
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from glob import glob
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import setuptools
import torch
from packaging.requirements import Requirement
from tiny import build as build_tiny
from tiny import get_cfg

from tensormask.commands import convert_weights
from tensormask.model_zoo import PACKAGED

ROOT = Path(__file__).parents[1]
MAX_WHEEL_BYTES = 10e6  # 2.2 MB of images, 5 MB of weights
VARIABLES = (
    *("FORCE_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST"),
    *("TENSORMASK_WITH_EXT", "TENSORMASK_WITHOUT_EXT"),
)


def clean_environment(**variables: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in VARIABLES} | variables


def run_setup(
    monkeypatch, modules: dict, command: str = "bdist_wheel", **variables: str
) -> tuple[dict, dict[str, str]]:
    """Run setup.py with other modules; return the arguments of `setup`, and the environment."""
    arguments = {}
    environment = clean_environment(**variables)
    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(setuptools, "setup", lambda **options: arguments.update(options))
        patch.setattr(os, "environ", environment)
        patch.setattr(sys, "argv", ["setup.py", command])
        patch.chdir(ROOT)
        runpy.run_path("setup.py", run_name="__main__")
    return arguments, environment


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Run setup.py as far as its decision, with a stand-in for PyTorch."""

    def build(
        version="2.11.0", cuda="13.0", gpu=False, home=None, BuildExtension=object, **options: str
    ):
        torch, utils = ModuleType("torch"), ModuleType("torch.utils")
        torch.__file__ = str(tmp_path / "torch" / "__init__.py")
        torch.__version__ = version
        torch.version = SimpleNamespace(cuda=cuda)
        torch.cuda = SimpleNamespace(is_available=lambda: gpu)
        utils.cpp_extension = SimpleNamespace(
            CUDA_HOME=home,
            CppExtension=lambda name, sources, **options: ("CPU", sources),
            CUDAExtension=lambda name, sources, **options: ("CUDA", sources),
            BuildExtension=BuildExtension,
        )
        modules = {
            "torch": torch,
            "torch.utils": utils,
            "torch.utils.cpp_extension": utils.cpp_extension,
        }
        return run_setup(monkeypatch, modules, **options)

    return build


@pytest.fixture
def toolkit(tmp_path) -> str:
    (tmp_path / "cuda" / "include").mkdir(parents=True)
    (tmp_path / "cuda" / "include" / "cuda_runtime.h").touch()
    return str(tmp_path / "cuda")


def test_cpu_kernels_without_a_gpu(build, toolkit, capsys) -> None:
    arguments, _ = build(home=toolkit)
    ((kind, sources),) = arguments["ext_modules"]
    assert (kind, len(sources)) == ("CPU", 9)
    text = capsys.readouterr().out
    assert "sees no GPU and FORCE_CUDA is not set: no CUDA kernels" in text
    assert "compiling the operators for the CPU\n" in text


@pytest.mark.parametrize("variables, gpu", [({"FORCE_CUDA": "1"}, False), ({}, True)])
def test_cuda_kernels_with_a_gpu_or_by_force(build, toolkit, capsys, variables, gpu) -> None:
    arguments, environment = build(home=toolkit, gpu=gpu, **variables)
    ((kind, sources),) = arguments["ext_modules"]
    assert (kind, len(sources)) == ("CUDA", 11)
    assert "compiling the operators for the CPU and CUDA" in capsys.readouterr().out
    # Without a GPU PyTorch would stop at an empty list of architectures.
    architectures = None if gpu else "8.0;8.6;9.0+PTX"
    assert environment.get("TORCH_CUDA_ARCH_LIST") == architectures


@pytest.mark.parametrize("home", [None, "/usr/nowhere"])
def test_a_gpu_without_toolkit_gets_the_cpu_kernels(build, capsys, home) -> None:
    arguments, _ = build(gpu=True, home=home)
    assert arguments["ext_modules"][0][0] == "CPU"
    assert f"no CUDA kernels are built: no CUDA toolkit in CUDA_HOME={home}" in (
        capsys.readouterr().out
    )


def test_every_file_of_the_package_is_in_the_wheel(build) -> None:
    arguments, _ = build(TENSORMASK_WITHOUT_EXT="1")
    packed = {
        Path(path)
        for package, patterns in arguments["package_data"].items()
        for pattern in patterns
        for path in glob(str(ROOT / package.replace(".", "/") / pattern), recursive=True)
    }
    for path in (ROOT / "tensormask").rglob("*.*"):
        if path.is_file() and path.suffix not in (".py", ".pyc", ".so"):
            assert path in packed, path


TOO_OLD = "needs PyTorch 2.11 or newer, this is 2.10.1"


def test_what_cannot_be_compiled_is_left_out(build, monkeypatch, capsys) -> None:
    def reason_without_operators(**options) -> str:
        arguments, _ = build(**options)
        assert "ext_modules" not in arguments
        text = capsys.readouterr().out
        assert "'tensormask build-ops' compiles them later" in text
        return text

    off = {"TENSORMASK_WITHOUT_EXT": "1", "TENSORMASK_WITH_EXT": "1"}
    assert "TENSORMASK_WITHOUT_EXT is set" in reason_without_operators(**off)
    assert TOO_OLD in reason_without_operators(version="2.10.1")
    monkeypatch.setattr(sys, "platform", "win32")
    assert "on Linux only, this is win32" in reason_without_operators()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"version": "2.10.1", "TENSORMASK_WITH_EXT": "1"}, TOO_OLD),
        ({"version": "2.10.1", "command": "build_ext"}, TOO_OLD),
        ({"cuda": None, "FORCE_CUDA": "1"}, "is built without CUDA"),
        ({"home": None, "FORCE_CUDA": "1"}, "no CUDA toolkit in CUDA_HOME=None"),
        ({"home": "/usr/nowhere", "FORCE_CUDA": "1"}, "no CUDA toolkit in CUDA_HOME=/usr/nowhere"),
    ],
)
def test_what_must_be_compiled_is_an_error(build, options, message) -> None:
    with pytest.raises(SystemExit, match=message):
        build(**options)


class FailingBuild:
    """In place of PyTorch's BuildExtension."""

    def __init__(self, folder: Path) -> None:
        self.library = folder / "_C.so"
        self.library.touch()
        self.extensions = [SimpleNamespace(name="tensormask._C")]
        self.distribution = SimpleNamespace(ext_modules=self.extensions)

    def run(self) -> None:
        raise RuntimeError("no compiler")

    def get_ext_fullpath(self, name: str) -> Path:
        return self.library


@pytest.mark.parametrize("must", ["0", "1"])
def test_a_failing_compilation(build, monkeypatch, capsys, tmp_path, must) -> None:
    """It leaves no library of an earlier one, which could not be told from a new one."""
    arguments, _ = build(BuildExtension=FailingBuild, TENSORMASK_WITH_EXT=must)
    command = arguments["cmdclass"]["build_ext"](tmp_path)
    if must == "1":
        with pytest.raises(SystemExit, match="no compiler"):
            command.run()
        return
    command.run()
    assert "the operators are not compiled (no compiler)" in capsys.readouterr().out
    assert command.extensions == command.distribution.ext_modules == []
    assert not command.library.exists()


def test_setup_reads_the_version_without_importing(tmp_path) -> None:
    """In a Python with setuptools, but without torch and this package on its path."""
    (tmp_path / "torch.py").write_text("raise ImportError('setup.py imported torch')\n")
    env = {"PATH": "", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    version = (ROOT / "tensormask" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{done.stdout.split()[-1]}"' in version


def test_pins_are_within_the_bounds_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    bounds = [Requirement(text) for text in itertools.chain(project["dependencies"], *extras)]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert len(bounds) >= 10
    for bound in bounds:
        assert "<" in str(bound.specifier), bound
        assert bound.specifier.contains(pins[bound.name]), bound
    assert pins["torch"] == "2.14.1"


NATIVE = """
import sys, torch, tensormask
from tensormask.layers import _native, op_backend, swap_align2nat
for path in (tensormask.__file__, str(_native.LIBRARY)):
    assert path.startswith(sys.argv[1]), (path, _native.REASON)
x = torch.randn(1, 9, 12, 10)
with op_backend("native"):
    native = swap_align2nat(x, 2)
with op_backend("reference"):
    torch.testing.assert_close(native, swap_align2nat(x, 2))
"""
PURE = """
import sys
from tensormask.layers import _native, build
assert _native.LIBRARY is None
assert "tensormask build-ops" in _native.REASON
assert str(build.SOURCES).startswith(sys.argv[1])
"""


def make_environment(folder: Path, *, linked: bool) -> Path:
    """Make an environment with the packages of this one but ours, and return its Python.

    They are linked into it, or else added to its path only, where no build looks for PyTorch.
    """
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    installed = Path(sysconfig.get_path("purelib"))
    if not linked:
        (packages / "needed.pth").write_text(f"{installed}\n")
        return folder / "bin" / "python"
    for path in installed.iterdir():
        if not path.name.startswith(("tensormask", "__editable__")):
            (packages / path.name).symlink_to(path)
    return folder / "bin" / "python"


@pytest.mark.slow
@pytest.mark.skipif("TENSORMASK_WITHOUT_EXT" in os.environ, reason="nothing is compiled")
def test_wheels_from_the_sdist_in_clean_environments(tmp_path) -> None:
    """With pip's isolated builds, with and without PyTorch; outside of the repository."""

    def run(*command: str | Path, cwd: Path = tmp_path) -> None:
        env = clean_environment(CUDA_VISIBLE_DEVICES="", TENSORMASK_CACHE=str(tmp_path / "cache"))
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def install(python: Path, tag: str) -> None:
        pip = [sys.executable, "-m", "pip", "--python", python]
        wheels = tmp_path / tag
        run(*pip, "wheel", "-q", "--no-deps", "--wheel-dir", wheels, sdist)
        (wheel,) = wheels.glob("*.whl")
        assert f"-{tag}" in wheel.name
        assert wheel.stat().st_size < MAX_WHEEL_BYTES
        run(*pip, "install", "-q", "--no-index", "--no-deps", wheel)

    sdist_command = ["egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    run(sys.executable, "setup.py", "--quiet", *sdist_command, cwd=ROOT)
    (sdist,) = tmp_path.glob("*.tar.gz")

    python = make_environment(tmp_path / "pure", linked=False)
    install(python, "py3-none-any")
    run(python, "-I", "-c", PURE, tmp_path / "pure")

    python = make_environment(tmp_path / "compiled", linked=True)
    install(python, "cp310-abi3-linux_")
    run(python, "-I", "-c", NATIVE, tmp_path / "compiled")
    tensormask = python.parent / "tensormask"
    train = ["DATASETS.TRAIN", "['nuclei_val']", "DATASETS.TEST", "[]", "SOLVER.MAX_ITER", "10"]
    few = ["SOLVER.IMS_PER_BATCH", "1"]
    one_class = ["MODEL.TENSOR_MASK.NUM_CLASSES", "1"]
    run(tensormask, "train", "--config-file", "quickstart", *train, *few, *one_class)
    (image, *_) = (tmp_path / "compiled").glob("lib/*/*/tensormask/data/nuclei/val/*.jpg")
    weights = tmp_path / "output" / "quickstart" / "model_final.pth"
    run(tensormask, "predict", image, "--weights", weights, "--output", "drawn")
    assert (tmp_path / "drawn" / f"{image.stem}.png").is_file()


OFFLINE = """
import socket, sys
def refuse(*args):
    raise AssertionError("the network is used")
socket.socket.connect = socket.getaddrinfo = refuse
from tensormask import cli
sys.exit(cli.main(sys.argv[1:]))
"""
SOURCES = ("tensormask", "configs", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.mark.slow
def test_a_wheel_finds_nuclei_without_repository_and_network(tmp_path) -> None:
    """A tiny model stands in for the weights where they are not in the clone."""
    source, name = tmp_path / "source", f"{PACKAGED}.safetensors"
    source.mkdir()
    for entry in SOURCES:
        copy = shutil.copytree if (ROOT / entry).is_dir() else shutil.copy
        copy(ROOT / entry, source / entry)
    weights = source / "tensormask" / "weights" / name
    has_weights = weights.is_file()
    if not has_weights:
        (tmp_path / "model.pth").write_bytes(tiny_checkpoint())
        words = [str(tmp_path / "model.pth"), str(weights), "--dtype", "float16"]
        assert convert_weights.main([*words, "--to", "tensormask"]) == 0

    def run(*command: str | Path, cwd: Path = tmp_path) -> str:
        env = clean_environment(TENSORMASK_WITHOUT_EXT="1", PYTHONDONTWRITEBYTECODE="1")
        env |= {"HOME": str(tmp_path / "home"), "TENSORMASK_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", tmp_path, cwd=source)
    (wheel,) = tmp_path.glob("*-none-any.whl")
    assert not has_weights or wheel.stat().st_size < MAX_WHEEL_BYTES
    python = make_environment(tmp_path / "environment", linked=False)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index"]
    run(*pip, "--no-deps", wheel)
    shutil.rmtree(source)

    (package,) = (tmp_path / "environment").glob("lib/python*/site-packages/tensormask")
    assert (package / "weights" / "README.md").is_file()
    before = sorted(package.rglob("*"))
    image = package / "data" / "nuclei" / "val" / "001.jpg"
    printed = run(python, "-I", "-B", "-c", OFFLINE, "predict", image)
    assert f"model {PACKAGED}, finds cell nuclei; other objects need --weights\n" in printed
    assert "in 1 images" in printed
    assert sorted(p.name for p in (tmp_path / "output" / "predict").iterdir()) == [
        "001.png", "detections.json",
    ]  # fmt: skip
    assert sorted(package.rglob("*")) == before
    assert not (tmp_path / "cache").exists()


def tiny_checkpoint() -> bytes:
    opts = [
        "MODEL.TENSOR_MASK.NUM_CLASSES",
        1,
        "INPUT.MIN_SIZE_TEST",
        64,
        "INPUT.MAX_SIZE_TEST",
        64,
    ]
    content = {"model": build_tiny(opts=opts).state_dict(), "config": get_cfg(opts=opts).dump()}
    file = io.BytesIO()
    torch.save(content | {"class_names": ["nucleus"], "category_ids": [1]}, file)
    return file.getvalue()
