"""TensorMask: dense sliding-window instance segmentation (arXiv 1903.12174)."""

__version__ = "0.1.0"

from tensormask.checkpoint.loading import load_weights
from tensormask.config import get_cfg
from tensormask.modeling import TensorMask, build_model
from tensormask.predictor import Predictor

__all__ = ["Predictor", "TensorMask", "build_model", "get_cfg", "load_weights"]
