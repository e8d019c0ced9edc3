"""Compile the operators of csrc/, and find the compiled library.

setup.py runs this file by its path, without the package and perhaps without PyTorch.
"""

import hashlib
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
# In an installed package, or in the repository.
SOURCES = next(
    (path for path in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if path.is_dir()),
    PACKAGE / "csrc",
)
# The stable ABI of PyTorch 2.11: the library runs with this version and all later ones.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# For machines without a GPU: A100, RTX 30, H100, and by PTX all later ones.
DEFAULT_ARCHITECTURES = "8.0;8.6;9.0+PTX"
COMMAND = "tensormask build-ops"


class BuildError(RuntimeError):
    """Why the operators cannot be compiled, and what to change."""


def is_on(variable: str) -> bool:
    """Return whether an environment variable is set to something like 1."""
    return os.environ.get(variable, "0").lower() not in ("", "0", "false", "no", "off")


def setup_arguments(sources: Path) -> dict[str, Any]:
    """Return the arguments of `setuptools.setup` that compile the operators.

    ``FORCE_CUDA=1`` compiles the CUDA kernels on a machine without a GPU, ``TORCH_CUDA_ARCH_LIST``
    chooses the GPUs, ``CUDA_HOME`` the toolkit.

    Args:
        sources: the folder csrc/, relative to setup.py if that is what runs.

    Raises:
        BuildError: they cannot be compiled here.
    """
    if not sys.platform.startswith("linux"):
        raise BuildError(f"they are compiled on Linux only, this is {sys.platform}")
    try:
        import torch
        from torch.utils import cpp_extension
    except (ImportError, OSError) as error:  # OSError: its libraries do not load
        raise BuildError(f"compiling needs PyTorch and setuptools ({error})") from error
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 11):
        raise BuildError(f"compiling needs PyTorch 2.11 or newer, this is {torch.__version__}")
    files, cuda_files, headers = (
        sorted(str(path) for path in sources.glob(pattern)) for pattern in ("*.cpp", "*.cu", "*.h")
    )
    flags = {"cxx": ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", STABLE_ABI]}
    make, include_dirs = cpp_extension.CppExtension, []
    cuda = _wants_cuda(torch, cpp_extension.CUDA_HOME)
    if cuda:
        make = cpp_extension.CUDAExtension
        files += cuda_files
        flags["nvcc"] = ["-O3", "-std=c++17", STABLE_ABI, "-DUSE_CUDA"]
        # A small toolkit may lack headers that PyTorch's packages have.
        packages = Path(torch.__file__).parents[1] / "nvidia"
        include_dirs = [str(path) for path in packages.glob("cu*/include")]
    print(f"tensormask: compiling the operators for the CPU{' and CUDA' if cuda else ''}")
    operators = make(
        "tensormask._C",
        files,
        depends=headers,
        include_dirs=include_dirs,
        extra_compile_args=flags,
        py_limited_api=True,  # no symbol of Python is used
    )
    return {"ext_modules": [operators], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


def _wants_cuda(torch: Any, cuda_home: str | None) -> bool:
    """Return whether to build the CUDA kernels; set TORCH_CUDA_ARCH_LIST if there is no GPU."""
    forced, visible = is_on("FORCE_CUDA"), torch.cuda.is_available()
    if not forced and not visible:
        print("tensormask: PyTorch sees no GPU and FORCE_CUDA is not set: no CUDA kernels")
        return False
    if torch.version.cuda is None:
        reason = (
            f"PyTorch {torch.__version__} is built without CUDA: install one with CUDA, or unset "
            "FORCE_CUDA"
        )
    elif cuda_home is None or not Path(cuda_home, "include", "cuda_runtime.h").is_file():
        standard = Path("/usr/local/cuda")
        exists = (standard / "include" / "cuda_runtime.h").is_file()
        reason = (
            f"no CUDA toolkit in CUDA_HOME={cuda_home}: include/cuda_runtime.h is missing (PyTorch "
            f"guesses a wrong folder if nvcc is a wrapper script). Set CUDA_HOME="
            f"{standard if exists else '/path/to/cuda'} and build again"
        )
    else:
        if not visible and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_ARCHITECTURES
            print(f"tensormask: no GPU: TORCH_CUDA_ARCH_LIST={DEFAULT_ARCHITECTURES}")
        return True
    if forced:
        raise BuildError(reason)
    print(f"tensormask: PyTorch sees a GPU, but no CUDA kernels are built: {reason}")
    return False


def build_library(folder: Path | None = None) -> Path:
    """Compile the operators, and return the path of the library.

    Args:
        folder: gets the library. None: the first folder of `find_library` that can be written.

    Raises:
        BuildError: they cannot be compiled here.
        OSError: the library cannot be written.
    """
    arguments = setup_arguments(SOURCES)
    from setuptools import Distribution

    with tempfile.TemporaryDirectory() as temporary:
        distribution = Distribution({"name": "tensormask", "packages": [], **arguments})
        command = distribution.get_command_obj("build_ext")
        command.build_lib, command.build_temp = temporary, f"{temporary}/objects"
        try:
            distribution.run_command("build_ext")
        except Exception as error:  # of the compiler, of ninja, of PyTorch's checks
            raise BuildError(f"the compilation failed: {error}") from error
        (built,) = Path(temporary, "tensormask").glob("_C*.so")
        for target in _folders() if folder is None else (folder,):
            try:
                target.mkdir(parents=True, exist_ok=True)
                # Renamed when it is complete: it may be in use.
                partial = shutil.copy(built, target / f"{library_name()}.{os.getpid()}")
                return Path(partial).rename(target / library_name())
            except OSError as error:
                failure = error
    raise failure


def find_library() -> Path | None:
    """Return the newest compiled library, or None.

    It is setup.py's in the package's folder, or, if it is of the present sources, one of
    `build_library`, in that folder or in the user's cache.
    """
    found = [path for path in PACKAGE.glob("_C.*") if path.suffix in (".so", ".pyd")]
    built = [path for folder in _folders() for path in folder.glob("_C-*.so")]
    if built:
        name = library_name()
        found += [path for path in built if path.name == name]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def library_name() -> str:
    """Return the file name of `build_library`, of the sources, the machine and PyTorch's CUDA."""
    import torch

    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*")):
        if path.suffix in (".cpp", ".cu", ".h"):
            digest.update(path.name.encode() + path.read_bytes())
    cuda = f"cu{torch.version.cuda}" if torch.version.cuda else "cpu"
    return f"_C-{platform.machine()}-{cuda}-{digest.hexdigest()[:12]}.so"


def _folders() -> Iterator[Path]:
    """Yield the folders of libraries: the package's, and the user's cache."""
    yield PACKAGE
    cache = os.environ.get("TENSORMASK_CACHE")
    cache = cache or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "tensormask")
    yield Path(os.path.expanduser(cache), "operators")
