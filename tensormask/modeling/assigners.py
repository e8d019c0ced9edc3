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

from tensormask.layers.masks import to_device
from tensormask.modeling.assignment import Assignment, Claims, assign, find_claims
from tensormask.modeling.box_coder import decode_boxes
from tensormask.modeling.box_losses import box_ious
from tensormask.modeling.head import ClassBoxHead, DenseOutputs
from tensormask.modeling.windows import Windows
from tensormask.utils.errors import UserError, unknown_name

# From the arguments of `assign` to its result. One whose attribute `needs_predictions` is True also
# gets the keyword `predictions`.
Assigner = Callable[..., Assignment]
# From image, level, size, y, x and object (row in the targets of its image), int64 (K,) each, on
# the CPU, to the scores for the objects' classes and the IoUs of the boxes with theirs, (K,) each.
Predictions = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
ASSIGNERS = ("paper", "nearest", "atss", "aligned")
# Exponents of the score and the IoU in the alignment (TOOD).
_ALPHA, _BETA = 1, 6


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


@dataclass(frozen=True)
class AlignedAssigner:
    """Of the windows within ``radius``, the ``topk`` with the best predictions are positive.

    TOOD (arXiv 2108.07755) ranks by ``score * IoU ** 6``, and starts with ATSS until predictions
    mean something. Here the rank is ``exp(-(distance / radius) ** 2)`` times the alignment to the
    power of a trust in 0..1, which grows by itself: it is the share of the IoU missing to a window
    that the predicted boxes have gained, in the object's best window. In the beginning boxes equal
    their windows, the trust is 0, and the nearest windows are positive.

    Args:
        radius: in strides.
        topk: an object gets at most this number of positives. If few windows are within the radius,
            all of them are positive, as with `NearestAssigner`.
    """

    radius: float = 1.0
    topk: int = 9
    needs_predictions = True  # the criterion passes them

    @torch.compiler.disable
    def __call__(
        self,
        boxes_per_image: list[Tensor],
        windows: Windows,
        grids: list[tuple[int, int]],
        *,
        predictions: Predictions | None = None,
    ) -> Assignment:
        """Assign as `assign`, with the same arguments; without predictions, by distance only."""
        claims = nearest_claims(find_claims(boxes_per_image, windows, grids, radius=self.radius))
        cost = claims.distance / np.float32(self.radius**2)
        if predictions is not None and len(cost):
            cost -= self._log_alignment(claims, windows, predictions)
        claims = best_claims(claims, cost, self.topk)
        return claims.to_assignment(windows, len(boxes_per_image), boxes_per_image[0].device)

    def _log_alignment(
        self, claims: Claims, windows: Windows, predictions: Predictions
    ) -> np.ndarray:
        """Return the logarithm of the alignment, times the trust, (P,)."""
        image, obj, level, size, y, x = torch.from_numpy(np.stack(claims[:6]))
        outputs = predictions(image, level, size, y, x, obj)
        score, iou = (output.float().numpy(force=True).clip(1e-6, 1) for output in outputs)
        sides = np.array(windows.sizes, dtype=np.float32)[claims.level, claims.size]
        of_window = claims.area / sides**2
        gain = ((iou - of_window) / (1 - of_window + 1e-6)).clip(0, 1)
        first = np.flatnonzero(np.diff(claims.owner, prepend=-1))  # claims are ordered by object
        trust = np.maximum.reduceat(gain, first).repeat(np.diff(first, append=len(gain)))
        return trust * (_ALPHA * np.log(score) + _BETA * np.log(iou))


def make_assigner(name: str, radius: float = 1.0, topk: int = 9) -> Assigner:
    """Return the assigner of a config.

    Args:
        name: "paper" (`assign`), "nearest", "atss" or "aligned".
        radius: of the windows around an object, in strides.
        topk: of the last two, the most positives of an object.

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
    if name == "aligned":
        return AlignedAssigner(radius, topk)
    return assign if radius == 1 else functools.partial(assign, radius=radius)


def predictions_of(
    dense: DenseOutputs,
    head: ClassBoxHead,
    windows: Windows,
    targets: list[dict[str, Tensor]],
    box_weights: tuple[float, ...],
) -> Predictions:
    """Return the function that looks up a model's predictions for candidates, without gradient.

    Args:
        dense: of a batch.
        targets: its ``boxes`` and ``labels``, on the CPU.
        box_weights: of `box_coder`.
    """
    boxes = torch.cat([target["boxes"] for target in targets])
    labels = torch.cat([target["labels"] for target in targets])
    first = torch.tensor([0, *(len(target["boxes"]) for target in targets)]).cumsum(0)

    @torch.no_grad()
    def predict(
        image: Tensor, level: Tensor, size: Tensor, y: Tensor, x: Tensor, object: Tensor
    ) -> tuple[Tensor, Tensor]:
        owner = first[image] + object
        indices = torch.stack([image, size * head.num_classes + labels[owner], size, y, x])
        rows_per_level = [torch.where(level == k)[0] for k in range(windows.num_levels)]
        outputs = []
        for k, rows in enumerate(rows_per_level):
            n, channel, s, v, u = to_device(indices[:, rows], dense.logits[k].device)
            logits = dense.logits[k][n, channel, v, u]
            deltas = head.deltas_at(dense, k, n, s, v, u)
            outputs.append(torch.cat([logits[:, None].float(), deltas.float()], dim=1))
        result = torch.empty(len(level), 5)
        result[torch.cat(rows_per_level)] = torch.cat(outputs).cpu()
        decoded = decode_boxes(result[:, 1:], windows.boxes(level, size, y, x), box_weights)
        return result[:, 0].sigmoid(), box_ious(decoded, boxes[owner])

    return predict
