"""Build the package, with the compiled operators where that is possible; say why if it is not.

TENSORMASK_WITH_EXT=1 turns a compilation that fails into an error, and so do FORCE_CUDA=1, which
compiles the CUDA kernels on a machine without a GPU, and the command build_ext.
TENSORMASK_WITHOUT_EXT=1 compiles nothing. More variables: see tensormask/layers/build.py.
"""

import contextlib
import importlib
import os
import runpy
import site
import sys
from pathlib import Path
from typing import Any

import setuptools
from setuptools import find_packages, setup

if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(
        f"tensormask: setuptools {setuptools.__version__} is too old: pip install 'setuptools>=77'"
    )
os.chdir(Path(__file__).parent)
build = runpy.run_path("tensormask/layers/build.py")
BuildError, is_on = build["BuildError"], build["is_on"]
MUST_COMPILE = (
    is_on("TENSORMASK_WITH_EXT") or is_on("FORCE_CUDA") or "build_ext" in sys.argv
) and not is_on("TENSORMASK_WITHOUT_EXT")


def operators() -> dict[str, Any]:
    """Return the arguments of `setup` that compile the operators; {} to install without them."""
    if not {"build", "build_ext", "bdist_wheel", "editable_wheel", "install"} & {*sys.argv}:
        return {}  # the others compile nothing
    try:
        if is_on("TENSORMASK_WITHOUT_EXT"):
            raise BuildError("TENSORMASK_WITHOUT_EXT is set")
        import_torch()
        arguments = build["setup_arguments"](Path("csrc"))
    except BuildError as error:
        report(error)
        return {}
    from setuptools.command.bdist_wheel import bdist_wheel

    build_ext = arguments["cmdclass"]["build_ext"]

    class BuildOperators(build_ext):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # of the compiler, of ninja, of PyTorch's checks
                report(error)
                for extension in self.extensions:
                    Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
                self.extensions = self.distribution.ext_modules = []

    class Wheel(bdist_wheel):
        def run(self) -> None:
            self.run_command("build_ext")  # decides whether the wheel is for every platform
            self.root_is_pure = not self.distribution.has_ext_modules()
            super().run()

    return {
        "ext_modules": arguments["ext_modules"],
        "cmdclass": {"build_ext": BuildOperators, "bdist_wheel": Wheel},
        # No symbol of Python is used: one wheel serves every CPython from 3.10 on.
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def import_torch() -> None:
    """Import the PyTorch of the environment that pip installs into.

    pip builds with that environment's Python, but hides its packages. Only PyTorch and what it
    imports are taken from there.
    """
    folders = [folder for folder in site.getsitepackages() if folder not in sys.path]
    sys.path += folders
    with contextlib.suppress(ImportError, OSError):  # `setup_arguments` reports it
        importlib.import_module("torch.utils.cpp_extension")
    del sys.path[len(sys.path) - len(folders) :]


def report(error: Exception) -> None:
    """Print why the operators are not compiled, or stop if they must be."""
    if MUST_COMPILE:
        sys.exit(f"tensormask: the operators cannot be compiled: {error}")
    print(
        f"tensormask: the operators are not compiled ({error}). They run in plain PyTorch, slower; "
        f"'{build['COMMAND']}' compiles them later."
    )


setup(
    packages=[
        *find_packages(include=["tensormask", "tensormask.*"]),
        *("tensormask.configs", "tensormask.configs.ablations", "tensormask.csrc"),
    ],
    package_dir={"tensormask.configs": "configs", "tensormask.csrc": "csrc"},
    package_data={
        "tensormask": ["py.typed", "weights/*"],
        "tensormask.data": ["nuclei/**"],
        "tensormask.visualization.html": ["templates/*"],
        "tensormask.configs": ["*.yaml"],
        "tensormask.configs.ablations": ["*.yaml"],
        "tensormask.csrc": ["*.h", "*.cpp", "*.cu"],
    },
    **operators(),
)
