"""`Predictor`: an image in, detections out."""

from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image

from tensormask.checkpoint.downloads import resolve
from tensormask.checkpoint.files import get_description, read_checkpoint
from tensormask.checkpoint.loading import check_complete, load_weights
from tensormask.config import CfgNode, get_cfg
from tensormask.data import get_dataset
from tensormask.data.checks.issues import Identity
from tensormask.data.images import read_image
from tensormask.data.transforms import build_test_transform, image_to_tensor, transform_image
from tensormask.modeling import build_model
from tensormask.utils.errors import UserError
from tensormask.visualization.instances import class_name

ImageInput = str | PathLike[str] | Image.Image | np.ndarray


class Predictor:
    """Detect the objects in single images with a trained model.

    ```python
    predictor = Predictor("configs/quickstart.yaml", "output/quickstart/model_final.pth")
    detections = predictor("image.jpg")
    ```

    Args:
        cfg: a config, or the path of a YAML file. It is not changed.
        weights: path of a checkpoint, or a name or address for `downloads.resolve`; None takes
            MODEL.WEIGHTS.
        device: "cpu", "cuda:0", ...; None takes MODEL.DEVICE.

    Attributes:
        class_names: the name of each label: from the checkpoint, else from the first available
            data set of DATASETS.TEST and DATASETS.TRAIN with the model's number of classes, else
            "class 3" for the label 3.
        category_ids: the COCO category id of each label, from the same source; label + 1 if it has
            none.

    Raises:
        UserError: no weights are given, or the file lacks some of the model's parameters.
        FileNotFoundError: the config or the checkpoint does not exist.
        OSError: the checkpoint could not be downloaded.
    """

    def __init__(
        self,
        cfg: CfgNode | str | PathLike[str],
        weights: str | PathLike[str] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        cfg = _read_config(cfg)
        if device is not None:
            cfg.MODEL.DEVICE = str(device)
        weights = weights or cfg.MODEL.WEIGHTS
        if not weights:
            raise UserError(
                "a predictor needs trained weights: give the path of a checkpoint as `weights`, "
                "or set MODEL.WEIGHTS in the config"
            )
        self.model = build_model(cfg).eval()
        weights = resolve(weights)
        content = read_checkpoint(weights)
        check_complete(load_weights(self.model, weights, content=content), weights)
        self.transform = build_test_transform(cfg)
        self.class_names, self.category_ids = _find_classes(cfg, get_description(content))

    def __call__(self, image: ImageInput) -> dict[str, Any]:
        """Detect the objects in an image.

        Args:
            image: a path, whose EXIF orientation is applied; or a PIL image or a uint8 RGB array
                `(H, W, 3)`, which are not rotated.

        Returns:
            In pixels of the image, sorted by score: `boxes (K, 4)` float xyxy, `scores (K,)`,
            `labels (K,)` int64 from 0 and, if the model has a mask head, `masks (K, H, W)` bool, on
            the model's device; `class_names`, a list of K str.

        Raises:
            UserError: an array of another dtype or shape.
            ImageError: the file does not exist or is not an image.
        """
        rgb = _to_rgb(image)
        size = rgb.shape[:2]
        # The test transform has a single size and no flip: it does not depend on the generator.
        geometry = self.transform.draw(size, np.random.default_rng(0))
        network_input = image_to_tensor(transform_image(rgb, geometry))
        with torch.inference_mode():
            (detections,) = self.model([network_input], output_sizes=[size])
        names = [class_name(label, self.class_names) for label in detections["labels"].tolist()]
        return {**detections, "class_names": names}


def _read_config(cfg: CfgNode | str | PathLike[str]) -> CfgNode:
    """Return a copy that is not frozen."""
    if isinstance(cfg, CfgNode):
        copy = cfg.clone()
        copy.defrost()
        return copy
    read = get_cfg()
    read.merge_from_file(str(cfg))
    return read


def _find_classes(cfg: CfgNode, stored: dict[str, list]) -> tuple[list[str], list[Identity]]:
    """Return `class_names` and `category_ids` of a `Predictor`."""
    num_classes = cfg.MODEL.TENSOR_MASK.NUM_CLASSES
    numbered: list[Identity] = list(range(1, num_classes + 1))
    names, category_ids = stored.get("class_names", []), stored.get("category_ids", numbered)
    if len(names) == num_classes:
        return list(names), list(category_ids)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        try:
            dataset = get_dataset(name)
        except (OSError, ValueError):  # weights are often used without their data
            continue
        if len(dataset.class_names) == num_classes:
            return list(dataset.class_names), list(dataset.category_ids)
    return [class_name(label, None) for label in range(num_classes)], numbered


def _to_rgb(image: ImageInput) -> np.ndarray:
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if not isinstance(image, np.ndarray):
        return read_image(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(
            "an image as an array must be uint8 RGB (H, W, 3); "
            f"given {image.dtype} of shape {image.shape}"
        )
    return image
