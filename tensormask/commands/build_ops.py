"""Compile the operators for the installed PyTorch: `tensormask build-ops`.

It imports only PyTorch and torchvision, so it also runs in a clone on a bare machine.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from tensormask.commands import EXIT_MISTAKE
from tensormask.layers.build import PACKAGE, BuildError, build_library

# In a new process, because this one keeps what it has loaded.
CHECK = f"""
import sys
sys.path.insert(0, {str(PACKAGE.parent)!r})
from tensormask.layers import _native
print(_native.LIBRARY or _native.REASON)
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="tensormask build-ops",
        description="Compile the operators, which run in plain PyTorch otherwise. It needs Linux, "
        "a C++ compiler, and for the CUDA kernels a CUDA toolkit.",
        epilog="FORCE_CUDA=1 compiles the CUDA kernels on a machine without a GPU, "
        "TORCH_CUDA_ARCH_LIST chooses the GPUs, CUDA_HOME the toolkit, CXX the compiler, and "
        "MAX_JOBS the number of processes. Example: CUDA_HOME=/usr/local/cuda tensormask build-ops",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the library (default: the package's, or if it cannot be written, "
        "operators/ in the user's cache folder)",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2 if the operators cannot be compiled."""
    args = build_parser().parse_args(arguments)
    try:
        library = build_library(args.output)
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    print(f"compiled: {library}")
    if args.output is not None:
        return 0
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=True)
    if done.stdout.strip() == str(library):
        return 0
    print(f"error: the library is not used: {done.stdout.strip()}", file=sys.stderr)
    return EXIT_MISTAKE


if __name__ == "__main__":
    sys.exit(main())
