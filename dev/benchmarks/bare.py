"""Parts of the library on a machine that has not all it needs: for `make gpu-check`."""

import importlib
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def prepare() -> None:
    """Makes the library importable, its packages by their paths alone if need be.

    `tensormask` itself imports all the rest, which needs OpenCV, TensorBoard, ...: without these,
    the model and the solver are there. Without torchvision the op is.
    """
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    for name in ("tensormask", "tensormask.layers"):
        try:
            importlib.import_module(name)
        except ImportError as error:  # also of OpenCV without its system libraries
            if (error.name or "").startswith("tensormask") or error.name == "torch":
                raise
            package = types.ModuleType(name)
            package.__path__ = [str(ROOT.joinpath(*name.split(".")))]
            sys.modules[name] = package
