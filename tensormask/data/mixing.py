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
    chosen = torch.from_numpy(rng.random(len(source_target["labels"])) < 0.5)
    pasted = _fit({key: value[chosen] for key, value in source_target.items()}, image.shape[:2])
    if not len(pasted["labels"]):
        return image, target
    covered = np.logical_or.reduce(pasted["masks"].numpy(), axis=0)
    mixed = image.copy()
    height, width = (min(sides) for sides in zip(image.shape[:2], source.shape[:2], strict=True))
    part = covered[:height, :width]
    mixed[:height, :width][part] = source[:height, :width][part]

    result = {key: torch.cat([target[key], pasted[key]]) for key in target}
    masks = result["masks"].numpy()
    changed = np.zeros(len(masks), dtype=bool)
    changed[: len(target["labels"])] = (target["masks"].numpy() & covered).any(axis=(1, 2))
    masks[changed] &= ~covered
    return mixed, _update(result, changed)


def _fit(target: Target, size: tuple[int, ...]) -> Target:
    """Cut or pad the masks at the right and bottom to `size` (height, width)."""
    masks = target["masks"]
    if masks.shape[1:] == size:
        return target
    part = masks[:, : size[0], : size[1]]
    fitted = masks.new_zeros((len(masks), *size))
    fitted[:, : part.shape[1], : part.shape[2]] = part
    lost = masks.flatten(1).sum(dim=1) != part.flatten(1).sum(dim=1)
    return _update({**target, "masks": fitted}, lost.numpy())


def _update(target: Target, changed: np.ndarray) -> Target:
    """Set the boxes of the changed objects from their masks, and leave out those without pixels."""
    boxes, masks = target["boxes"].clone(), target["masks"].numpy()
    included = np.ones(len(masks), dtype=bool)
    for k in np.flatnonzero(changed):
        included[k] = masks[k].any()
        if included[k]:
            boxes[k] = torch.tensor(box_of_mask(masks[k]), dtype=boxes.dtype)
    target = {**target, "boxes": boxes}
    if included.all():
        return target
    return {key: value[torch.from_numpy(included)] for key, value in target.items()}
