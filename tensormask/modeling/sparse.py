"""Inference with the finest level computed only where something reads it.

With a `query.Query`, the coarser levels are computed first. Their query says where the finest level
has candidates: its features, class logits and, on a GPU, deltas are computed there, and its mask
features where the windows of the detections read them. `cells` does it, with results that equal
those of the whole level up to rounding. Where that takes longer, the whole level is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tensormask.layers.masks import to_device
from tensormask.layers.norm import LevelTower
from tensormask.layers.plain import PlainLayer, is_plain, plain_tower
from tensormask.modeling.cells import Cells, are_faster, as_rows, convolve_cells, dilate
from tensormask.modeling.fpn import FPN
from tensormask.modeling.head import ClassBoxHead, DenseOutputs, apply_tower
from tensormask.modeling.mask_head import MaskHead

# Of the features of the finest level. Where more are needed at once, it is likely that the masks
# need the rest, too, and in two parts they take longer.
_MAX_FEATURES = 0.4


class Finest:
    """The features of the finest level of a batch, computed on demand.

    Args:
        fpn: of the model.
        x, above: as of `FPN.finest`.
    """

    def __init__(self, fpn: FPN, x: Tensor, above: Tensor | None) -> None:
        self.fpn, self.x, self.above = fpn, x, above
        self.computed = torch.zeros(len(x), *x.shape[2:], dtype=torch.bool)
        self.features: Tensor | None = None
        self.all_asked = False  # by the query: then results have the bits of a model without one

    def compute(self, wanted: Tensor | None = None) -> Tensor:
        """Return the features (N, C, H, W), with zeros where they have never been wanted.

        Args:
            wanted: bool (N, H, W), on the CPU; None for all locations.
        """
        missing = ~self.computed if wanted is None else wanted & ~self.computed
        if not missing.any() and self.features is not None:
            return self.features
        layers = self.fpn.plain_output()
        if layers is not None and are_faster(layers, missing, self.x.device, _MAX_FEATURES):
            found = self.fpn.finest_at(self.x, self.above, missing)
            if found is not None:
                if self.features is None:
                    self.features = _zeros(found[0], found[1])
                scatter(*found, missing, self.features)
                self.computed |= missing
                return self.features
        self.features = self.fpn.finest(self.x, self.above)
        self.computed.fill_(True)
        return self.features


def finds_sparsely(fpn: nn.Module, head: nn.Module) -> bool:
    """Return whether `find_sparsely` can take the place of these parts."""
    return (
        is_plain(fpn, FPN)
        and is_plain(head, ClassBoxHead)
        and getattr(head, "query", None) is not None
        and fpn._compiled_call_impl is None
        and not torch.is_grad_enabled()
    )


def find_sparsely(
    fpn: FPN, head: ClassBoxHead, features: list[Tensor], *, dense_boxes: bool, whole: bool
) -> tuple[DenseOutputs, Finest]:
    """Return the outputs of `ClassBoxHead.forward` in eval mode, and what computes the features.

    The features of the finest level are 0 where they have not been read. The host waits for a GPU
    once, for the locations that the query asks for.

    Args:
        features: of the backbone, fine to coarse.
        dense_boxes: whether to compute deltas.
        whole: compute all features of the finest level.
    """
    assert head.query is not None
    pyramid, above = fpn.coarse(features)
    logits: list[Tensor] = []
    towers: list[Tensor | None] = []
    for level, x in enumerate(pyramid, 1):
        logits_of_level, tower = head.classes(x, level)
        logits.append(logits_of_level)
        towers.append(tower)
    query = head.query_logits(towers)
    finest = Finest(fpn, features[fpn.first - fpn.first_in], above)
    asked = head.query.asked(query, finest.x.shape[2:]).cpu()
    finest.all_asked = bool(asked.all())
    if whole:
        finest.compute()
    logits.insert(0, _logits(head, finest, asked))
    deltas = None
    if head.with_boxes and dense_boxes:
        deltas = [head.deltas(x, level) for level, x in enumerate(pyramid, 1)]
        deltas.insert(0, _deltas(head, finest, asked))
    if finest.features is None:
        finest.compute(asked & False)
    assert finest.features is not None
    return DenseOutputs([finest.features, *pyramid], logits, deltas, query), finest


def _logits(head: ClassBoxHead, finest: Finest, asked: Tensor) -> Tensor:
    """Return the class logits of the finest level, -inf where they are not asked for."""
    layers = head.plain_class_tower(0)
    if layers is not None and are_faster(layers, asked, finest.x.device):
        return _at(layers, finest, asked, -math.inf)
    logits, _ = head.classes(finest.compute(), 0)
    asked = to_device(asked, logits.device)
    return logits.where(asked[:, None], -math.inf)


def _deltas(head: ClassBoxHead, finest: Finest, asked: Tensor) -> Tensor:
    """Return the deltas of the finest level, 0 where they are not asked for if that is faster."""
    layers = head.plain_box_tower(0)
    if layers is not None and are_faster(layers, asked, finest.x.device):
        return _at(layers, finest, asked, 0.0)
    return head.deltas(finest.compute(), 0)


def mask_features(
    mask_head: MaskHead, finest: Finest, groups: Sequence[tuple[int, int, Tensor]]
) -> Tensor:
    """Return the mask tower's features of the finest level, where the windows of groups read them.

    Args:
        groups: of `MaskHead.forward`, for a tensor bipyramid; on the CPU.
    """
    reads = torch.zeros_like(finest.computed)
    n, boxes = mask_head.boxes_read(groups)
    for image, (y0, x0, y1, x1) in zip(n.tolist(), boxes.clamp(min=0).tolist(), strict=True):
        reads[image, y0 : y1 + 1, x0 : x1 + 1] = True
    reads = dilate(reads, 1)  # of `mask_fuse`
    tower = mask_head.mask_subnet
    plain = is_plain(tower, nn.Sequential, LevelTower) and type(tower[-1]) is nn.ReLU
    layers = plain_tower([*tower], 0) if plain else None
    if layers is None or not are_faster(layers, reads, finest.x.device):
        return apply_tower(tower, finest.compute(), 0)
    return torch.relu_(_at(layers, finest, reads, 0.0))


def _at(layers: list[PlainLayer], finest: Finest, wanted: Tensor, rest: float) -> Tensor:
    """Return the results of layers at chosen locations as a feature map, and ``rest`` elsewhere."""
    features = finest.compute(dilate(wanted, len(layers)))
    rows, cells = convolve_cells(layers, as_rows(features), wanted)
    return scatter(rows, cells, wanted, _zeros(rows, cells).fill_(rest))


def _zeros(rows: Tensor, cells: Cells) -> Tensor:
    num, height, width = cells.size
    return rows.new_zeros(num, height, width, rows.shape[1]).permute(0, 3, 1, 2)


def scatter(rows: Tensor, cells: Cells, wanted: Tensor, x: Tensor) -> Tensor:
    """Write the results of `convolve_cells` at the chosen locations of ``x``, in channels_last."""
    at = cells.locations().flatten()
    chosen = torch.where((at >= 0) & wanted.flatten()[at])[0]
    chosen, at = to_device(torch.stack([chosen, at[chosen]]), rows.device)
    as_rows(x).index_copy_(0, at, rows[chosen].to(x.dtype))
    return x
