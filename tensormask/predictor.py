"""An image in, detections out."""

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tensormask.checkpoint.files import read_description
from tensormask.checkpoint.loading import check_complete, load_weights
from tensormask.config import CfgNode, get_cfg
from tensormask.data import get_dataset
from tensormask.data.images import read_image
from tensormask.data.transforms import build_test_transform, image_to_tensor, transform_image
from tensormask.model_zoo import resolve
from tensormask.modeling import build_model
from tensormask.utils.errors import UserError
from tensormask.visualization.instances import class_name

ImageInput = str | PathLike[str] | Image.Image | np.ndarray


class Predictor:
    """A model with its weights, called on one image at a time.

    ```python
    predictor = Predictor("configs/quickstart.yaml", "output/quickstart/model_final.pth")
    detections = predictor("image.jpg")
    ```

    Args:
        cfg: a config, or the path of a YAML file on top of the defaults. It is not changed.
        weights: path of a checkpoint, or a name or address for `model_zoo.resolve`; None takes
            MODEL.WEIGHTS.
        device: "cpu", "cuda:0", ...; None takes MODEL.DEVICE.

    Attributes:
        class_names: the name of each label: from the checkpoint, else from the first data set of
            DATASETS.TEST and DATASETS.TRAIN that is there and has as many classes as the model,
            else "class 3" for the label 3.
        category_ids: the COCO category id of each label, from the same place; labels + 1 where it
            has none.

    Raises:
        ValueError: no weights are named, or they leave a part of the model at random.
        FileNotFoundError: there is no such config or checkpoint.
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
        check_complete(load_weights(self.model, weights), weights)
        self.transform = build_test_transform(cfg)
        self.class_names, self.category_ids = _find_classes(cfg, weights)

    def __call__(self, image: ImageInput) -> dict[str, Any]:
        """Detects the objects in an image.

        Args:
            image: a path, which is read upright as its EXIF data says; or a PIL image or a
                uint8 RGB array `(H, W, 3)`, which are taken as they lie.

        Returns:
            In pixels of the image, best first: `boxes (K, 4)` float xyxy, `scores (K,)`,
            `labels (K,)` int64 from 0 and, if the model has a mask head, `masks (K, H, W)` bool, on
            the model's device; `class_names`, a list of K str.

        Raises:
            ValueError: an array of another form.
            ImageError: a file that is missing or no image (a ValueError).
        """
        rgb = _to_rgb(image)
        size = rgb.shape[:2]
        # The test transform has one size only and no flip: nothing of it is random.
        geometry = self.transform.draw(size, np.random.default_rng(0))
        network_input = image_to_tensor(transform_image(rgb, geometry))
        with torch.inference_mode():
            (detections,) = self.model([network_input], output_sizes=[size])
        names = [class_name(label, self.class_names) for label in detections["labels"].tolist()]
        return {**detections, "class_names": names}


def _read_config(cfg: CfgNode | str | PathLike[str]) -> CfgNode:
    """An own copy that can be changed."""
    if not isinstance(cfg, CfgNode):
        path, cfg = cfg, get_cfg()
        cfg.merge_from_file(str(path))
    cfg = cfg.clone()
    cfg.defrost()
    return cfg


def _find_classes(cfg: CfgNode, weights: Path) -> tuple[list[str], list[int]]:
    """`class_names` and `category_ids` of a `Predictor`."""
    num_classes = cfg.MODEL.TENSOR_MASK.NUM_CLASSES
    numbered = list(range(1, num_classes + 1))
    stored = read_description(weights)
    names, category_ids = stored.get("class_names", []), stored.get("category_ids", numbered)
    if len(names) == num_classes:
        return list(names), list(category_ids)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        try:
            dataset = get_dataset(name)
        except (OSError, ValueError):  # weights are often used far from their data
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
            "an image as an array is uint8 RGB (H, W, 3); "
            f"given {image.dtype} of shape {image.shape}"
        )
    return image
