"""TensorMask: dense sliding-window instance segmentation (arXiv 1903.12174)."""

__version__ = "0.1.0"

from .config import get_cfg
from .engine.weights import load_weights
from .modeling import TensorMask, build_model
from .predictor import Predictor

__all__ = ["Predictor", "TensorMask", "build_model", "get_cfg", "load_weights"]
