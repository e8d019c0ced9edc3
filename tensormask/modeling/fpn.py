"""Feature pyramid network: res2..res5 to p2..p7 (paper, sec. 6; Lin et al., arXiv 1612.03144)."""

import torch.nn.functional as F
from torch import Tensor, nn

from tensormask.layers.winograd import Conv2d
from tensormask.modeling.backbone import get_norm
from tensormask.utils.errors import UserError

_FIRST_BOTTOM_UP, _LAST_BOTTOM_UP = 2, 5


class FPN(nn.Module):
    """Top-down pyramid over res2..res5, with p6 and p7 computed from res5 by strided convolutions.

    Args:
        in_channels: channels of res2..res5.
        out_channels: channels of every level.
        levels: first and last level, within 2..7: (2, 7) is p2..p7.
        norm: "" (none) or a norm of `backbone.get_norm`.
        fuse: how a level is combined with the one above, "sum" or "avg" (half of the sum).
    """

    def __init__(
        self,
        in_channels: list[int],
        out_channels: int = 256,
        *,
        levels: tuple[int, int] = (2, 7),
        norm: str = "",
        fuse: str = "avg",
    ) -> None:
        super().__init__()
        first, last = levels
        if not 2 <= first <= 5 or not first <= last <= 7:
            raise UserError(f"levels must be within 2..7 and start at 5 or below, got {levels}")
        if fuse not in ("sum", "avg"):
            raise UserError(f"fuse must be 'sum' or 'avg', got {fuse!r}")
        self.first, self.last, self.fuse = first, last, fuse

        def conv(channels: int, kernel: int) -> nn.Sequential | nn.Conv2d:
            layer = Conv2d(channels, out_channels, kernel, padding=kernel // 2, bias=not norm)
            return nn.Sequential(layer, get_norm(norm)(out_channels)) if norm else layer

        used = range(first, _LAST_BOTTOM_UP + 1)
        self.lateral = nn.ModuleDict(
            {f"p{k}": conv(in_channels[k - _FIRST_BOTTOM_UP], 1) for k in used}
        )
        self.output = nn.ModuleDict({f"p{k}": conv(out_channels, 3) for k in used if k <= last})
        if last >= 6:
            self.p6 = nn.Conv2d(in_channels[-1], out_channels, 3, stride=2, padding=1)
        if last >= 7:
            self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)  # Caffe2's "Xavier"
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Return the features of the levels, fine to coarse, from those of res2..res5."""
        pyramid: list[Tensor] = []
        above: Tensor | None = None
        for k in range(_LAST_BOTTOM_UP, self.first - 1, -1):
            x = self.lateral[f"p{k}"](features[k - _FIRST_BOTTOM_UP])
            if above is not None:
                x += F.interpolate(above, scale_factor=2.0, mode="nearest")
                if self.fuse == "avg":
                    x /= 2
            above = x
            if k <= self.last:
                pyramid.insert(0, self.output[f"p{k}"](x))
        if self.last >= 6:
            pyramid.append(self.p6(features[-1]))
        if self.last >= 7:
            pyramid.append(self.p7(F.relu(pyramid[-1])))
        return pyramid
