"""`Predictor`: images in, detections out."""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from os import PathLike
from typing import Any, TypedDict, Unpack, overload

import numpy as np
import torch

from tensormask.checkpoint.files import get_description
from tensormask.checkpoint.loading import check_complete, load_weights
from tensormask.checkpoint.trained import find_trained_model
from tensormask.config import CfgNode
from tensormask.data import get_dataset
from tensormask.data.augmentation import build_test_transform
from tensormask.data.checks.issues import Identity
from tensormask.data.classes import present_classes
from tensormask.data.geometry import transform_image
from tensormask.data.images import ImageError
from tensormask.data.large_images import LargeImage, open_large_image
from tensormask.data.transforms import image_to_tensor
from tensormask.detections import ClassChoice, Detections, check_limits, find_labels
from tensormask.engine.anomaly import check_weights
from tensormask.evaluation.seams import TileGrid, TileJoiner
from tensormask.evaluation.tta import build_augmented_detector
from tensormask.input_image import ImageInput, read_input
from tensormask.modeling import build_model
from tensormask.modeling.inference import paste_detection
from tensormask.modeling.inputs import padded_size, size_of
from tensormask.utils.errors import UserError
from tensormask.utils.memory import return_freed_memory
from tensormask.visualization.instances import class_name

logger = logging.getLogger(__name__)

_BATCHES_PER_TRIM = 8  # of tiles: it takes a tenth of the time of a tile


class CallOptions(TypedDict, total=False):
    """The options of a call of `Predictor`, which describes them."""

    threshold: float | None
    classes: ClassChoice | None
    max_detections: int | None
    class_agnostic_nms: bool | None
    channel_order: str
    batch_size: int


class Predictor:
    """Detect the objects in images with a trained model.

    ```python
    predictor = Predictor("output/quickstart/model_final.pth", threshold=0.5)
    detections = predictor("image.jpg")
    detections.save("drawing.png")
    ```

    Several threads can use one predictor.

    Args:
        cfg: a checkpoint of this library, by path or URL, a folder of `save_pretrained`,
            "hf://user/model" on the Hugging Face Hub, or the name of a model of the zoo, such as
            "tensormask_R_50_FPN_6x". With `weights`, a config: a tree, which is not
            changed, the path of a YAML file, or a name.
        weights: of a config: path, name or URL of a checkpoint (`downloads.resolve`); None
            takes MODEL.WEIGHTS.
        device: "cpu", "cuda:0", ...; None takes MODEL.DEVICE of a given config, and else the GPU
            if there is one.
        threshold, classes, max_detections, class_agnostic_nms: the defaults of each call.
        overrides: `[KEY, VALUE, ...]` of the config, as in `["INPUT.MIN_SIZE_TEST", 1200]`.

    Attributes:
        class_names: the name of each label: from the checkpoint, else from the first available
            data set of DATASETS.TEST and DATASETS.TRAIN with the model's number of classes, else
            "class 3" for the label 3.
        category_ids: the COCO category id of each label, from the same source; label + 1 if it has
            none.
        score_threshold: the threshold with the best F1 in the checkpoint's last evaluation, or
            None. It is applied only if it is given as `threshold`.

    Raises:
        UserError: an unknown name, no trained weights, no config, or weights that do not fit it
            or are not finite.
        FileNotFoundError: the checkpoint does not exist.
        OSError: the checkpoint could not be downloaded.
    """

    def __init__(
        self,
        cfg: CfgNode | str | PathLike[str],
        weights: str | PathLike[str] | None = None,
        device: str | torch.device | None = None,
        *,
        threshold: float | None = None,
        classes: ClassChoice | None = None,
        max_detections: int | None = None,
        class_agnostic_nms: bool | None = None,
        overrides: Sequence[Any] = (),
    ) -> None:
        cfg, path, content = find_trained_model(cfg, weights, overrides)
        if device is not None:
            cfg.MODEL.DEVICE = str(device)
        self.model = build_model(cfg).eval()
        check_complete(load_weights(self.model, path, content=content), path)
        check_weights(self.model, path)
        self.transform = build_test_transform(cfg)
        self._augmented = build_augmented_detector(cfg, self.model)
        self._num_detections: int = cfg.TEST.DETECTIONS_PER_IMAGE
        self._class_agnostic_nms: bool = cfg.TEST.CLASS_AGNOSTIC_NMS
        description = get_description(content)
        self.score_threshold: float | None = description.get("score_threshold")
        self.class_names, self.category_ids = _find_classes(cfg, description)
        self._defaults = self._options(threshold, classes, max_detections, class_agnostic_nms)

    @overload
    def __call__(self, image: ImageInput, **options: Unpack[CallOptions]) -> Detections: ...
    @overload
    def __call__(
        self, image: list[Any] | tuple[Any, ...], **options: Unpack[CallOptions]
    ) -> list[Detections]: ...
    @overload
    def __call__(
        self, image: Iterator[Any], **options: Unpack[CallOptions]
    ) -> Iterator[Detections]: ...

    def __call__(
        self,
        image: Any,
        *,
        threshold: float | None = None,
        classes: ClassChoice | None = None,
        max_detections: int | None = None,
        class_agnostic_nms: bool | None = None,
        channel_order: str = "RGB",
        batch_size: int = 4,
    ) -> Detections | list[Detections] | Iterator[Detections]:
        """Detect the objects in an image, in a list of images, or in those of an iterator.

        Args:
            image: a path, an http(s) URL or a PIL image, which are rotated by their EXIF
                orientation; an array or a tensor (`data.arrays.image_to_rgb`); a list or tuple of
                these; or an iterator over them.
            threshold: scores are above it; None takes the predictor's default, and without one
                MODEL.TENSOR_MASK.SCORE_THRESH_TEST.
            classes: names or labels; None: all. Applied before non-maximum suppression (NMS).
            max_detections: per image; None: TEST.DETECTIONS_PER_IMAGE.
            class_agnostic_nms: let detections of different classes suppress each other; None:
                TEST.CLASS_AGNOSTIC_NMS.
            channel_order: of arrays and tensors: "RGB", or "BGR" as of cv2.imread.
            batch_size: how many images of a list or iterator are in memory. Those of equal padded
                size go through the model together; the results are those of single images, up to
                rounding.

        Returns:
            `Detections`, in pixels of the upright image, on the model's device; for a list a list.
            For an iterator a generator, which reads `batch_size` images when it needs them.

        Raises:
            UserError: an image in memory or an option that is not valid.
            ImageError: a file does not exist or is not an image.
            OSError: an image could not be downloaded.
        """
        given = self._options(threshold, classes, max_detections, class_agnostic_nms)
        options = {**self._defaults, **given}
        if batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {batch_size}")
        if isinstance(image, list | tuple):
            return list(self._stream(iter(image), channel_order, batch_size, options))
        if isinstance(image, Iterator) and not hasattr(image, "read"):  # as files have
            return self._stream(image, channel_order, batch_size, options)
        (detections,) = self._detect([read_input(image, channel_order)], options)
        return detections

    def predict_tiled(
        self,
        image: Any,
        *,
        tile: int = 1024,
        overlap: int = 128,
        threshold: float | None = None,
        classes: ClassChoice | None = None,
        max_detections: int | None = None,
        class_agnostic_nms: bool | None = None,
        channel_order: str = "RGB",
        batch_size: int = 1,
        on_tiles: Callable[[int, int], object] | None = None,
    ) -> Detections:
        """Detect the objects in an image that is larger than memory, in overlapping tiles.

        Each tile is an image for the model: it is resized by INPUT.MIN_SIZE_TEST (0: not at all),
        and normalized, on its own. `evaluation.seams` says how detections are joined across tiles.

        Args:
            image: the path of a TIFF or .npy file, which is read by parts, or an array or
                `numpy.memmap`; other images, as of a call, are read whole; or a `LargeImage`.
            tile: side of the tiles in pixels. All have this size, or that of a smaller image.
            overlap: of neighboring tiles in pixels, at least. Objects that are not longer are whole
                in one tile; longer ones are joined from their parts.
            threshold, classes, max_detections, class_agnostic_nms: as of a call, per tile.
            channel_order: of arrays and tensors: "RGB" or "BGR".
            batch_size: tiles that go through the model together.
            on_tiles: called with the number of tiles that are done, and of all.

        Returns:
            `Detections` on the CPU, with `windows` and `window_masks` in place of `masks`.

        Raises:
            UserError: an image or an option that is not valid.
            ImageError: a file does not exist or is not an image.
        """
        given = self._options(threshold, classes, max_detections, class_agnostic_nms)
        options = {**self._defaults, **given}
        if batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {batch_size}")
        if isinstance(image, str) and "://" in image:
            image = read_input(image)
        is_open = isinstance(image, LargeImage)
        large = image if is_open else open_large_image(image, channel_order)
        grid = TileGrid(large.size, tile, overlap)
        agnostic = options.get("class_agnostic_nms", self._class_agnostic_nms)
        joiner = TileJoiner(grid, class_agnostic=agnostic)
        limit, num_full = options.get("num_detections", self._num_detections), 0
        for start in range(0, len(grid.tiles), batch_size):
            tiles = grid.tiles[start : start + batch_size]
            rgbs = [large.read(y0, y1, x0, x1) for x0, y0, x1, y1 in tiles]
            for number, detection in enumerate(self._detect_windows(rgbs, options), start):
                joiner.add(number, detection)
                num_full += len(detection["scores"]) >= limit
            if start // batch_size % _BATCHES_PER_TRIM == 0:
                return_freed_memory()  # the tensors of a tile leave gaps between detections
            if on_tiles is not None:
                on_tiles(start + len(tiles), len(grid.tiles))
        if num_full:
            logger.warning(
                "%s: %d of %d tiles have the maximum of %d detections: set max_detections or "
                "TEST.DETECTIONS_PER_IMAGE higher, or take smaller tiles",
                *(large.name, num_full, len(grid.tiles), limit),
            )
        return self._as_detections(joiner.join(), large.size, large)

    def _options(
        self,
        threshold: float | None,
        classes: ClassChoice | None,
        max_detections: int | None,
        class_agnostic_nms: bool | None,
    ) -> dict[str, Any]:
        """Return the options that are not None, checked, as arguments of `TensorMask.detect`."""
        check_limits(threshold, max_detections)
        options = {
            "score_threshold": threshold,
            "classes": None if classes is None else find_labels(classes, self.class_names),
            "num_detections": max_detections,
            "class_agnostic_nms": class_agnostic_nms,
        }
        return {name: value for name, value in options.items() if value is not None}

    def _stream(
        self, images: Iterator[Any], channel_order: str, batch_size: int, options: dict[str, Any]
    ) -> Iterator[Detections]:
        start = 0
        while batch := list(islice(images, batch_size)):
            rgbs = []
            for number, image in enumerate(batch, start):
                try:
                    rgbs.append(read_input(image, channel_order))
                except ImageError:  # names its file
                    raise
                except UserError as error:
                    raise UserError(f"image {number} (counted from 0): {error}") from None
            start += len(batch)
            yield from self._detect(rgbs, options)

    def _detect(self, rgbs: list[np.ndarray], options: dict[str, Any]) -> list[Detections]:
        detected = self._detect_windows(rgbs, options)
        return [self._pasted(*pair) for pair in zip(detected, rgbs, strict=True)]

    def _detect_windows(
        self, rgbs: list[np.ndarray], options: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Return the results of `TensorMask.detect` in pixels of the images."""
        inputs, sizes = [], [rgb.shape[:2] for rgb in rgbs]
        rows_by_size: dict[tuple[int, int], list[int]] = {}
        for row, (rgb, size) in enumerate(zip(rgbs, sizes, strict=True)):
            # The test transform has a single size and no flip: the generator has no influence.
            geometry = self.transform.draw(size, np.random.default_rng(0))
            inputs.append(image_to_tensor(transform_image(rgb, geometry)))
            # Padding changes the borders of an image: those of another padded size go separately.
            rows_by_size.setdefault(
                padded_size(*size_of(inputs[-1]), self.model.size_divisor), []
            ).append(row)
        found: dict[int, dict[str, Any]] = {}
        for rows in rows_by_size.values():
            with torch.inference_mode():
                detected = (self._augmented or self.model.detect)(
                    [inputs[row] for row in rows], [sizes[row] for row in rows], **options
                )
            found.update(zip(rows, detected, strict=True))
        return [found[row] for row in range(len(rgbs))]

    def _pasted(self, detection: dict[str, Any], rgb: np.ndarray) -> Detections:
        size = rgb.shape[:2]
        # Outside of the inference mode, for tensors that can be changed in place.
        with torch.no_grad():
            pasted = paste_detection(detection, size)
            fields = {
                name: value.clone() if value.is_inference() else value
                for name, value in pasted.items()
            }
        return self._as_detections(fields, size, rgb)

    def _as_detections(
        self, fields: dict[str, Any], size: tuple[int, int], image: np.ndarray | LargeImage
    ) -> Detections:
        return Detections(
            fields,
            size=size,
            all_class_names=self.class_names,
            category_ids=self.category_ids,
            image=image,
        )


def _find_classes(cfg: CfgNode, stored: dict[str, Any]) -> tuple[list[str], list[Identity]]:
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
            return present_classes(dataset)
    return [class_name(label, None) for label in range(num_classes)], numbered
