"""The paper's mask heads, evaluated at chosen windows (paper, sec. 5.2, fig. 6).

- Natural: a 1x1 convolution at a window's location predicts the window's mask.
- Aligned: at each location it predicts the value of that pixel in the masks of the windows around
  it. align2nat then collects the mask of each window.
- Upscale: the masks of either kind are predicted ``upscale`` times coarser, and upscaled.
- Bipyramid: aligned masks at the finest resolution for every level: the masks of level k are
  ``2^k`` times finer. They can be finer still, also on the finest level: ``mask_unit``.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormask.layers import (
    UPSCALE_MODES,
    swap_align2nat,
    swap_align2nat_at,
    up_align2nat_at,
    up_bilinear,
    up_nearest,
)
from tensormask.layers._transforms import is_eager
from tensormask.layers.norm import LevelTower
from tensormask.layers.padded_conv import conv1x1
from tensormask.layers.plain import is_plain, is_plain_conv, plain_tower
from tensormask.layers.window_masks import is_faster, upsample_locations, window_masks
from tensormask.modeling.fpn import upsample
from tensormask.modeling.head import apply_tower, conv_tower, init_convs, maybe_checkpoint
from tensormask.modeling.tiles import Tiles, to_device_at_once
from tensormask.utils.errors import UserError


class MaskHead(nn.Module):
    """Class-agnostic masks of windows.

    Args:
        in_channels: channels of the pyramid.
        mask_sizes: side of the masks on the finest level, per window size.
        strides: pixels per step, per level, fine to coarse.
        aligned: predict in the aligned representation.
        bipyramid: large masks on coarse levels; needs ``aligned``, and no upscaling.
        upscale: how many times coarser the predicted masks are than the final ones, >= 1; 1.5, 3 or
            5 in the paper, for masks of 15 x 15.
        upscale_mode: "bilinear" or "nearest".
        mask_unit: side of a mask pixel of the bipyramid, in pixels of the image; 0 for the finest
            stride, of which it must be a divisor. Then the feature map that the last convolutions
            read is upsampled to it, and all masks are ``strides[0] / mask_unit`` times finer.
        channels, num_convs: of the tower.
        norm: of the tower, see `conv_tower`.
        init: "normal" or "he", for the tower; the last convolutions are normal with std 0.01.
        checkpointed: recompute activations in the backward pass instead of saving them; those of
            the last convolutions are saved.

    Example:
        >>> head = MaskHead(16, mask_sizes=[11, 15], strides=(4, 8), channels=16)
        >>> features = [torch.zeros(1, 16, 20, 20), torch.zeros(1, 16, 10, 10)]
        >>> (masks,) = head(features, [(1, 0, torch.tensor([[0, 5, 7]]))])
        >>> masks.shape
        torch.Size([1, 22, 22])
    """

    def __init__(
        self,
        in_channels: int,
        mask_sizes: list[int],
        strides: tuple[int, ...],
        *,
        aligned: bool = True,
        bipyramid: bool = True,
        upscale: float = 1.0,
        upscale_mode: str = "bilinear",
        mask_unit: int = 0,
        channels: int = 128,
        num_convs: int = 4,
        norm: str = "",
        init: str = "normal",
        checkpointed: bool = False,
    ) -> None:
        super().__init__()
        if bipyramid and not aligned:
            raise UserError(
                "the tensor bipyramid needs aligned masks: set MODEL.TENSOR_MASK.ALIGNED_ON to "
                "True, or BIPYRAMID_ON to False"
            )
        if bipyramid and upscale != 1:
            raise UserError(
                f"masks of the tensor bipyramid are not upscaled: upscale must be 1, got {upscale}"
            )
        if upscale_mode not in UPSCALE_MODES:
            raise UserError(
                f"upscale_mode must be one of {', '.join(UPSCALE_MODES)}, got {upscale_mode!r}"
            )
        coarse_sizes = [round(side / upscale) for side in mask_sizes]
        sides = zip(coarse_sizes, mask_sizes, strict=True)
        if upscale < 1 or any(abs(coarse * upscale - side) > 1e-6 for coarse, side in sides):
            raise UserError(
                f"masks of {mask_sizes} pixels cannot be upscaled {upscale} times: "
                "MODEL.TENSOR_MASK.UPSCALE_LAMBDA must be >= 1 and divide every mask size, which "
                "is a window's side in MODEL.ANCHOR_GENERATOR.SIZES over its level's stride"
            )
        self.in_channels, self.checkpointed = in_channels, checkpointed
        self.mask_sizes, self.strides = list(mask_sizes), tuple(strides)
        self.aligned, self.bipyramid = aligned, bipyramid
        self.upscale, self.upscale_mode = upscale, upscale_mode
        mask_unit = mask_unit or strides[0]
        if mask_unit != strides[0] and not bipyramid:
            raise UserError(
                f"MODEL.TENSOR_MASK.MASK_UNIT is {mask_unit}, but only the tensor bipyramid has "
                "finer masks: set MODEL.TENSOR_MASK.HEAD to 'bipyramid', or leave MASK_UNIT at 0"
            )
        if mask_unit < 0 or strides[0] % mask_unit:
            raise UserError(
                f"mask_unit (MODEL.TENSOR_MASK.MASK_UNIT) must be 0, or a number of pixels that "
                f"divides the stride of the finest level, {strides[0]}, got {mask_unit}"
            )
        # Upsampling of the finest feature map.
        self.zoom = strides[0] // mask_unit
        # Ratio of a level's unit to that of the finest level, and to the unit of its masks.
        self.steps = [stride // strides[0] if bipyramid else 1 for stride in strides]
        self.lambdas = [self.zoom * steps for steps in self.steps]
        norms: dict[str, Any] = {"norm": norm, "num_levels": len(strides)}
        self.mask_subnet = conv_tower(in_channels, channels, num_convs, **norms)
        self.mask_pred = nn.ModuleList(nn.Conv2d(channels, side**2, 1) for side in coarse_sizes)
        init_convs(self.mask_subnet, init)
        init_convs(self.mask_pred, "normal")
        if bipyramid:
            self.mask_fuse = conv_tower(channels, channels, 1, **norms)
            init_convs(self.mask_fuse, init)

    def forward(
        self, features: list[Tensor], windows_per_group: list[tuple[int, int, Tensor]]
    ) -> list[Tensor]:
        """Return mask logits at chosen windows. Levels without windows are not computed.

        Args:
            features: of the pyramid, per level (N, C, H, W).
            windows_per_group: ``(level, size, windows)`` in order of level, with ``windows``
                Tensor[K, 3] of int64 rows ``(n, y, x)``; best on the CPU, where tiles are planned
                without waiting for a GPU.

        Returns:
            per group Tensor[K, side, side], ``side = mask_sizes[size] * lambda`` of the level.
        """
        return list(self.iter_masks(features, windows_per_group))

    def iter_masks(
        self,
        features: list[Tensor],
        windows_per_group: list[tuple[int, int, Tensor]],
        finest: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield the mask logits of `forward` group by group: only one group is in memory.

        ``finest``: the features of the tower on the finest level of a bipyramid, if known. Then
        masks may differ from those of `forward` by rounding.
        """
        may_round = self.zoom > 1 or finest is not None
        given = [windows for *_, windows in windows_per_group]
        windows_of_group = iter(to_device_at_once(given, features[0].device))
        for level, of_level in itertools.groupby(windows_per_group, key=lambda group: group[0]):
            groups = list(of_level)
            tiles, untile = None, None
            if self.bipyramid:
                if finest is None:
                    finest = self._call(self.mask_subnet, features[0])
                tiles = self._tiles(finest, groups)
                if tiles is not None:
                    untile = functools.partial(tiles.scatter, x=finest)
            x = self._call(self.level_features, features, level, finest, tiles)
            whole: Tensor | None = None  # without tiles, in channels_last
            for (_, size, _), windows in zip(groups, windows_of_group, strict=False):
                if (
                    finest is None
                    or not may_round
                    or not self._reads_few_channels(x, finest, level, size, windows)
                ):
                    yield self.masks_at(x, level, size, windows, untile)
                    continue
                if whole is None:
                    whole = x if untile is None else untile(x)
                    whole = whole.contiguous(memory_format=torch.channels_last)
                pred: Any = self.mask_pred[size]
                weight = pred.weight.flatten(1)
                yield window_masks(whole, weight, pred.bias, windows, self.steps[level], self.zoom)

    def dense(self, features: list[Tensor]) -> list[list[Tensor]]:
        """Return mask logits at all windows: the definition that tests compare `forward` with.

        Returns:
            per level and window size Tensor[N, side * side, H, W]. These are very large.
        """
        finest = self.mask_subnet(features[0]) if self.bipyramid else None
        masks_per_level = []
        for level, lambda_val in enumerate(self.lambdas):
            x = self.level_features(features, level, finest)
            masks = [self._upscale(_to_4d(pred(x))).flatten(1, 2) for pred in self.mask_pred]
            if self.aligned:
                masks = [swap_align2nat(self.upsampled(m), lambda_val) for m in masks]
            masks_per_level.append(masks)
        return masks_per_level

    def level_features(
        self, features: list[Tensor], level: int, finest: Tensor | None, tiles: Tiles | None = None
    ) -> Tensor:
        """Return the input of a level's 1x1 convolutions: (N, C, H, W).

        On the bipyramid it has the size of the finest level. With ``tiles``, only these are
        computed: (P, C, side, side).
        """
        if finest is None:
            return apply_tower(self.mask_subnet, features[level], level)
        height, width = finest.shape[-2:]
        x = finest
        if level > 0:
            # By scale, not by size: a coarse level covers padding too, which is cropped afterwards.
            x = apply_tower(self.mask_subnet, features[level], level)
            scale = float(self.steps[level])
            x = upsample(x, scale, mode="bilinear")
        x = x[:, :, :height, :width]
        # What `upsample` has made may be written to: memory for a sum takes long to allocate.
        in_place = level > 0 and is_eager(x, finest) and not torch.is_grad_enabled()
        x = x.add_(finest) if in_place and x.dtype == finest.dtype else x + finest
        if tiles is None:
            return apply_tower(self.mask_fuse, x, level)
        layers = plain_tower([*self.mask_fuse], level)
        assert layers is not None
        return F.relu(tiles.convolve(layers, x), inplace=True)

    def _call(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        return maybe_checkpoint(function, *inputs, checkpointed=self.checkpointed)

    def _tiles(self, finest: Tensor, groups: list[tuple[int, int, Tensor]]) -> Tiles | None:
        """Return the tiles of the finest level that a level's windows read.

        None if convolving the whole feature map is faster, or the layer is not plain, or the
        windows are on a GPU: the host would have to wait for the tiles.
        """
        on_cpu = all(windows.device.type == "cpu" for *_, windows in groups)
        plain = on_cpu and is_plain(self.mask_fuse, nn.Sequential, LevelTower)
        layers = plain_tower([*self.mask_fuse], groups[0][0]) if plain else None
        if layers is None or len(layers) != 1 or type(self.mask_fuse[-1]) is not nn.ReLU:
            return None
        tiles = Tiles.touching(finest, *self.boxes_read(groups))
        return tiles.to(finest.device) if tiles.are_faster(layers, finest) else None

    def boxes_read(self, groups: Sequence[tuple[int, int, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return what windows read of the finest level of a bipyramid.

        Returns:
            the image (K,) of each window, and first and last row and column (K, 4), ``(y0, x0, y1,
            x1)``, which may be outside of the feature map.
        """
        boxes = []
        for level, size, windows in groups:
            center = windows[:, 1:] * self.steps[level]
            # Half a mask, and a cell for the interpolation.
            reach = -(-self.mask_sizes[size] * self.steps[level] // 2) + 1
            boxes.append(torch.cat([center - reach, center + reach], dim=1))
        return torch.cat([windows[:, 0] for _, _, windows in groups]), torch.cat(boxes)

    def masks_at(
        self,
        x: Tensor,
        level: int,
        size: int,
        windows: Tensor,
        untile: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return mask logits of windows of a level from `level_features`: (K, side, side).

        With ``untile``, ``x`` has tiles, of which it makes a feature map.
        """
        pred: Any = self.mask_pred[size]
        if self.aligned:
            masks = conv1x1(pred, x)
            masks = masks if untile is None else untile(masks)
            if self.upscale > 1:
                return up_align2nat_at(masks, windows, self.upscale, mode=self.upscale_mode)
            return swap_align2nat_at(self.upsampled(masks), windows, self.lambdas[level])
        n, row, column = windows.unbind(1)
        if is_plain_conv(pred) and pred.kernel_size == (1, 1):
            masks = F.linear(x[n, :, row, column], pred.weight.flatten(1), pred.bias)
        else:
            masks = pred(x)[n, :, row, column]
        return self._upscale(_to_4d(masks[:, :, None, None])).flatten(-3)

    def upsampled(self, masks: Tensor) -> Tensor:
        """Upsample aligned masks (N, V*U, H, W) to their unit: (N, V*U, zoom*H, zoom*W).

        This commutes with the last convolutions, whose input is upsampled by definition.
        """
        return upsample_locations(masks, self.zoom)

    def _reads_few_channels(
        self, x: Tensor, finest: Tensor, level: int, size: int, windows: Tensor
    ) -> bool:
        """Return whether to compute only what windows read of the last convolution's result.

        ``x`` is that of `level_features`.
        """
        pred: Any = self.mask_pred[size]
        return (
            x.device.type == "cpu"
            and is_plain_conv(pred)
            and (pred.kernel_size, pred.stride, pred.padding) == ((1, 1), (1, 1), (0, 0))
            and pred.bias is not None
            and is_faster(
                x[:, 0].numel(),
                (finest.shape[2], finest.shape[3]),
                self.mask_sizes[size],
                windows,
                self.steps[level],
                self.zoom,
            )
        )

    def _upscale(self, masks: Tensor) -> Tensor:
        """Upscale predicted masks (N, v, u, H, W) to their final size (N, V, U, H, W)."""
        if self.upscale == 1:
            return masks
        up = up_nearest if self.upscale_mode == "nearest" else up_bilinear
        return up(masks, self.upscale)


def _to_4d(masks: Tensor) -> Tensor:
    """Reshape square masks (N, V*U, H, W) to (N, V, U, H, W)."""
    side = round(masks.shape[1] ** 0.5)
    return masks.unflatten(1, (side, side))
