"""Models on the Hugging Face Hub: `from_pretrained`, `save_pretrained` and `push_to_hub`.

Loading from a folder needs nothing more; the rest needs the extra `hub`. The class behind them is
`hub.mixin.PretrainedTensorMask`, a `huggingface_hub.PyTorchModelHubMixin`.
"""

import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from tensormask.checkpoint.downloads import resolve
from tensormask.checkpoint.hub import find_on_hub
from tensormask.modeling import TensorMask
from tensormask.predictor import Predictor
from tensormask.utils.errors import UserError
from tensormask.utils.extras import require
from tensormask.utils.files import expand_home

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]


def from_pretrained(
    source: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    device: str | torch.device | None = None,
    overrides: Sequence[Any] = (),
) -> TensorMask:
    """Return a trained model from the Hub or from a folder of `save_pretrained`, to predict with.

    `Predictor("hf://user/model")` has the class names and the threshold too, and reads images.

    Args:
        source: a folder or a checkpoint, or "user/model" (also "user/model@revision" and
            "hf://user/model").
        revision: a branch, a tag or a commit; None: that of the name, or the default branch.
        token: of the Hub; None: the one of `hf auth login` or HF_TOKEN.
        device, overrides: as of `Predictor`.

    Returns:
        A model in evaluation mode.

    Raises:
        UserError: there is no such model, or it is not of this library.
        OSError: the download failed.
    """
    name = expand_home(source)
    if os.path.exists(name):
        path = resolve(name)
    else:
        path = find_on_hub(name.removeprefix("hf://"), revision=revision, token=token)
    return Predictor(path, device=device, overrides=overrides).model


def save_pretrained(
    source: str | PathLike[str],
    folder: str | PathLike[str],
    *,
    results: Mapping[str, Any] | None = None,
    license: str | None = None,
) -> Path:
    """Write a trained model into a folder in the Hub's layout.

    The files are `model.safetensors` with the weights in the precision of the source, its config,
    class names and threshold; `config.json`, a copy of the latter for people; and `README.md`, the
    model card, if the folder has none. Folders of the machine are removed from the config.

    Args:
        source: a checkpoint, as of `Predictor`.
        folder: made if needed; `tensormask predict --weights FOLDER` reads it.
        results: of `evaluate` or `train`, for the card. None: those in the `metrics.json` beside
            the checkpoint, of its iteration.
        license: an identifier of the Hub, such as "apache-2.0". None: none is named.

    Returns:
        The folder.

    Raises:
        UserError: huggingface_hub is not installed, or the checkpoint is not complete.
    """
    folder = Path(expand_home(folder))
    card = {"source": folder.resolve().name}
    _pretrained(source, results, license).save_pretrained(folder, model_card_kwargs=card)
    return folder


def push_to_hub(
    source: str | PathLike[str],
    name: str,
    *,
    results: Mapping[str, Any] | None = None,
    license: str | None = None,
    private: bool | None = None,
    **options: Any,
) -> str:
    """Upload a trained model to the Hub, where the repository is made if needed.

    Args:
        source, results, license: as of `save_pretrained`.
        name: "user/model".
        private: of a new repository; None: the default of the user or organization.
        options: of `PyTorchModelHubMixin.push_to_hub`, such as `token`, `branch`, `create_pr`,
            `commit_message`, and `ignore_patterns="README.md"`, which keeps a card that was edited.

    Returns:
        The URL of the commit.

    Raises:
        UserError: as `save_pretrained`, or an invalid name.
        OSError: the Hub cannot be reached, or refuses the upload.
    """
    errors = require("huggingface_hub.errors", extra="hub")
    if name.count("/") != 1:
        raise UserError(f"a model on the Hub is named user/model, not {name!r}")
    options |= {"private": private, "model_card_kwargs": {"source": f"hf://{name}"}}
    try:
        return str(_pretrained(source, results, license).push_to_hub(name, **options))
    except errors.HFValidationError as error:
        raise UserError(f"{name!r} is not the name of a model, user/model: {error}") from None


def _pretrained(
    source: str | PathLike[str], results: Mapping[str, Any] | None, license: str | None
) -> Any:
    require("huggingface_hub", extra="hub")
    from tensormask.hub.mixin import PretrainedTensorMask

    return PretrainedTensorMask(source, results=results, license=license)
