"""Oracle AP: what the windows can represent at best.

The true masks go the way of a perfect detector's: each object to the windows that own it, its mask
cropped to the mask size of the window, pasted back into the image, and scored by COCO's
evaluation. What is lost is lost to the sliding windows and the resolution of their masks, and no
training brings it back.
"""

import numpy as np
import torch
from torch import Tensor

from tensormask.data import CocoDataset
from tensormask.data.transforms import Augmentation, transform_annotations
from tensormask.evaluation.results import coco_results
from tensormask.evaluation.scoring import Metrics, evaluate_results
from tensormask.layers import crop_masks, paste_masks
from tensormask.modeling import TensorMask
from tensormask.modeling.assignment import assign


def evaluate_oracle(
    model: TensorMask, dataset: CocoDataset, transform: Augmentation, *, max_dets: int = 100
) -> dict[str, Metrics]:
    """Score the true masks of a data set as the model's windows see them.

    Args:
        model: its windows and mask head say which windows there are and how fine their masks.
        transform: the resize before inference.
        max_dets: as of `evaluate`.

    Returns:
        ``{"segm": metrics}`` as of `evaluate_results`.
    """
    rng = np.random.default_rng(0)  # nothing is random at test time
    results = []
    for image_id in dataset.image_ids:
        size = dataset.image_size(image_id)
        annotations = dataset.training_annotations(image_id)
        labels = [dataset.label_of(annotation) for annotation in annotations]
        geometry = transform.draw(size, rng)
        target, _ = transform_annotations(annotations, labels, geometry)
        if len(target["labels"]):
            detections = oracle_detections(model, target, geometry.new_size, size)
            results += coco_results(detections, image_id, dataset.category_ids)
    return evaluate_results(
        dataset.to_coco(),
        results,
        dataset.class_names,
        category_ids=dataset.category_ids,
        image_ids=dataset.image_ids,
        iou_types=("segm",),
        max_dets=max_dets,
    )


@torch.no_grad()
def oracle_detections(
    model: TensorMask,
    target: dict[str, Tensor],
    input_size: tuple[int, int],
    output_size: tuple[int, int],
) -> dict[str, Tensor]:
    """The objects of an image that a window owns, as the window that shows each best has it.

    Args:
        model: its windows and mask head say which windows there are and how fine their masks.
        target: ``boxes``, ``labels`` and ``masks`` of the image at ``input_size``, on the CPU.
        input_size, output_size: ``(height, width)`` of the network's input and of the wanted masks.

    Returns:
        a detection with scores of 1; objects that no window owns are not in it.
    """
    grids = model.windows.grids(input_size)
    owned = assign([target["boxes"]], model.windows, grids)
    best: dict[
        int, tuple[float, Tensor, Tensor]
    ] = {}  # object -> IoU, its mask in the window, the window
    for level, size, at in owned.groups():
        side = model.windows.mask_sizes[size] * model.mask_head.lambdas[level]
        objects, windows = owned.object[at], owned.boxes[at]
        masks = crop_masks(target["masks"], objects, windows, side).float()
        for k, mask, window in zip(objects.tolist(), masks, windows, strict=True):
            seen = paste_masks(mask[None], window[None], input_size)[0]
            iou = _iou(seen, target["masks"][k])
            if k not in best or iou > best[k][0]:
                best[k] = (iou, mask, window)

    scale = torch.tensor(output_size[::-1] * 2) / torch.tensor(input_size[::-1] * 2)
    found = sorted(best)
    pasted = [
        paste_masks(mask[None], (window * scale)[None], output_size)
        for _, mask, window in (best[k] for k in found)
    ]
    return {
        "boxes": target["boxes"][found] * scale,
        "scores": torch.ones(len(found)),
        "labels": target["labels"][found],
        "masks": torch.cat([torch.zeros(0, *output_size, dtype=torch.bool), *pasted]),
    }


def _iou(a: Tensor, b: Tensor) -> float:
    return float((a & b).sum() / (a | b).sum().clamp(min=1))
