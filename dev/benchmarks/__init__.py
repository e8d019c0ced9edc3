"""The subcommands of `dev/benchmark.py`, one module each, and what they share.

A module has a docstring of one line, `add_arguments(parser)`, and `run(args)`, which prints
tables and returns what `--json` writes. Importing this package makes `tensormask` importable on a
machine that lacks some of its packages: without OpenCV or pycocotools the model and the solver
still work, and without torchvision the operators do.
"""

import importlib
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
for _name in ("tensormask", "tensormask.layers"):
    try:
        importlib.import_module(_name)
    except ImportError as error:  # also of OpenCV without its system libraries
        if (error.name or "").startswith("tensormask") or error.name == "torch":
            raise
        _package = types.ModuleType(_name)  # its `__init__`, which imports everything, is not run
        _package.__path__ = [str(ROOT.joinpath(*_name.split(".")))]
        sys.modules[_name] = _package
