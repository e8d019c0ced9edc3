"""Class and box heads: two towers of convolutions, shared over the levels (paper, sec. 5.2)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tensormask.layers.masks import to_device
from tensormask.layers.winograd import Conv2d
from tensormask.modeling.tiles import convolve_at
from tensormask.utils.errors import UserError


def conv_tower(in_channels: int, channels: int, num_convs: int) -> nn.Sequential:
    """``num_convs`` 3x3 convolutions, a ReLU after each."""
    layers: list[nn.Module] = []
    for _ in range(num_convs):
        layers += [Conv2d(in_channels, channels, 3, padding=1), nn.ReLU(inplace=True)]
        in_channels = channels
    return nn.Sequential(*layers)


def init_convs(module: nn.Module, init: str) -> None:
    """Set every convolution: "normal" is std 0.01, "he" keeps the signal in narrow towers."""
    if init not in ("normal", "he"):
        raise UserError(f"init must be 'normal' or 'he', got {init!r}")
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            if init == "he":
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            else:
                nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)


def call(function: Callable[..., Tensor], *inputs: Any, checkpointed: bool) -> Tensor:
    """``function(*inputs)``; if ``checkpointed``, the backward pass computes it once more."""
    if checkpointed and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


class ClassBoxHead(nn.Module):
    """Scores each window for each class and, unless told otherwise, regresses a box from it.

    Args:
        in_channels: channels of the pyramid.
        num_sizes: windows at each place.
        num_classes: classes, background not counted.
        with_boxes: whether there is a box head; without one, boxes are those of the masks.
        cls_channels, bbox_channels: channels of the towers.
        num_convs: convolutions in each tower.
        init: "normal" or "he", for the towers; the last convolutions are normal with std 0.01.
        checkpointed: keep no activations of the towers for the backward pass: see `call`.
        prior: the score that every window starts at.
    """

    def __init__(
        self,
        in_channels: int,
        num_sizes: int,
        num_classes: int,
        *,
        with_boxes: bool = True,
        cls_channels: int = 256,
        bbox_channels: int = 128,
        num_convs: int = 4,
        init: str = "normal",
        checkpointed: bool = False,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.cls_subnet = conv_tower(in_channels, cls_channels, num_convs)
        self.bbox_subnet = self.bbox_pred = None
        if with_boxes:
            self.bbox_subnet = conv_tower(in_channels, bbox_channels, num_convs)
        self.cls_score = Conv2d(cls_channels, num_sizes * num_classes, 3, padding=1)
        if with_boxes:
            self.bbox_pred = Conv2d(bbox_channels, num_sizes * 4, 3, padding=1)
        for tower in filter(None, (self.cls_subnet, self.bbox_subnet)):
            init_convs(tower, init)
        for predictor in filter(None, (self.cls_score, self.bbox_pred)):
            init_convs(predictor, "normal")
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior) / prior))

    def forward(
        self, features: list[Tensor], *, dense_boxes: bool = True
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Pyramid features, per level (N, C, H, W), to

        - logits per level (N, num_sizes * num_classes, H, W), channel ``size * num_classes +
        class``;
        - deltas per level (N, num_sizes * 4, H, W), channel ``size * 4 + (dx, dy, dw, dh)``; None
        without a box head, or unless ``dense_boxes``.
        """
        logits = [call(self._logits, x, checkpointed=self.checkpointed) for x in features]
        if self.bbox_pred is None or not dense_boxes:
            return logits, None
        return logits, [call(self._deltas, x, checkpointed=self.checkpointed) for x in features]

    def deltas_at(self, x: Tensor, n: Tensor, size: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """What `forward` makes of a level (N, C, H, W) at K of its windows, int64 (K,): (K, 4)."""
        convs = [*self.bbox_subnet[::2], self.bbox_pred]
        deltas = call(convolve_at, convs, x, n, row, column, checkpointed=self.checkpointed)
        deltas = deltas.unflatten(1, (-1, 4))
        return deltas[torch.arange(len(size), device=x.device), to_device(size, x.device)]

    def _logits(self, x: Tensor) -> Tensor:
        return self.cls_score(self.cls_subnet(x))

    def _deltas(self, x: Tensor) -> Tensor:
        return self.bbox_pred(self.bbox_subnet(x))
