"""Models in the layout of the Hugging Face Hub: a local folder, or `hf://user/model`.

`model.safetensors` is complete: its metadata has the config, the class names and the threshold.
`config.json` is a copy of these for people and for the Hub. Nothing but safetensors is read.
"""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from tensormask.checkpoint.files import get_description, read_metadata
from tensormask.utils.errors import UserError
from tensormask.utils.extras import require
from tensormask.utils.files import expand_home

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

logger = logging.getLogger(__name__)


def find_in_folder(folder: str | PathLike[str]) -> Path:
    """Return the path of the weights in a folder of `save_pretrained`.

    Raises:
        UserError: they are not there, or not of this library.
    """
    path = Path(expand_home(folder)) / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} is a folder without {WEIGHTS_FILE}: give a folder of save_pretrained, or a "
            f"checkpoint, such as {folder}/model_final.pth"
        )
    _check(path, path)
    return path


def find_on_hub(name: str, **options: Any) -> Path:
    """Return the local path of the weights of a model on the Hub, downloaded if needed.

    The files are in the cache of huggingface_hub, which its environment variables control:
    HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE.

    Args:
        name: "user/model", or "user/model@revision" with a branch, a tag or a commit.
        options: of `huggingface_hub.hf_hub_download`, such as `token`; a `revision` of None is that
            of the name.

    Raises:
        UserError: huggingface_hub is not installed, the name is invalid, there is no such model, it
            may not be read, or it is not of this library.
        OSError: the download failed.
    """
    hub = require("huggingface_hub", extra="hub")
    errors = require("huggingface_hub.errors", extra="hub")
    name, _, named_revision = name.rstrip("/").partition("@")
    options["revision"] = options.get("revision") or named_revision or None
    at = f" at revision {options['revision']}" if options["revision"] else ""
    try:
        path = Path(hub.hf_hub_download(name, WEIGHTS_FILE, library_name="tensormask", **options))
        with suppress(errors.EntryNotFoundError):
            hub.hf_hub_download(name, CONFIG_FILE, library_name="tensormask", **options)
    except errors.HFValidationError as error:
        raise UserError(f"{name!r} is not the name of a model, user/model: {error}") from None
    except errors.GatedRepoError:
        raise UserError(
            f"the Hub gives {name} only to users with access: ask for it on the model's page, and "
            "log in with `hf auth login`, or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"there is no model {name} on the Hub, or it is private: check the name, and log in "
            "with `hf auth login`, or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"the model {name} on the Hub has no revision {options['revision']}"
        ) from None
    except errors.RemoteEntryNotFoundError:
        raise UserError(
            f"the model {name} on the Hub{at} has no {WEIGHTS_FILE}: it is not of tensormask, "
            "whose push_to_hub writes this file; no other format is read from there"
        ) from None
    except OSError as error:  # also of the offline mode
        reason = str(error).strip().partition("\n")[0]
        if hub.constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set, and it is not in the cache"
        raise OSError(f"{name}{at} could not be read from the Hub: {reason}") from None
    _check(path, f"the model {name} on the Hub{at}")
    return path


def describe(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `config.json` from the description of a checkpoint."""
    config = yaml.safe_load(description.get("config", ""))
    others = {k: value for k, value in description.items() if k not in ("config", "about")}
    return json.loads(json.dumps({"library_name": "tensormask", **others, "config": config}))


def _check(path: Path, source: object) -> None:
    """Check that a file is of `save_pretrained`, and warn if its `config.json` was edited.

    Args:
        source: the name of the model in messages.

    Raises:
        UserError: it is not.
    """
    try:
        description = get_description(read_metadata(path))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    if "config" not in description:
        raise UserError(
            f"{source} is not of tensormask: it has no config in its metadata, where "
            "save_pretrained and push_to_hub write it"
        )
    try:
        edited = json.loads(path.with_name(CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # a copy that nothing else reads
        return
    expected = describe(description)
    if edited != expected:
        logger.warning(
            "%s: %s differs from the config in %s, which is the one that is used: give overrides, "
            "or save the model again",
            *(source, CONFIG_FILE, WEIGHTS_FILE),
        )
