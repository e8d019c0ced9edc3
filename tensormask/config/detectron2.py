"""detectron2's config keys that the tree lacks, and its two switches for the mask head.

The keys of detectron2's other models are ignored when a config is read. A key of a feature that
this library lacks is ignored if it switches the feature off, and an error if it switches it on.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from tensormask.utils.errors import UserError

# Keys that mean nothing to a TensorMask: groups of other models, and details of the features in
# `_SWITCHED_OFF`.
_IGNORED = (
    *("MODEL.PROPOSAL_GENERATOR", "MODEL.RPN", "MODEL.ROI_*", "MODEL.RETINANET"),
    *("MODEL.SEM_SEG_HEAD", "MODEL.PANOPTIC_FPN", "MODEL.ANCHOR_GENERATOR.ANGLES"),
    *("MODEL.RESNETS.DEFORM_MODULATED", "MODEL.RESNETS.DEFORM_NUM_GROUPS"),
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_*",
    *("SOLVER.NUM_DECAYS", "GLOBAL.HACK"),
    *("TEST.KEYPOINT_OKS_SIGMAS", "TEST.PRECISE_BN.NUM_ITER"),
)

# Keys of features that are not supported, with the values that do not use the feature.
_SWITCHED_OFF: dict[str, tuple[Any, ...]] = {
    "MODEL.LOAD_PROPOSALS": (False,),
    "MODEL.KEYPOINT_ON": (False,),
    "MODEL.BACKBONE.NAME": ("build_retinanet_resnet_fpn_backbone", "build_resnet_backbone"),
    "MODEL.RESNETS.NUM_GROUPS": (1,),
    "MODEL.RESNETS.WIDTH_PER_GROUP": (64,),
    "MODEL.RESNETS.RES5_DILATION": (1,),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": (256, 64),  # detectron2 requires 64 for
    "MODEL.RESNETS.STEM_OUT_CHANNELS": (64,),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": ([False, False, False, False],),
    "MODEL.ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator",),
    "MODEL.ANCHOR_GENERATOR.OFFSET": (0.0,),
    "DATASETS.PROPOSAL_FILES_TRAIN": ([],),
    "DATASETS.PROPOSAL_FILES_TEST": ([],),
    "SOLVER.RESCALE_INTERVAL": (False,),
    "TEST.PRECISE_BN.ENABLED": (False,),
    "VIS_PERIOD": (0,),
}

# The mask heads (paper, sec. 5), with their values of detectron2's ALIGNED_ON and BIPYRAMID_ON.
HEAD_SWITCHES = {
    "simple_natural": (False, False),
    "simple_aligned": (True, False),
    "upscale_natural": (False, False),
    "upscale_aligned": (True, False),
    "bipyramid": (True, True),
}
_HEAD = "MODEL.TENSOR_MASK.HEAD"
_SWITCHES = ("MODEL.TENSOR_MASK.ALIGNED_ON", "MODEL.TENSOR_MASK.BIPYRAMID_ON")


def ignored_name(full_key: str) -> str | None:
    """Return the key or the group above it that is ignored at any value, or None."""
    parts = full_key.split(".")
    names = (".".join(parts[: end + 1]) for end in range(len(parts)))
    return next((n for n in names if any(fnmatchcase(n, pattern) for pattern in _IGNORED)), None)


def is_switched_off(key: str, value: Any) -> bool:
    """Return whether a key switches an unsupported feature off; False for keys of the tree.

    Raises:
        UserError: the key switches the feature on.
    """
    if key not in _SWITCHED_OFF:
        return False
    if isinstance(value, tuple):
        value = list(value)
    if value not in _SWITCHED_OFF[key]:
        accepted = " or ".join(map(repr, _SWITCHED_OFF[key]))
        raise UserError(
            f"{key} is {shortened(value)}, which is not supported here: remove it, or set it to "
            f"{accepted}"
        )
    return True


def implied_by_head(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the mask head that the given ones imply, by full key.

    A head sets the two switches, and a switch sets the head to "auto". If both are given, nothing
    is implied; `build_model` reports a contradiction between them.

    Example:
        >>> implied_by_head({"MODEL.TENSOR_MASK.ALIGNED_ON": True})
        {'MODEL.TENSOR_MASK.HEAD': 'auto'}
    """
    head, has_switch = given.get(_HEAD), any(key in given for key in _SWITCHES)
    if isinstance(head, str) and head in HEAD_SWITCHES and not has_switch:
        return dict(zip(_SWITCHES, HEAD_SWITCHES[head], strict=True))
    if has_switch and _HEAD not in given:
        return {_HEAD: "auto"}
    return {}


def shortened(value: Any) -> str:
    """Return a short text of a value of any size: YAML aliases can spell a list of 10^30 items."""
    short = reprlib.Repr()
    short.maxlevel = 3
    short.maxstring = short.maxother = 80
    return short.repr(value)
