"""Parts of a model that are not trained."""

import difflib
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from tensormask.utils.errors import UserError


def freeze(model: nn.Module, names: Iterable[str]) -> None:
    """Freeze parts of a model: no gradients, and batch norms that stay as they are.

    Batch norms keep their statistics and use them in train mode, too. Those of `torch.nn` for
    images become frozen ones with the same values, so that the names of weights do not change; the
    optimizer has to be built afterwards.

    Args:
        names: of modules, as in `nn.Module.named_modules`; everything inside of them is frozen. ""
            is the model itself.

    Raises:
        UserError: there is no such module.

    Example:
        >>> from tensormask.modeling import ResNet
        >>> backbone = ResNet(18, norm="BN", freeze_at=0)
        >>> freeze(backbone, ["stem", "res2"])
        >>> type(backbone.stem.bn1).__name__, backbone.res3[0].conv1.weight.requires_grad
        ('FrozenBatchNorm2d', True)
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            (nearest,) = difflib.get_close_matches(name, modules, n=1, cutoff=0.0)
            raise UserError(f"{name!r} is not a module of the model; the nearest is {nearest!r}")
        modules[name].requires_grad_(False)
        inside = f"{name}." if name else ""
        for child_name, child in modules.items():
            if f"{child_name}.".startswith(inside) and isinstance(child, _BatchNorm):
                parent, _, leaf = child_name.rpartition(".")
                if type(child) in (nn.BatchNorm2d, nn.SyncBatchNorm) and leaf and child.affine:
                    setattr(modules[parent], leaf, _frozen(child))
                else:
                    child.register_forward_pre_hook(_stay_in_eval_mode)


def _frozen(norm: _BatchNorm) -> FrozenBatchNorm2d:
    frozen = FrozenBatchNorm2d(norm.num_features, norm.eps).to(norm.weight.device)
    frozen.load_state_dict(norm.state_dict())
    return frozen.to(norm.weight.dtype)


def _stay_in_eval_mode(norm: nn.Module, inputs: Any) -> None:
    norm.training = False
