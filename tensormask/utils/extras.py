"""Packages that only some users need, the extras of the package, imported where they are used."""

import importlib
from typing import Any

from tensormask.utils.errors import UserError


def require(module: str, *, extra: str) -> Any:
    """Import and return a module of an optional package, such as `require("onnx", extra="export")`.

    Raises:
        UserError: its package is not installed; the message names the extra that has it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != package:
            raise  # the package is here, and another one that it needs is not
        raise UserError(
            f"this needs the package {package}: pip install 'tensormask[{extra}]'"
        ) from error
