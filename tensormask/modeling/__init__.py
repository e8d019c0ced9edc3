"""The model. `build_model` makes it from a config; `TensorMask` and its parts work without one."""

from tensormask.modeling.build import build_model
from tensormask.modeling.tensormask import TensorMask

__all__ = ["TensorMask", "build_model"]
