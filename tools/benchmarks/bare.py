"""The op on a machine that has PyTorch and nothing else: for `make gpu-check`."""

import importlib
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def prepare() -> None:
    """Makes `tensormask.layers.swap_align2nat` importable, by the packages' paths alone if need be.

    The packages themselves import the rest of the library, which needs torchvision, yacs, ...
    """
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        importlib.import_module("tensormask.layers")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tensormask") or error.name == "torch":
            raise
        for name in ("tensormask", "tensormask.layers"):
            package = types.ModuleType(name)
            package.__path__ = [str(ROOT.joinpath(*name.split(".")))]
            sys.modules[name] = package
