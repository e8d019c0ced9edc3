"""A coarse level says where the finest one is worth computing (QueryDet, arXiv 2103.09136).

A location of the second level (p3) covers 2x2 locations of the finest (p2). The query scores it by
whether one of their windows is positive. Where the score is not above a threshold, the windows of
p2 are no candidates, and need not be computed.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormask.layers.winograd import Conv2d
from tensormask.modeling.assignment import Assignment
from tensormask.modeling.losses import focal_loss_star
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError


class Query(nn.Module):
    """Score the locations of the second level, from the class towers of one or two levels.

    The weights are drawn from a copy of the random state, so that those of the other parts are the
    same with and without a query.

    Args:
        channels: of the class tower.
        num_levels: 1, the second level alone; or 2, with the third, whose logits are added to those
            of the locations that it covers.
        prior: the initial score.
        threshold: that of ``given_threshold``.

    Attributes:
        threshold: float32 scalar, stored with the weights: scores of locations to compute are above
            it. 0 at first: all of them.
        given_threshold: used instead of it, unless None.

    Example:
        >>> Query(16)([torch.zeros(1, 16, 8, 8)]).shape
        torch.Size([1, 1, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        num_levels: int = 1,
        *,
        prior: float = 0.01,
        threshold: float | None = None,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.convs = nn.ModuleList(Conv2d(channels, 1, 3, padding=1) for _ in range(num_levels))
            for conv in self.convs:
                nn.init.normal_(conv.get_parameter("weight"), std=0.01)
                nn.init.zeros_(conv.get_parameter("bias"))
        nn.init.constant_(self.convs[0].get_parameter("bias"), -math.log((1 - prior) / prior))
        self.register_buffer("threshold", torch.tensor(0.0))
        self.given_threshold = threshold

    threshold: Tensor

    @property
    def num_levels(self) -> int:
        return len(self.convs)

    def forward(self, towers: Sequence[Tensor]) -> Tensor:
        """Return the logits (N, 1, H, W) of the second level, from the features of the towers."""
        logits, *coarser = (conv(x) for conv, x in zip(self.convs, towers, strict=True))
        for x in coarser:
            up = F.interpolate(x, scale_factor=2.0, mode="nearest")
            logits = logits + up[:, :, : logits.shape[2], : logits.shape[3]]
        return logits

    def asked(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """Return which locations of the finest level to compute: bool (N, rows, columns).

        Args:
            logits: of the query, (N, 1, H, W).
            size: rows and columns of the finest level.
        """
        given = self.given_threshold
        threshold = self.threshold if given is None else given
        asked = (logits[:, 0].float().sigmoid() > threshold) | (threshold <= 0)
        asked = asked.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        return asked[:, : size[0], : size[1]]


def num_query_levels(names: Sequence[str], windows: Windows, norm: str) -> int:
    """Return the number of levels of a `Query`.

    Args:
        names: of the levels, ("p3",) or ("p3", "p4").
        norm: of the towers.

    Raises:
        UserError: they are not the second level, or the second and third; or the norm is not local,
            so that the towers cannot be computed in a part of the finest level.
    """
    levels = windows.level_names[1:3]
    if list(names) != levels[: len(names)]:
        raise UserError(
            "MODEL.TENSOR_MASK.QUERY_LEVELS must be the level above the finest, or the two above "
            f"it, such as {levels}, got {list(names)}"
        )
    if norm == "GN":
        raise UserError(
            "MODEL.TENSOR_MASK.QUERY_ON computes parts of the finest level, but the norm of the "
            "towers, MODEL.TENSOR_MASK.NORM 'GN', needs all of it: set it to '', 'LN' or 'BN'"
        )
    return len(names)


def query_targets(assignment: Assignment) -> Tensor:
    """Return the positive locations (3, P) of the second level: image, row and column.

    Those with a positive window on the finest level: the maximum over 2x2 locations and all sizes.
    """
    finest = assignment.levels()[0]
    n, y, x = (column[finest] for column in (assignment.image, assignment.y, assignment.x))
    return torch.stack([n, y // 2, x // 2]).unique(dim=1)


def query_loss(logits: Tensor, positives: Tensor) -> Tensor:
    """Return FL* of the query, summed over locations.

    The classes' loss has the same form, constants and divisor, so that the query counts like one
    more class of a level, and its loss needs no weight.

    Args:
        logits: (N, 1, H, W).
        positives: of `query_targets`, on the device of the logits.
    """
    n, y, x = positives
    return focal_loss_star([logits], [(n, torch.zeros_like(n), y, x)])
