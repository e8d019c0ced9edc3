"""Build the package and, where possible, its compiled op; print what is built and why.

TENSORMASK_WITHOUT_EXT=1 builds no op (it then runs in plain PyTorch), FORCE_CUDA=1 builds the CUDA
kernels on a machine without a GPU, TORCH_CUDA_ARCH_LIST chooses the GPUs, CUDA_HOME the toolkit.
"""

import os
import re
import sys
from pathlib import Path

import setuptools
from setuptools import find_packages, setup

ROOT = Path(__file__).parent
SOURCES, CUDA_SOURCES, HEADERS = (
    sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))
    for pattern in ("*.cpp", "*.cu", "*.h")
)
# The stable ABI of PyTorch 2.11: the library runs with this version and all later ones.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# For machines without a GPU: A100, RTX 30, H100, and by PTX all later ones.
DEFAULT_ARCHITECTURES = "8.0;8.6;9.0+PTX"
INSTALL = "pip install --no-build-isolation --no-deps -e ."


def read_version() -> str:
    """Return the package's version without importing it: torch may not be installed yet."""
    text = (ROOT / "tensormask" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('tensormask/__init__.py has no line __version__ = "..."')
    return match.group(1)


def is_on(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no", "off")


def extension() -> dict:
    """Return the arguments of `setup` for the compiled op; empty to build no op."""
    if is_on("TENSORMASK_WITHOUT_EXT"):
        return without_extension("TENSORMASK_WITHOUT_EXT is set")
    if not sys.platform.startswith("linux"):
        return without_extension(f"{sys.platform} is not supported")
    if {"sdist", "egg_info", "clean", "--version", "--name"} & set(sys.argv[1:]):
        return {}  # these compile nothing
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        sys.exit(
            f"tensormask: building the op needs PyTorch ({error}). By default pip builds in an "
            f"isolated environment, without your packages. Install torch first, then run\n"
            f"    {INSTALL}\n"
            "or set TENSORMASK_WITHOUT_EXT=1 to install without the compiled op."
        )
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 11):
        sys.exit(
            "tensormask: the compiled op needs PyTorch 2.11 or newer, this is "
            f"{torch.__version__}. Upgrade PyTorch, or set TENSORMASK_WITHOUT_EXT=1."
        )
    setuptools_version = tuple(int(part) for part in setuptools.__version__.split(".")[:2])
    if setuptools_version < (70, 1) and "build_ext" not in sys.argv:
        sys.exit(
            f"tensormask: setuptools {setuptools.__version__} cannot build wheels by itself. "
            "Run pip install 'setuptools>=77'."
        )
    cuda = wants_cuda(torch, cpp_extension.CUDA_HOME)
    flags = {"cxx": ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", STABLE_ABI]}
    sources = list(SOURCES)
    if cuda:
        sources += CUDA_SOURCES
        flags["nvcc"] = ["-O3", "-std=c++17", STABLE_ABI, "-DUSE_CUDA"]
    print(f"tensormask: compiling swap_align2nat for the CPU{' and CUDA' if cuda else ''}")
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    op = make(
        "tensormask._C",
        sources,
        depends=HEADERS,
        include_dirs=cuda_include_dirs(torch) if cuda else [],
        extra_compile_args=flags,
        py_limited_api=True,
    )
    return {
        "ext_modules": [op],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
        # No symbol of Python is used: one wheel serves every CPython from 3.10 on.
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def without_extension(reason: str) -> dict:
    print(f"tensormask: no compiled op: {reason}; swap_align2nat runs in plain PyTorch")
    return {}


def wants_cuda(torch, cuda_home: str | None) -> bool:
    """Return whether to build the CUDA kernels; set TORCH_CUDA_ARCH_LIST if there is no GPU."""
    forced, visible = is_on("FORCE_CUDA"), torch.cuda.is_available()
    if not forced and not visible:
        print("tensormask: PyTorch sees no GPU and FORCE_CUDA is not set: no CUDA kernels")
        return False
    if torch.version.cuda is None:
        sys.exit(
            f"tensormask: FORCE_CUDA is set, but PyTorch {torch.__version__} is built without "
            "CUDA. Install a PyTorch with CUDA, or unset FORCE_CUDA."
        )
    if cuda_home is None and not forced:
        print(
            "tensormask: PyTorch sees a GPU, but no CUDA toolkit (nvcc): no CUDA kernels. To build "
            "them, set CUDA_HOME to the toolkit and install again."
        )
        return False
    if cuda_home is None or not Path(cuda_home, "include", "cuda_runtime.h").is_file():
        standard = Path("/usr/local/cuda")
        exists = (standard / "include" / "cuda_runtime.h").is_file()
        sys.exit(
            f"tensormask: no CUDA toolkit in CUDA_HOME={cuda_home}: include/cuda_runtime.h is "
            "missing (PyTorch guesses a wrong folder if nvcc is a wrapper script). "
            f"Set CUDA_HOME={standard if exists else '/path/to/cuda'} and run again."
        )
    if not visible and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_ARCHITECTURES
        print(f"tensormask: PyTorch sees no GPU: TORCH_CUDA_ARCH_LIST={DEFAULT_ARCHITECTURES}")
    return True


def cuda_include_dirs(torch) -> list[str]:
    """Return folders of CUDA headers in PyTorch's packages: a small toolkit may lack them."""
    packages = Path(torch.__file__).parents[1] / "nvidia"
    return [str(path) for path in packages.glob("cu*/include")]


setup(
    name="tensormask",
    version=read_version(),
    description="TensorMask: dense sliding-window instance segmentation on today's PyTorch",
    license="Apache-2.0",
    packages=find_packages(include=["tensormask", "tensormask.*"]),
    package_data={"tensormask": ["py.typed"]},
    **extension(),
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11,<3",
        "torchvision>=0.26,<1",
        "numpy>=2,<3",
        "pycocotools>=2.0.8,<3",
        "fvcore>=0.1.5.post20221221,<0.2",
        "yacs>=0.1.8,<0.2",
        "PyYAML>=6.0,<7",
        # The headless build is the same cv2 without GUI windows. These need system libraries
        # (libGL, X11) that servers and containers lack.
        "opencv-python-headless>=4.9,<6",
        "pillow>=10,<14",
        "tensorboard>=2.16,<3",
        "tqdm>=4.66,<5",
        "safetensors>=0.5,<1",
        "pooch>=1.8.2,<2",
        # Used by pooch: since version 2, an incomplete download is an error.
        "urllib3>=2,<3",
    ],
)
