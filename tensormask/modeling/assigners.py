"""Assigners that give an object more positive windows than the paper's `assignment.assign`.

All of them keep its rules 1 and 2: a positive window contains the object's box, and is not much
larger: a mask ends at the edges of its window. So they have no windows either for an object that is
larger than the largest window. Of a window that several objects claim, the nearest object is
positive, where the paper has background. Distances are between centers, in strides of the window's
level.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tensormask.modeling.assignment import Assignment, Claims, assign, find_claims
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError, unknown_name

Assigner = Callable[..., Assignment]  # from the arguments of `assign` to its result
ASSIGNERS = ("paper", "nearest", "atss")


def nearest_claims(claims: Claims) -> Claims:
    """Keep one claim for each window: of the nearest object, the smaller, the first."""
    order = claims.window.argsort(kind="stable")
    window = claims.window[order]
    same = window[1:] == window[:-1]
    contested = np.union1d(order[:-1][same], order[1:][same])
    # Few are: most of the time goes into sorting by several keys.
    keys = claims.owner, claims.area, claims.distance, claims.window
    ranked = contested[np.lexsort([key[contested] for key in keys])]
    window = claims.window[ranked]
    wins = np.ones(len(order), dtype=bool)
    wins[ranked[1:][window[1:] == window[:-1]]] = False
    return claims.select(wins)


def best_claims(claims: Claims, cost: np.ndarray, num: int) -> Claims:
    """Keep the ``num`` claims of the lowest costs (P,) of each object, of equal ones the first."""
    by_cost = cost.argsort(kind="stable").argsort()
    order = (claims.owner * len(cost) + by_cost).argsort()  # a third of the time of np.lexsort
    owner = claims.owner[order]
    rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
    return claims.select(order[rank < num])


@dataclass(frozen=True)
class NearestAssigner:
    """All windows within ``radius`` strides of an object are positive.

    Example:
        >>> box = torch.tensor([[36.0, 36.0, 44.0, 44.0]])  # its center is that of window (10, 10)
        >>> windows, grids = Windows((4,), ((44, 60),)), [(20, 20)]
        >>> [len(NearestAssigner(radius)([box], windows, grids).object) for radius in (1.0, 1.5)]
        [5, 9]
    """

    radius: float = 1.0

    @torch.compiler.disable
    def __call__(
        self, boxes_per_image: list[Tensor], windows: Windows, grids: list[tuple[int, int]]
    ) -> Assignment:
        """Assign as `assign`, with the same arguments."""
        claims = nearest_claims(find_claims(boxes_per_image, windows, grids, radius=self.radius))
        return claims.to_assignment(windows, len(boxes_per_image), boxes_per_image[0].device)


@dataclass(frozen=True)
class AtssAssigner:
    """The ``topk`` nearest windows of an object, of all levels and sizes, are positive.

    ATSS (arXiv 1912.02424) separates the anchors nearest to an object by the mean and deviation of
    their IoUs; windows contain the object, so that their IoUs are areas, the same for all of a
    level and size, and only the distance tells them apart. What remains of ATSS is that every
    object gets about the same number of positives: small ones, which one size of window fits, as
    many as those that three fit.

    Args:
        radius: windows up to this distance are candidates, and
        topk: also this number of nearest locations of each level, for each size. An object gets at
            most this number of positives; of equal distances, finer levels and smaller windows.
    """

    radius: float = 1.0
    topk: int = 9

    @torch.compiler.disable
    def __call__(
        self, boxes_per_image: list[Tensor], windows: Windows, grids: list[tuple[int, int]]
    ) -> Assignment:
        """Assign as `assign`, with the same arguments."""
        claims = find_claims(
            boxes_per_image, windows, grids, radius=self.radius, num_nearest=self.topk
        )
        claims = nearest_claims(claims)
        claims = best_claims(claims, claims.distance, self.topk)
        return claims.to_assignment(windows, len(boxes_per_image), boxes_per_image[0].device)


def make_assigner(name: str, radius: float = 1.0, topk: int = 9) -> Assigner:
    """Return the assigner of a config.

    Args:
        name: "paper" (`assign`), "nearest" or "atss".
        radius: of the windows around an object, in strides.
        topk: of "atss", the most positives of an object.

    Raises:
        UserError: the name is unknown, or a number is not positive.
    """
    if name not in ASSIGNERS:
        raise UserError(
            unknown_name("an assignment (MODEL.TENSOR_MASK.ASSIGNMENT)", name, ASSIGNERS)
        )
    if not 0 < radius < math.inf:
        raise UserError(
            "the radius of the assignment (MODEL.TENSOR_MASK.ASSIGN_RADIUS) must be above 0 and "
            f"finite, in strides, such as 1.5; got {radius}"
        )
    if topk < 1:
        raise UserError(
            "the positives of an object (MODEL.TENSOR_MASK.ASSIGN_TOPK) must be 1 or more, such as "
            f"9; got {topk}"
        )
    if name == "nearest":
        return NearestAssigner(radius)
    if name == "atss":
        return AtssAssigner(radius, topk)
    return assign if radius == 1 else functools.partial(assign, radius=radius)
