"""Training with a part of the finest level's background.

Most windows of the finest level are background that the model knows already. With a query, the
class loss there is computed for the locations with positive windows, for those that the query takes
for such ones, and for a random sample of the others in square blocks. The sum over the blocks that
are drawn counts as many times as there are blocks for one drawn, so that its expectation over the
draws, and that of its gradients, is the sum over all of them: an unbiased estimate of the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tensormask.layers.masks import to_device
from tensormask.modeling.assignment import Assignment
from tensormask.modeling.cells import are_faster, as_rows, convolve_cells
from tensormask.modeling.head import ClassBoxHead, DenseOutputs
from tensormask.modeling.query import query_targets

# Side of a block, in locations: borders make its cells 1.6 times as many.
_BLOCK = 32
# Scores of the query above it are computed.
_MIN_SCORE = 0.05


class Sample(NamedTuple):
    """Class logits of a part of the finest level, in rows of locations."""

    certain: Tensor  # (R, num_sizes * num_classes), of the locations that are always computed
    drawn: Tensor  # (D, num_sizes * num_classes), of those of random blocks
    factor: float  # of the loss of the latter
    row: Tensor  # int64 (N * H * W,), the row of a location in `certain`
    size: tuple[int, int]  # H, W

    def rows_of(self, positives: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return the index in `certain` of logits with an index (image, channel, y, x)."""
        n, channel, y, x = positives
        return self.row[(n * self.size[0] + y) * self.size[1] + x], channel


def sampled_outputs(
    head: ClassBoxHead, features: list[Tensor], assignment: Assignment, share: float
) -> DenseOutputs | None:
    """Return the outputs of `ClassBoxHead.forward` with a sample of the finest level's logits.

    Its logits are then zeros, and those of the sample in ``sample``. None if that takes longer.
    The host waits for a GPU once, for the locations that the query asks for.

    Args:
        features: of the pyramid.
        assignment: of the batch; on the CPU.
        share: of the blocks of the finest level that are drawn.
    """
    layers = head.plain_class_tower(0)
    if layers is None:
        return None
    outputs = [head.classes(x, level) for level, x in enumerate(features[1:], 1)]
    query = head.query_logits([tower for _, tower in outputs])
    finest = features[0]
    num, _, height, width = finest.shape
    chosen = (query.detach()[:, 0].float().sigmoid() > _MIN_SCORE).cpu()
    chosen[tuple(query_targets(assignment))] = True
    chosen = chosen.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :height, :width]
    drawn, factor = draw_blocks((num, height, width), share)
    wanted = chosen | drawn
    if not are_faster(layers, wanted, finest.device):
        return None
    rows, cells = head._call(convolve_cells, layers, as_rows(finest), wanted)
    at = cells.locations().flatten()
    inside = at >= 0
    certain = torch.where(inside & chosen.flatten()[at])[0]
    random = torch.where(inside & (drawn & ~chosen).flatten()[at])[0]
    row = torch.zeros(num * height * width, dtype=torch.int64)
    row[at[certain]] = torch.arange(len(certain))
    certain, random, row = (to_device(x, finest.device) for x in (certain, random, row))
    sample = Sample(rows[certain], rows[random], factor, row, (height, width))
    placeholder = rows.new_zeros(1).expand(num, rows.shape[1], height, width)
    logits = [placeholder, *(of_level for of_level, _ in outputs)]
    return DenseOutputs(features, logits, None, query, sample)


def draw_blocks(size: tuple[int, int, int], share: float) -> tuple[Tensor, float]:
    """Draw a share of the blocks of a feature map (N, H, W), at least one, without replacement.

    Returns:
        - bool (N, H, W), on the CPU;
        - the number of all blocks over that of the drawn ones.
    """
    num, height, width = size
    rows, columns = -(-height // _BLOCK), -(-width // _BLOCK)
    total = num * rows * columns
    count = max(1, round(share * total))
    blocks = torch.zeros(total, dtype=torch.bool)
    blocks[torch.randperm(total)[:count]] = True
    drawn = blocks.view(num, rows, columns)
    drawn = drawn.repeat_interleave(_BLOCK, 1).repeat_interleave(_BLOCK, 2)
    return drawn[:, :height, :width], total / count
