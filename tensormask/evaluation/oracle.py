"""Oracle AP: the upper bound that the windows and the resolution of their masks set.

The ground truth takes the path of a perfect detector's output: the mask of each object is cropped
to its windows at their mask size, pasted back into the image, and scored by COCO's evaluation.
Training cannot recover what this loses.
"""

from collections.abc import Callable
from itertools import chain, zip_longest
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from tensormask.data import CocoDataset
from tensormask.data.augmentation import Augmentation
from tensormask.data.classes import present_classes
from tensormask.data.transforms import transform_annotations
from tensormask.evaluation.evaluators import PYCOCOTOOLS
from tensormask.evaluation.results import Detections, coco_results
from tensormask.evaluation.scoring import Metrics, evaluate_results
from tensormask.layers import crop_masks, paste_regions
from tensormask.modeling import TensorMask
from tensormask.utils.errors import UserError


def evaluate_oracle(
    model: TensorMask,
    dataset: CocoDataset,
    transform: Augmentation,
    *,
    max_dets: int = 100,
    evaluator: str = PYCOCOTOOLS,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[Any], list[Any]] = lambda results: [results],
) -> dict[str, Metrics]:
    """Score the ground-truth masks of a data set as the model's windows represent them.

    Several processes take `image_ids[rank::world_size]` each; all of them must call this function.

    Args:
        model: only its windows, its assigner and the mask sizes of its head are used, not its
            weights.
        transform: the resize before inference.
        max_dets, evaluator, rank, gather: as of `evaluate`.
        world_size: the number of processes.

    Returns:
        ``{"segm": metrics}`` as of `evaluate_results`; `{}` above rank 0.
    """
    rng = np.random.default_rng(0)  # unused: the transform at test time is deterministic
    results = []  # per image
    for image_id in dataset.image_ids[rank::world_size]:
        size = dataset.image_size(image_id)
        annotations = dataset.training_annotations(image_id)
        labels = [dataset.label_of(annotation) for annotation in annotations]
        geometry = transform.draw(size, rng)
        target, _ = transform_annotations(annotations, labels, geometry)
        detections = oracle_detections(model, target, geometry.output_size, size)
        results.append(coco_results(detections, image_id, dataset.category_ids, size))
    by_rank = gather(results)
    if rank > 0:
        return {}
    in_order = chain.from_iterable(zip_longest(*by_rank, fillvalue=[]))
    class_names, category_ids = present_classes(dataset)
    return evaluate_results(
        dataset.to_coco(),
        list(chain.from_iterable(in_order)),
        class_names,
        category_ids=category_ids,
        image_ids=dataset.image_ids,
        iou_types=("segm",),
        max_dets=max_dets,
        evaluator=evaluator,
    )


@torch.no_grad()
def oracle_detections(
    model: TensorMask,
    target: dict[str, Tensor],
    input_size: tuple[int, int],
    output_size: tuple[int, int],
) -> Detections:
    """Return the objects of an image, each with its mask in the window that represents it best.

    Args:
        model: as of `evaluate_oracle`.
        target: ``boxes``, ``labels`` and ``masks`` of the image at ``input_size``, on the CPU.
        input_size, output_size: ``(height, width)`` of the network's input and of the image that
            the detections are for.

    Returns:
        detections as of `TensorMask.detect`, with scores of 1; without the objects that no window
        is assigned to.

    Raises:
        ValueError: the model has no mask head.
    """
    if model.mask_head is None:
        raise UserError("the oracle needs a model with masks; set MODEL.MASK_ON to True")
    matched = model.criterion.assign([target["boxes"]], model.windows.grids(input_size))
    lambdas = torch.tensor(model.mask_head.lambdas)
    sides = lambdas[matched.level] * torch.tensor(model.windows.mask_sizes)[matched.size]
    objects = matched.object.unique()
    rows, window_masks = [], []  # of the best windows
    for index in objects.tolist():
        mask, candidates = target["masks"][index].bool(), torch.where(matched.object == index)[0]
        windows = matched.boxes[candidates]
        crops = _crop_to_windows(mask, windows, sides[candidates].tolist())
        ious = _ious_of_crops(mask, crops, windows)
        best = ious.index(max(ious))
        rows.append(int(candidates[best]))
        window_masks.append(crops[best])
    scale = torch.tensor(output_size[::-1] * 2) / torch.tensor(input_size[::-1] * 2)
    return {
        "boxes": target["boxes"][objects] * scale,
        "scores": torch.ones(len(objects)),
        "labels": target["labels"][objects],
        "windows": matched.boxes[rows] * scale,
        "window_masks": window_masks,
    }


def _crop_to_windows(mask: Tensor, windows: Tensor, sides: list[int]) -> list[Tensor]:
    """Crop a mask (H, W) to each window as `crop_masks` does, as floats.

    Where a mask pixel is a block of whole image pixels, these are counted: it is much faster.
    """
    # ROIAlign repeats the border of the image once.
    padded = np.pad(mask.byte().numpy(), 1, mode="edge")
    left, top, width, height = cv2.boundingRect(padded)
    width, height = max(width, 1), max(height, 1)  # OpenCV refuses an empty array.
    sums = cv2.integral(padded[top : top + height, left : left + width])
    crops = []
    for window, side in zip(windows, sides, strict=True):
        x0, y0, x1, _ = map(int, window.tolist())
        block = (x1 - x0) // side
        if window.tolist() == [x0, y0, x0 + side * block, y0 + side * block]:
            edges = block * np.arange(side + 1) + 1
            at = np.ix_((y0 - top + edges).clip(0, height), (x0 - left + edges).clip(0, width))
            num_pixels = np.diff(np.diff(sums[at], axis=0), axis=1)
            crop = torch.from_numpy(2 * num_pixels >= block**2)
        else:
            (crop,) = crop_masks(mask[None], torch.tensor([0]), window[None], side)
        crops.append(crop.float())
    return crops


def _ious_of_crops(mask: Tensor, crops: list[Tensor], windows: Tensor) -> list[float]:
    """Return the IoU of a mask (H, W) with each of its crops, pasted back into the image."""
    height, width = mask.shape
    area, ious = mask.sum(), []
    for x0, y0, region in paste_regions(crops, windows, (height, width)):
        overlap = (mask[y0 : y0 + region.shape[0], x0 : x0 + region.shape[1]] & region).sum()
        union = area + region.sum() - overlap  # The area includes pixels outside of the region.
        ious.append(float(overlap / union.clamp(min=1)))
    return ious
