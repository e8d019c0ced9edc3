"""A trained model with the methods of the Hub: save_pretrained, from_pretrained, push_to_hub."""

import json
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path, PurePath
from typing import Any, Self

from huggingface_hub import ModelCard, PyTorchModelHubMixin

from tensormask.checkpoint.files import safetensors_bytes, split_weights
from tensormask.checkpoint.hub import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    describe,
    find_in_folder,
    find_on_hub,
)
from tensormask.checkpoint.trained import find_trained_model
from tensormask.checkpoint.zoo import MODELS, PACKAGED
from tensormask.config import CfgNode, get_cfg
from tensormask.engine.events import METRICS, flatten_results, read_metrics
from tensormask.engine.resume import BEST_CHECKPOINT, FINAL_EMA
from tensormask.hub.card import render_card
from tensormask.predictor import Predictor
from tensormask.utils.files import write_atomically


class PretrainedTensorMask(PyTorchModelHubMixin):
    """A trained `TensorMask`, its config, class names and threshold, and how good it is.

    The mixin's defaults are replaced: `from_pretrained` reads safetensors only, and never a pickle;
    the weights file has the config; the model card has AP and the commands to use the model.

    Args:
        source: a checkpoint, as of `Predictor`.
        results, license: as of `hub.save_pretrained`.

    Attributes:
        model: the `TensorMask`, in evaluation mode, on the CPU.
        description: the entries of a checkpoint beside the weights.
        results: AP in percent by names such as "segm/AP"; empty if it is not known.
    """

    def __init__(
        self,
        source: str | PathLike[str],
        *,
        results: Mapping[str, Any] | None = None,
        license: str | None = None,
    ) -> None:
        self.cfg, path, content = find_trained_model(source)
        if results is None:
            results = _recorded_results(path, content, self.cfg)
        self.results = {
            name: value
            for name, value in flatten_results(results).items()
            if isinstance(value, float | int) and math.isfinite(value)
        }
        self.license = license
        predictor = Predictor(self.cfg, path, "cpu")
        _remove_folders(self.cfg)
        self.model = predictor.model
        # `about` of the model that comes with the package.
        self.description = {key: content[key] for key in ("about",) if key in content}
        self.description |= {
            "class_names": predictor.class_names,
            "category_ids": predictor.category_ids,
            "config": self.cfg.dump(),
        }
        if predictor.score_threshold is not None:
            self.description["score_threshold"] = predictor.score_threshold
        stored, _ = split_weights(content, path)
        self._weights = {}
        for name, value in self.model.state_dict().items():
            # The numbers of the file can have less precision than those of the model.
            other = stored.get(name, value)
            is_same = other.shape == value.shape and bool((other.to(value.dtype) == value).all())
            self._weights[name] = (other if is_same else value).clone().contiguous()

    def _save_pretrained(self, save_directory: Path) -> None:
        data = safetensors_bytes(self._weights, self.description)
        write_atomically(save_directory / WEIGHTS_FILE, lambda file: file.write(data))
        text = json.dumps(describe(self.description), indent=2, ensure_ascii=False) + "\n"
        write_atomically(save_directory / CONFIG_FILE, lambda file: file.write(text.encode()))

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Self:
        if Path(model_id).is_dir():
            return cls(find_in_folder(model_id))
        return cls(find_on_hub(model_id, **options))

    def generate_model_card(self, source: str = "FOLDER") -> ModelCard:
        """Return the model card; `source` is what `--weights` takes."""
        return ModelCard(
            render_card(
                source,
                class_names=self.description["class_names"],
                test_sets=list(self.cfg.DATASETS.TEST),
                train_sets=list(self.cfg.DATASETS.TRAIN),
                results=self.results,
                threshold=self.description.get("score_threshold"),
                num_parameters=sum(p.numel() for p in self.model.parameters()),
                license=self.license,
            )
        )


def _recorded_results(path: Path, content: Mapping[str, Any], cfg: CfgNode) -> dict[str, Any]:
    """Return the results that are known of a checkpoint: of its run, or in the file."""
    measured = content.get("about", {}).get("measured", {}).get("val", {}).get("all")
    if measured is not None:  # by dev/model_card.py
        masks = {name: measured[name] for name in ("AP", "AP50", "AP75", "AP@400")}
        return {MODELS[PACKAGED].source: {"bbox": {"AP": measured["box AP"]}, "segm": masks}}
    is_averaged = path.name == FINAL_EMA or (
        path.name == BEST_CHECKPOINT and cfg.SOLVER.CHECKPOINT_BEST.startswith("ema/")
    )
    results: dict[str, Any] = {}
    for record in read_metrics(path.parent / METRICS):
        if record["iteration"] == content.get("iteration"):
            results |= {name: value for name, value in record.items() if "/" in name}
    own = {name for name in results if name.startswith("ema/") == is_averaged}
    return {name.removeprefix("ema/"): results[name] for name in results if name in own}


def _remove_folders(cfg: CfgNode) -> None:
    """Remove what a config says of the machine that it was used on."""
    default = get_cfg()
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = "", default.OUTPUT_DIR
    cfg.MODEL.DEVICE, cfg.MODEL.COMPILE = default.MODEL.DEVICE, default.MODEL.COMPILE
    for split in ("TRAIN", "TEST"):
        names = [
            "@".join(PurePath(part).name for part in name.split("@"))
            for name in cfg.DATASETS[split]
        ]
        cfg.DATASETS[split] = tuple(names)
