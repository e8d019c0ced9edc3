"""Versions, devices and the compiled op: `python -m tensormask.utils.env`, for bug reports."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from tensormask.layers import _native

_PACKAGES = (
    "tensormask", "torch", "torchvision", "numpy", "pycocotools", "opencv-python-headless",
    "pillow", "fvcore", "yacs",
)  # fmt: skip


def describe() -> str:
    """Return versions, devices and the state of the compiled op, one per line, for bug reports."""
    rows = [("python", f"{sys.version.split()[0]} on {platform.platform()}")]
    rows += [(name, _version(name)) for name in _PACKAGES]
    rows += [
        ("threads", str(torch.get_num_threads())),
        ("CUDA of torch", torch.version.cuda or "none"),
        *((f"GPU {i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())),
        ("swap_align2nat", str(_native.LIBRARY or "plain PyTorch")),
    ]
    rows += [(f"  on {device}", _native.describe(device)) for device in ("cpu", "cuda")]
    rows.append(("  TENSORMASK_OP", os.environ.get("TENSORMASK_OP", "auto (not set)")))
    return "\n".join(f"{name:<24} {text}" for name, text in rows)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(describe())
