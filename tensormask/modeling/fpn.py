"""Feature pyramid network: res2..res5 to p2..p7 (paper, sec. 6; Lin et al., arXiv 1612.03144)."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormask.layers._transforms import is_eager
from tensormask.layers.conv_norm import norm_of_conv
from tensormask.layers.masks import to_device
from tensormask.layers.norm import is_local
from tensormask.layers.plain import PlainLayer, is_plain, is_plain_conv, plain_tower
from tensormask.layers.winograd import Conv2d
from tensormask.modeling.backbone import PLAIN_NORMS, get_norm
from tensormask.modeling.cells import Cells, convolve_cells, dilate
from tensormask.utils.errors import UserError


def upsample(x: Tensor, scale: float, mode: str) -> Tensor:
    """Scale a feature map (N, C, H, W), in half precision also within CUDA's `torch.autocast`.

    That has float32 as the rule for this operation, which reads and writes twice as much. Sums are
    in float32 in either case.
    """
    corners = None if mode == "nearest" else False
    half = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)
    with torch.autocast("cuda", enabled=False) if half else nullcontext():
        return F.interpolate(x, scale_factor=scale, mode=mode, align_corners=corners)


class FPN(nn.Module):
    """Top-down pyramid over res2..res5, with p6 and p7 computed from res5 by strided convolutions.

    Level k has stride 2^k. With another backbone than a ResNet, the same is done with its levels.

    Args:
        in_channels: channels of the backbone's features, res2..res5.
        out_channels: channels of every level.
        levels: first and last level, at most two beyond the backbone's: (2, 7) is p2..p7.
        in_strides: strides of the backbone's features, consecutive powers of 2.
        norm: "" (none) or a norm of `backbone.get_norm`.
        fuse: how a level is combined with the one above, "sum" or "avg" (half of the sum).

    Example:
        >>> import torch
        >>> features = [torch.zeros(1, 8, 16 // 2**i, 24 // 2**i) for i in range(4)]
        >>> [tuple(x.shape[2:]) for x in FPN([8, 8, 8, 8], 16)(features)]
        [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        *,
        levels: tuple[int, int] = (2, 7),
        in_strides: Sequence[int] = (4, 8, 16, 32),
        norm: str = "",
        fuse: str = "avg",
    ) -> None:
        super().__init__()
        first, last = levels
        self.first_in = in_strides[0].bit_length() - 1
        self.last_in = self.first_in + len(in_strides) - 1
        if list(in_strides) != [2**k for k in range(self.first_in, self.last_in + 1)] or len(
            in_strides
        ) != len(in_channels):
            raise UserError(
                "in_strides must be consecutive powers of 2, fine to coarse, one for each of "
                f"in_channels {list(in_channels)}, got {list(in_strides)}"
            )
        if not self.first_in <= first <= self.last_in or not first <= last <= self.last_in + 2:
            raise UserError(
                f"levels must be within {self.first_in}..{self.last_in + 2} and start at "
                f"{self.last_in} or below, with features of strides {list(in_strides)}, "
                f"got {levels}"
            )
        if fuse not in ("sum", "avg"):
            raise UserError(f"fuse must be 'sum' or 'avg', got {fuse!r}")
        self.first, self.last, self.fuse = first, last, fuse
        self.in_strides, self.strides = list(in_strides), [2**k for k in range(first, last + 1)]
        self.in_channels, self.out_channels = list(in_channels), out_channels

        def conv(channels: int, kernel: int) -> nn.Sequential | nn.Conv2d:
            layer = Conv2d(channels, out_channels, kernel, padding=kernel // 2, bias=not norm)
            return nn.Sequential(layer, get_norm(norm)(out_channels)) if norm else layer

        used = range(first, self.last_in + 1)
        self.lateral = nn.ModuleDict(
            {f"p{k}": conv(in_channels[k - self.first_in], 1) for k in used}
        )
        self.output = nn.ModuleDict({f"p{k}": conv(out_channels, 3) for k in used if k <= last})
        for k in range(self.last_in + 1, last + 1):  # p6 and p7
            channels = in_channels[-1] if k == self.last_in + 1 else out_channels
            self.add_module(f"p{k}", nn.Conv2d(channels, out_channels, 3, stride=2, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)  # Caffe2's "Xavier"
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Return the features of the levels, fine to coarse, from those of res2..res5."""
        coarse, above = self.coarse(features)
        return [self.finest(features[self.first - self.first_in], above), *coarse]

    def coarse(self, features: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """Return the features of all levels but the finest, and what the finest is merged with.

        The latter is None if no level of the backbone is coarser.
        """
        pyramid: list[Tensor] = []
        above: Tensor | None = None
        for k in range(self.last_in, self.first, -1):
            above = self._merge(features[k - self.first_in], k, above)
            if k <= self.last:
                pyramid.insert(0, self.output[f"p{k}"](above))
        x = features[-1]
        for k in range(self.last_in + 1, self.last + 1):
            pyramid.append(self.get_submodule(f"p{k}")(x))
            x = F.relu(pyramid[-1])
        return pyramid, above

    def finest(self, x: Tensor, above: Tensor | None) -> Tensor:
        """Return the features of the finest level, from those of the backbone."""
        return self.output[f"p{self.first}"](self._merge(x, self.first, above))

    def _merge(self, x: Tensor, level: int, above: Tensor | None) -> Tensor:
        lateral: Any = self.lateral[f"p{level}"]
        if is_plain(lateral, nn.Sequential) and len(lateral) == 2:
            x = norm_of_conv(lateral[0], lateral[1], x)
        else:
            x = lateral(x)
        if above is not None:
            last = [*lateral][-1] if isinstance(lateral, nn.Sequential) else lateral
            if not is_plain(last, Conv2d, *PLAIN_NORMS):
                x = x.clone()  # a hook may keep it
            if is_eager(x, above) and not torch.is_grad_enabled() and x.device.type == "cpu":
                # By pairs of rows and of columns: the result of `upsample` takes time to allocate.
                pairs = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
                pairs += above[:, :, :, None, :, None]
            else:
                x += upsample(above, 2.0, mode="nearest")
            if self.fuse == "avg":
                x /= 2
        return x

    def plain_output(self) -> list[PlainLayer] | None:
        """Return the last layer of the finest level if it is plain, with a norm that is local."""
        return plain_tower(_conv_and_norm(self.output[f"p{self.first}"]))

    def finest_at(
        self, x: Tensor, above: Tensor | None, wanted: Tensor
    ) -> tuple[Tensor, Cells] | None:
        """Return the features of the finest level at chosen locations, as `convolve_cells`.

        None if they are not plain convolutions with norms that are local.

        Args:
            x, above: of `finest`.
            wanted: bool (N, H, W), on the CPU.
        """
        lateral = _conv_and_norm(self.lateral[f"p{self.first}"])
        layers = self.plain_output()
        if layers is None or not is_plain_conv(lateral[0]) or not all(map(is_local, lateral[1:])):
            return None
        cells = Cells.touching(dilate(wanted, len(layers)))
        at = cells.locations().flatten()
        height, width = x.shape[2:]
        place = torch.stack([at // (height * width), at // width % height, at % width])
        n, row, column = to_device(place.clamp(min=0), x.device)
        conv: Any = lateral[0]
        rows = F.linear(x[n, :, row, column], conv.weight.flatten(1), conv.bias)
        for norm in lateral[1:]:
            rows = norm(rows[:, :, None, None])[:, :, 0, 0]
        if above is not None:
            rows = rows + above[n, :, row // 2, column // 2]
            rows = rows / 2 if self.fuse == "avg" else rows
        return convolve_cells(layers, rows, wanted, below=cells)


def _conv_and_norm(layer: nn.Module) -> list[nn.Module]:
    return [*layer] if isinstance(layer, nn.Sequential) else [layer]
