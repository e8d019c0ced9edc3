"""TensorMask: dense sliding-window instance segmentation (arXiv 1903.12174).

The public names are imported when they are first used: `import tensormask` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensormask.checkpoint.loading import load_weights
    from tensormask.config import get_cfg
    from tensormask.detections import Detections
    from tensormask.engine.evaluator import evaluate_only as evaluate
    from tensormask.engine.trainer import train
    from tensormask.hub import from_pretrained, push_to_hub, save_pretrained
    from tensormask.model_zoo import build
    from tensormask.modeling import TensorMask, build_model
    from tensormask.predictor import Predictor

__version__ = "0.1.0"

__all__ = [
    "Detections",
    "Predictor",
    "TensorMask",
    "build",
    "build_model",
    "evaluate",
    "from_pretrained",
    "get_cfg",
    "load_weights",
    "push_to_hub",
    "save_pretrained",
    "train",
]

_MODULES = {
    "Detections": "detections",
    "Predictor": "predictor",
    "TensorMask": "modeling",
    "build": "model_zoo",
    "build_model": "modeling",
    "evaluate": "engine.evaluator",
    "from_pretrained": "hub",
    "get_cfg": "config",
    "load_weights": "checkpoint.loading",
    "push_to_hub": "hub",
    "save_pretrained": "hub",
    "train": "engine.trainer",
}
_OTHER_NAMES = {"evaluate": "evaluate_only"}


def __getattr__(name: str) -> Any:
    """Import a public name, or a module such as `tensormask.layers`, and keep it."""
    if name in _MODULES:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
        globals()[name] = value = getattr(module, _OTHER_NAMES.get(name, name))
        return value
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
