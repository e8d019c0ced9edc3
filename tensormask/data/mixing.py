"""Copy-paste: paste objects of one training image into another.

Simple copy-paste (Ghiasi et al., arXiv 2012.07177) without blending: both images are augmented
independently, and a random subset of the objects of the second is pasted at its place.
"""

from __future__ import annotations

import numpy as np
import torch

from tensormask.data.transforms import box_of_mask

Target = dict[str, torch.Tensor]


def copy_paste(
    image: np.ndarray,
    target: Target,
    source: np.ndarray,
    source_target: Target,
    rng: np.random.Generator,
) -> tuple[np.ndarray, Target]:
    """Paste each object of `source` into `image` with probability 1/2.

    The upper left corners of the images are aligned, and what is outside of `image` is cut off.
    Pixels of pasted objects are removed from the masks of others. Objects that lose pixels get the
    boxes of what is left of them, and those without a pixel are left out.

    Args:
        image: uint8 `(H, W, 3)`.
        target: `boxes (K, 4)` float32, `labels (K,)` int64, `masks (K, H, W)` bool.
        source, source_target: the same of the other image, of any size.
        rng: draws the subset.

    Returns:
        The image and its target, with the pasted objects at the end.
    """
    pasted = torch.from_numpy(rng.random(len(source_target["labels"])) < 0.5)
    source_target = _fit({key: value[pasted] for key, value in source_target.items()}, image)
    if not len(source_target["labels"]):
        return image, target
    covered = source_target["masks"].any(dim=0)
    image = image.copy()
    height, width = (min(sides) for sides in zip(image.shape[:2], source.shape[:2], strict=True))
    part = covered[:height, :width].numpy()
    image[:height, :width][part] = source[:height, :width][part]
    target = _keep_pixels(target, ~covered)
    return image, {key: torch.cat([target[key], source_target[key]]) for key in target}


def _fit(target: Target, image: np.ndarray) -> Target:
    """Cut or pad the masks at the right and bottom to the size of an image."""
    masks = target["masks"]
    size = image.shape[:2]
    if masks.shape[1:] == size:
        return target
    part = masks[:, : size[0], : size[1]]
    fitted = masks.new_zeros((len(masks), *size))
    fitted[:, : part.shape[1], : part.shape[2]] = part
    num_lost = masks.flatten(1).sum(dim=1) - part.flatten(1).sum(dim=1)
    return _update({**target, "masks": fitted}, num_lost > 0)


def _keep_pixels(target: Target, kept: torch.Tensor) -> Target:
    """Remove the pixels from the masks that are not `kept`, bool `(H, W)`."""
    masks = target["masks"] & kept
    changed = (masks != target["masks"]).flatten(1).any(dim=1)
    return _update({**target, "masks": masks}, changed)


def _update(target: Target, changed: torch.Tensor) -> Target:
    """Set the boxes of the changed objects from their masks, and leave out those without pixels."""
    boxes, included = target["boxes"].clone(), torch.ones_like(changed)
    for k in changed.nonzero().flatten().tolist():
        mask = target["masks"][k].numpy()
        included[k] = bool(mask.any())
        if included[k]:
            boxes[k] = torch.tensor(box_of_mask(mask), dtype=boxes.dtype)
    return {key: value[included] for key, value in {**target, "boxes": boxes}.items()}
