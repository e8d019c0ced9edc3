"""Assigners that give an object more positive windows than the paper's `assignment.assign`.

All of them keep its rules 1 and 2: a positive window contains the object's box, and is not much
larger. A window that several objects claim is positive for the nearest of them, where the paper has
background. Distances are between centers, in strides of the window's level.
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

Assigner = Callable[[list[Tensor], Windows, list[tuple[int, int]]], Assignment]
ASSIGNERS = ("paper", "nearest")


def nearest_claims(claims: Claims) -> Claims:
    """Keep one claim for each window: of the nearest object, the smaller, the first."""
    order = np.lexsort((claims.owner, claims.area, claims.distance, claims.window))
    window = claims.window[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = window[1:] != window[:-1]
    return claims.select(order[first])


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


def build_assigner(name: str, radius: float = 1.0) -> Assigner:
    """Return the assigner of a config.

    Args:
        name: "paper" (`assign`) or "nearest".
        radius: of the windows around an object, in strides.

    Raises:
        UserError: the name is unknown, or the radius is not positive.
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
    if name == "paper":
        return assign if radius == 1 else functools.partial(assign, radius=radius)
    return NearestAssigner(radius)
