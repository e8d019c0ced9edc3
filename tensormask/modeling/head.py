"""Class and box heads: two towers of convolutions, shared by all levels (paper, sec. 5.2)."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tensormask.layers.masks import to_device
from tensormask.layers.norm import LevelNorms, LevelTower, recomputation
from tensormask.layers.norm_relu import sequential
from tensormask.layers.plain import Kernel, PlainLayer, is_plain, plain_tower
from tensormask.layers.winograd import Conv2d
from tensormask.modeling.backbone import get_norm
from tensormask.modeling.cells import convolve_cells_at
from tensormask.modeling.query import Query
from tensormask.modeling.tiles import convolve_at
from tensormask.utils.errors import UserError

TOWER_NORMS = ("", "LN", "BN", "GN")


def conv_tower(
    in_channels: int, channels: int, num_convs: int, *, norm: str = "", num_levels: int = 1
) -> nn.Sequential:
    """Return ``num_convs`` 3x3 convolutions, each with a ReLU, and between them a norm.

    Args:
        norm: "" (none), "LN" (over the channels of each location), "BN" (with statistics per
            feature level) or "GN" (32 groups, or the largest smaller power of 2 that divides the
            channels). Convolutions before a norm have no bias.
        num_levels: feature levels of "BN".

    Raises:
        UserError: there is no such norm.
    """
    if norm not in TOWER_NORMS:
        raise UserError(f"norm must be one of {TOWER_NORMS}, got {norm!r}")
    layers: list[nn.Module] = []
    for _ in range(num_convs):
        layers.append(Conv2d(in_channels, channels, 3, padding=1, bias=not norm))
        if norm == "BN":
            layers.append(LevelNorms(channels, num_levels))
        elif norm:
            layers.append(get_norm(norm)(channels))
        layers.append(nn.ReLU(inplace=True))
        in_channels = channels
    return LevelTower(*layers) if norm == "BN" else nn.Sequential(*layers)


def apply_tower(tower: nn.Module, x: Tensor, level: int, *then: nn.Module) -> Tensor:
    """Return the results of a tower, and of layers after it.

    The tower's norms may depend on the level of the features.
    """
    if is_plain(tower, nn.Sequential):
        return sequential([*cast(nn.Sequential, tower), *then], x)
    x = tower(x, level) if isinstance(tower, LevelTower) else tower(x)
    for layer in then:
        x = layer(x)
    return x


def init_convs(module: nn.Module, init: str) -> None:
    """Initialize every convolution: "normal" has std 0.01, "he" suits narrow towers."""
    if init not in ("normal", "he"):
        raise UserError(f"init must be 'normal' or 'he', got {init!r}")
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            if init == "he":
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            else:
                nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def maybe_checkpoint(function: Callable[..., Any], *inputs: Any, checkpointed: bool) -> Any:
    """Return ``function(*inputs)``; if ``checkpointed``, the backward pass computes it again."""
    if checkpointed and torch.is_grad_enabled():
        return checkpoint(
            function,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), recomputation()),
        )
    return function(*inputs)


class DenseOutputs(NamedTuple):
    """The pyramid of a batch and what `ClassBoxHead.forward` computes from it, per level."""

    features: list[Tensor]  # (N, C, H, W)
    logits: list[Tensor]  # (N, num_sizes * num_classes, H, W)
    deltas: list[Tensor] | None  # (N, num_sizes * num_outputs, H, W), of the box head
    query: Tensor | None = None  # logits (N, 1, H, W) of `query.Query`, of the second level
    sample: Any = None  # `sampling.Sample` of the finest level, whose logits are then meaningless

    def image(self, n: int) -> "DenseOutputs":
        """Return the outputs of one image, as those of a batch of one."""
        features, logits = ([x[n : n + 1] for x in levels] for levels in self[:2])
        deltas = None if self.deltas is None else [x[n : n + 1] for x in self.deltas]
        query = None if self.query is None else self.query[n : n + 1]
        return DenseOutputs(features, logits, deltas, query)


class ClassBoxHead(nn.Module):
    """Score each window for each class and, with a box head, regress a box from it.

    With ``mask_iou``, the box head also predicts the IoU of the window's mask with the object's.

    Args:
        in_channels: channels of the pyramid.
        num_sizes: windows at each location.
        num_classes: classes without background.
        mask_iou: predict IoUs of masks; needs ``with_boxes``.
        cls_channels, bbox_channels, num_convs: of the towers.
        norm, num_levels: of the towers, see `conv_tower`.
        init: "normal" or "he", for the towers; the last convolutions are normal with std 0.01.
        checkpointed: recompute activations in the backward pass instead of saving them.
        prior: the initial score of every window.
        query, query_threshold: number of levels and threshold of its `query.Query`; 0 levels for
            none.

    Example:
        >>> head = ClassBoxHead(16, num_sizes=2, num_classes=3, cls_channels=16, bbox_channels=16)
        >>> (logits,), (deltas,) = head([torch.zeros(1, 16, 8, 8)])
        >>> logits.shape, deltas.shape
        (torch.Size([1, 6, 8, 8]), torch.Size([1, 8, 8, 8]))
    """

    def __init__(
        self,
        in_channels: int,
        num_sizes: int,
        num_classes: int,
        *,
        with_boxes: bool = True,
        mask_iou: bool = False,
        cls_channels: int = 256,
        bbox_channels: int = 128,
        num_convs: int = 4,
        norm: str = "",
        num_levels: int = 1,
        init: str = "normal",
        checkpointed: bool = False,
        prior: float = 0.01,
        query: int = 0,
        query_threshold: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_classes, int) or num_classes < 1:
            raise UserError(
                "num_classes (MODEL.TENSOR_MASK.NUM_CLASSES) must be an integer >= 1, got "
                f"{num_classes!r}"
            )
        self.in_channels, self.num_sizes, self.num_classes = in_channels, num_sizes, num_classes
        if mask_iou and not with_boxes:
            raise UserError(
                "MODEL.TENSOR_MASK.MASK_IOU_ON needs the box head, which predicts the IoU, but "
                "BOX_ON is False: set MASK_IOU_ON to False or BOX_ON to True"
            )
        self.with_boxes, self.mask_iou, self.checkpointed = with_boxes, mask_iou, checkpointed
        self.num_outputs = 5 if mask_iou else 4  # of the box head, per window
        norms: dict[str, Any] = {"norm": norm, "num_levels": num_levels}
        self.cls_subnet = conv_tower(in_channels, cls_channels, num_convs, **norms)
        if with_boxes:
            self.bbox_subnet = conv_tower(in_channels, bbox_channels, num_convs, **norms)
        self.cls_score = Conv2d(cls_channels, num_sizes * num_classes, 3, padding=1)
        if with_boxes:
            self.bbox_pred = Conv2d(bbox_channels, num_sizes * 4, 3, padding=1)
        if mask_iou:
            self.iou_pred = Conv2d(bbox_channels, num_sizes, 3, padding=1)
        for name, module in self.named_children():
            init_convs(module, init if name.endswith("_subnet") else "normal")
        assert self.cls_score.bias is not None
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior) / prior))
        self.query = Query(cls_channels, query, threshold=query_threshold) if query else None

    def forward(self, features: list[Tensor], *, dense_boxes: bool = True) -> tuple[Any, ...]:
        """Return class logits and box deltas of all windows.

        Args:
            features: of the pyramid, per level (N, C, H, W).
            dense_boxes: whether to compute deltas; `outputs_at` computes those of chosen windows.

        Returns:
            - logits per level (N, num_sizes * num_classes, H, W), channel ``size * num_classes +
              class``;
            - deltas per level (N, num_sizes * 4, H, W), channel ``size * 4 + (dx, dy, dw, dh)``,
              or with ``mask_iou`` (N, num_sizes * 5, H, W), with the logit of the IoU after them;
              None without a box head, or unless ``dense_boxes``;
            - with a query, its logits (N, 1, H, W), of the second level. In eval mode the logits
              of the finest level are then -inf where the query does not ask for them.
        """
        logits, towers = [], []
        for level, x in enumerate(features):
            logits_of_level, tower = self.classes(x, level)
            logits.append(logits_of_level)
            towers.append(tower)
        deltas = None
        if self.with_boxes and dense_boxes:
            deltas = [self.deltas(x, level) for level, x in enumerate(features)]
        if self.query is None:
            return logits, deltas
        query = self.query_logits(towers)
        if not self.training:
            asked = self.query.asked(query, logits[0].shape[2:])
            logits[0] = logits[0].where(asked[:, None], -math.inf)
        return logits, deltas, query

    def classes(self, x: Tensor, level: int) -> tuple[Tensor, Tensor | None]:
        """Return the class logits of a level, and of the tower's features those the query reads."""
        return self._call(self._classes, x, level)

    def query_logits(self, towers: list[Tensor | None]) -> Tensor:
        """Return the logits of the query, from the features of `classes` of all levels."""
        assert self.query is not None
        return self.query([tower for tower in towers if tower is not None])

    def deltas(self, x: Tensor, level: int) -> Tensor:
        """Return the deltas of all windows of a level, as `forward`."""
        return self._call(self._deltas, x, level)

    def deltas_at(
        self, dense: DenseOutputs, level: int, n: Tensor, size: Tensor, y: Tensor, x: Tensor
    ) -> Tensor:
        """Return the deltas (K, 4) at K windows of a level, int64 (K,) each."""
        return self.outputs_at(dense, level, n, size, y, x)[:, :4]

    def outputs_at(
        self, dense: DenseOutputs, level: int, n: Tensor, size: Tensor, y: Tensor, x: Tensor
    ) -> Tensor:
        """Return deltas and with ``mask_iou`` the logit of the IoU: (K, num_outputs).

        If the deltas of all windows are not in ``dense``, a plain tower is evaluated at these only.

        Args:
            n, size, y, x: K windows of the level, int64 (K,) each.
        """
        features = dense.features[level]
        layers = self.plain_box_tower(level) if dense.deltas is None else None
        if layers is None:
            of_level = self.deltas(features, level) if dense.deltas is None else dense.deltas[level]
            n, size, y, x = to_device(torch.stack([n, size, y, x]), features.device)
            return of_level.unflatten(1, (-1, self.num_outputs))[n, size, :, y, x]
        outputs = None
        asked = level == 0 and dense.query is not None and not torch.is_grad_enabled()
        if asked and n.device.type == "cpu":  # near each other, where the query asks for them
            outputs = convolve_cells_at(layers, features, n, y, x)
        if outputs is None:
            outputs = self._call(convolve_at, layers, features, n, y, x)
        size = to_device(size, features.device)
        rows = torch.arange(len(size), device=size.device)
        return outputs.unflatten(1, (-1, self.num_outputs))[rows, size]

    def plain_class_tower(self, level: int) -> list[PlainLayer] | None:
        """Return the layers that compute the class logits, if they are plain."""
        if not is_plain(self.cls_subnet, nn.Sequential, LevelTower):
            return None
        return plain_tower([*self.cls_subnet, self.cls_score], level)

    def plain_box_tower(self, level: int) -> list[PlainLayer] | None:
        """Return the layers that compute the outputs of the box head, if they are plain."""
        if not is_plain(self.bbox_subnet, nn.Sequential, LevelTower):
            return None
        layers = plain_tower([*self.bbox_subnet, self.bbox_pred], level)
        return self._with_ious(layers) if layers is not None and self.mask_iou else layers

    def _classes(self, x: Tensor, level: int) -> tuple[Tensor, Tensor | None]:
        if self.query is None or not 1 <= level <= self.query.num_levels:
            return apply_tower(self.cls_subnet, x, level, self.cls_score), None
        x = apply_tower(self.cls_subnet, x, level)
        return self.cls_score(x), x

    def _deltas(self, x: Tensor, level: int) -> Tensor:
        x = apply_tower(self.bbox_subnet, x, level)
        deltas = self.bbox_pred(x)
        return _interleave(deltas, self.iou_pred(x), dim=1) if self.mask_iou else deltas

    def _with_ious(self, layers: list[PlainLayer]) -> list[PlainLayer] | None:
        """Return a plain tower whose last convolution also predicts IoUs; None if it is not plain.

        One convolution of both kernels reads the tiles once.
        """
        deltas, iou = self.bbox_pred, self.iou_pred
        if plain_tower([iou]) is None or deltas.bias is None or iou.bias is None:
            return None
        weight = _interleave(deltas.weight, iou.weight, dim=0)
        kernel = Kernel(weight, _interleave(deltas.bias, iou.bias, dim=0))
        return [*layers[:-1], PlainLayer(kernel)]

    def _call(self, function: Callable[..., Any], *inputs: Any) -> Any:
        return maybe_checkpoint(function, *inputs, checkpointed=self.checkpointed)


def _interleave(deltas: Tensor, ious: Tensor, *, dim: int) -> Tensor:
    """Put the channels of each size together: ``(dx, dy, dw, dh, iou)``."""
    parts = deltas.unflatten(dim, (-1, 4)), ious.unflatten(dim, (-1, 1))
    return torch.cat(parts, dim=dim + 1).flatten(dim, dim + 1)
