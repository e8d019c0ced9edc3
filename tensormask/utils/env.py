"""Versions, devices and the operators in use, for bug reports: `tensormask env`."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tensormask.layers import _native

_PACKAGES = (
    "tensormask", "torch", "torchvision", "numpy", "pycocotools", "opencv-python-headless",
    "pillow", "fvcore", "yacs",
)  # fmt: skip


def describe() -> str:
    """Return versions, devices and the operators in use, one per line."""
    rows = [("python", f"{sys.version.split()[0]} on {platform.platform()}")]
    rows += [(name, _version(name)) for name in _PACKAGES]
    rows += [
        ("threads", str(torch.get_num_threads())),
        ("CUDA of torch", torch.version.cuda or "none"),
        *((f"GPU {i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())),
        ("operators", str(_native.LIBRARY or "plain PyTorch")),
    ]
    has_cuda = torch.cuda.is_available() or "cuda" in _native.DEVICES
    devices = ("cpu", "cuda") if has_cuda else ("cpu",)
    rows += [(f"  on {device}", _native.describe(device)) for device in devices]
    rows.append(("  TENSORMASK_OP", os.environ.get("TENSORMASK_OP", "auto (not set)")))
    return "\n".join(f"{name:<24} {text}" for name, text in rows)


def describe_machine() -> dict[str, Any]:
    """Return what times depend on: processor, threads, GPU and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    cpus = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": cpus[0] if cpus else platform.machine(),
        "num_cpus": len(cpus),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(describe())
