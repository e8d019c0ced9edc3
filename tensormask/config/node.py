"""The tree that holds the options: how files and ``KEY VALUE`` pairs change it.

detectron2's files load as they are: what belongs to its other models, or is switched off, is
dropped with one line that says so. What would switch on a feature that does not exist here is
refused.
"""

from __future__ import annotations

import difflib
import io
import logging
import math
import os
import reprlib
from ast import literal_eval
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import reduce
from operator import getitem
from os import PathLike
from typing import Any

import yaml
from fvcore.common.config import BASE_KEY
from fvcore.common.config import CfgNode as _BaseCfgNode

from tensormask.utils.errors import UserError

logger = logging.getLogger(__name__)

# Keys whose None means something, with the type of their other values.
_OPTIONAL = {"SOLVER.WEIGHT_DECAY_BIAS": float}

# The mask heads by name (paper, sec. 5), and what detectron2's two switches say of each.
HEAD_SWITCHES = {
    "simple_natural": (False, False),
    "simple_aligned": (True, False),
    "upscale_natural": (False, False),
    "upscale_aligned": (True, False),
    "bipyramid": (True, True),
}
_HEAD = "MODEL.TENSOR_MASK.HEAD"
_SWITCHES = ("MODEL.TENSOR_MASK.ALIGNED_ON", "MODEL.TENSOR_MASK.BIPYRAMID_ON")

# detectron2's keys that say nothing about a TensorMask, at any value: other models' groups, and the
# details of features that are refused below unless they are off.
_DROPPED = (
    *("MODEL.PROPOSAL_GENERATOR", "MODEL.RPN", "MODEL.ROI_*", "MODEL.RETINANET"),
    *("MODEL.SEM_SEG_HEAD", "MODEL.PANOPTIC_FPN", "MODEL.ANCHOR_GENERATOR.ANGLES"),
    *("MODEL.RESNETS.DEFORM_MODULATED", "MODEL.RESNETS.DEFORM_NUM_GROUPS"),
    *("INPUT.CROP.TYPE", "INPUT.CROP.SIZE", "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_*"),
    *("DATALOADER.REPEAT_THRESHOLD", "DATALOADER.REPEAT_SQRT", "SOLVER.NUM_DECAYS", "GLOBAL.HACK"),
    *("TEST.KEYPOINT_OKS_SIGMAS", "TEST.AUG.MIN_SIZES", "TEST.AUG.MAX_SIZE", "TEST.AUG.FLIP"),
    "TEST.PRECISE_BN.NUM_ITER",
)

# detectron2's keys of features that do not exist here, with the values that do without them.
_OFF: dict[str, tuple[Any, ...]] = {
    "MODEL.LOAD_PROPOSALS": (False,),
    "MODEL.KEYPOINT_ON": (False,),
    "MODEL.BACKBONE.NAME": ("build_retinanet_resnet_fpn_backbone", "build_resnet_backbone"),
    "MODEL.RESNETS.NUM_GROUPS": (1,),
    "MODEL.RESNETS.WIDTH_PER_GROUP": (64,),
    "MODEL.RESNETS.RES5_DILATION": (1,),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": (256, 64),  # 64: what detectron2 demands of
    "MODEL.RESNETS.STEM_OUT_CHANNELS": (64,),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": ([False, False, False, False],),
    "MODEL.ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator",),
    "MODEL.ANCHOR_GENERATOR.OFFSET": (0.0,),
    "INPUT.CROP.ENABLED": (False,),
    "DATASETS.PROPOSAL_FILES_TRAIN": ([],),
    "DATASETS.PROPOSAL_FILES_TEST": ([],),
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler",),
    "SOLVER.RESCALE_INTERVAL": (False,),
    "TEST.AUG.ENABLED": (False,),
    "TEST.PRECISE_BN.ENABLED": (False,),
    "VIS_PERIOD": (0,),
}

_MAX_GROUP_DEPTH = 4  # MODEL.PANOPTIC_FPN.COMBINE.ENABLED
_MAX_GROUP_SIZE = 1000  # keys, those that are merged into it included
_MAX_LIST_DEPTH = 2  # [[44, 60], [88, 120]]

_short = reprlib.Repr()
_short.maxlevel = 3
_short.maxstring = _short.maxother = 80


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but for merge keys (<<) that double a group line by line."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MAX_GROUP_SIZE:
            raise yaml.constructor.ConstructorError(
                problem=f"a group has more than {_MAX_GROUP_SIZE} keys",
                problem_mark=node.start_mark,
            )


class CfgNode(_BaseCfgNode):
    """A tree of options that reads as ``cfg.SOLVER.BASE_LR``.

    A merge checks everything before it changes anything. ``ValueError`` names the key: one that
    does not exist (with the nearest that does), a value of another type, a feature of detectron2
    that does not exist here. Lists and tuples stand in for each other, and so do 1 and 1.0.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self:
            raise AttributeError(_unknown(name, self))
        super().__setattr__(name, value)

    def merge_from_file(self, cfg_filename: str | PathLike[str]) -> None:
        """Merge a YAML file, over the files that its ``_BASE_`` names (relative to it)."""
        try:
            loaded = self.load_yaml_with_base(str(cfg_filename))
        except AssertionError as error:  # how fvcore says that a file has a group, its base a value
            raise UserError(f"{cfg_filename}: {error}") from error
        self._merge(loaded)

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Merge ``[key, value, key, value, ...]``; a value is a Python literal or plain text."""
        if len(cfg_list) % 2:
            raise UserError(
                f"overrides are pairs KEY VALUE (not KEY=VALUE), got {len(cfg_list)} words: "
                f"{' '.join(map(str, cfg_list))[:500]}"
            )
        if not all(isinstance(key, str) for key in cfg_list[0::2]):
            raise UserError("the keys of overrides are texts, such as SOLVER.MAX_ITER")
        self._merge(dict(zip(cfg_list[0::2], cfg_list[1::2], strict=True)))

    def merge_from_other_cfg(self, cfg_other: dict[str, Any]) -> None:
        """Merge another tree, whole or in part."""
        self._merge(cfg_other)

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """Nested dict of a YAML file over its ``_BASE_`` files; object tags are refused."""
        if allow_unsafe:
            raise UserError(
                "a config is data: allow_unsafe, which runs what it says, is not offered"
            )
        return super().load_yaml_with_base(filename)

    @classmethod
    def _open_cfg(cls, filename: str) -> io.StringIO:
        # fvcore's hook for opening a file: what it hands on is known to be a mapping of plain data.
        if os.path.exists(filename) and not os.path.isfile(filename):
            raise UserError(f"{filename} is no file")  # a device or pipe may never end
        try:
            with open(filename, encoding="utf-8") as file:
                text = file.read()
            loaded = yaml.load(text, _Loader)
        except OSError:
            raise
        except RecursionError as error:
            raise UserError(
                f"{filename} is nested too deeply, or its {BASE_KEY} leads back to it"
            ) from error
        except Exception as error:  # also AttributeError and more: PyYAML on `!!timestamp x`
            raise UserError(
                f"{filename} is not plain YAML (no tags, no objects): {error}"
            ) from error
        if not isinstance(loaded, dict):
            raise UserError(f"{filename}: expected groups of keys, got {_describe(loaded)}")
        # Here, file by file: what a file says comes after what its base says.
        if implied := _implied_by_head(dict(leaves(loaded))):
            for key, value in implied.items():
                _put(loaded, key, value)
            text = yaml.safe_dump(loaded)
        bases = loaded.get(BASE_KEY, [])
        if not all(isinstance(b, str) for b in (bases if isinstance(bases, list) else [bases])):
            raise UserError(
                f"{filename}: {BASE_KEY} is a path or a list of paths, got {_describe(bases)}"
            )
        return io.StringIO(text)

    def _merge(self, changes: dict[str, Any]) -> None:
        changes = {**changes, **_implied_by_head(dict(leaves(changes)))}
        known = dict(leaves(self))
        accepted: dict[str, Any] = {}
        dropped: dict[str, None] = {}  # a set that keeps the order
        for key, given in leaves(changes):
            value = _decode(given)
            if name := _dropped_name(key):
                dropped[name] = None
            elif key in _OFF:
                _check_off(key, value)
                dropped[key] = None
            elif key in known:
                accepted[key] = _coerce(key, given, value, known[key])
            else:
                raise UserError(_unknown(key, known))
        if accepted.get("VERSION", 2) != 2:
            raise UserError(
                f"VERSION is {accepted['VERSION']}, but only configs of version 2 are read"
            )
        for key, value in accepted.items():
            *groups, leaf = key.split(".")
            setattr(reduce(getitem, groups, self), leaf, value)
        if dropped:
            logger.warning("config keys that TensorMask has no use for: %s", ", ".join(dropped))


def leaves(tree: dict[str, Any], prefix: str = "", depth: int = 1) -> Iterator[tuple[str, Any]]:
    """Full key and value of every leaf; what is dropped as a group is not looked into."""
    for key, value in tree.items():
        full_key = f"{prefix}{key}"
        if isinstance(value, dict) and depth < _MAX_GROUP_DEPTH and not _dropped_name(full_key):
            yield from leaves(value, f"{full_key}.", depth + 1)
        else:
            yield full_key, value


def _implied_by_head(given: dict[str, Any]) -> dict[str, Any]:
    """What keys of one source say of the mask head beyond themselves, by full key.

    A head sets the switches, a switch sets the head to "auto". A source that has both is taken at
    its word: `build_model` finds where they contradict each other.
    """
    head, says_switch = given.get(_HEAD), any(key in given for key in _SWITCHES)
    if isinstance(head, str) and head in HEAD_SWITCHES and not says_switch:
        return dict(zip(_SWITCHES, HEAD_SWITCHES[head], strict=True))
    if says_switch and _HEAD not in given:
        return {_HEAD: "auto"}
    return {}


def _put(tree: dict[str, Any], full_key: str, value: Any) -> None:
    """Set a leaf of a nested dict, unless a group above it is none: the merge then says so."""
    *groups, leaf = full_key.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
        if not isinstance(tree, dict):
            return
    tree[leaf] = value


def _dropped_name(full_key: str) -> str | None:
    """The key itself or the group above it that is dropped, or None."""
    parts = full_key.split(".")
    names = (".".join(parts[: end + 1]) for end in range(len(parts)))
    return next((n for n in names if any(fnmatchcase(n, pattern) for pattern in _DROPPED)), None)


def _decode(value: Any) -> Any:
    """The Python literal that a text spells, or the text."""
    if not isinstance(value, str):
        return value
    try:
        return literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def _check_off(key: str, value: Any) -> None:
    if isinstance(value, tuple):
        value = list(value)
    if value not in _OFF[key]:
        accepted = " or ".join(map(repr, _OFF[key]))
        raise UserError(
            f"{key} is {_short.repr(value)}, which asks for what does not exist here: leave it "
            f"out, or at {accepted}"
        )


def _coerce(key: str, given: Any, value: Any, current: Any) -> Any:
    """``value`` (``given``, decoded) in the type of the key, which its current value shows."""
    wanted = _OPTIONAL.get(key, type(current))
    kind: Any = type(value)
    if kind is wanted and kind not in (list, tuple):
        return value
    if value is None and key in _OPTIONAL:
        return None
    if wanted is str and kind in (int, float) and isinstance(given, str):
        return given  # a text that happens to spell a number, such as OUTPUT_DIR 2024
    if wanted is float and kind is int and abs(value) < 1e300:
        return float(value)
    if wanted is float and kind is str and value in ("inf", ".inf"):
        return math.inf
    if wanted is int and kind is float and value.is_integer():
        return int(value)
    if wanted in (list, tuple) and kind in (list, tuple):
        return wanted(_plain_items(key, value))
    hint = ""
    if wanted in (list, tuple) and kind in (str, int):
        hint = f"; write {_short.repr(wanted((value,)))}"
    raise UserError(f"{key} takes {wanted.__name__}, got {_describe(value)}{hint}")


def _plain_items(key: str, items: Sequence[Any], depth: int = 1) -> Iterator[Any]:
    """The items, with inner tuples as lists, so that a dumped config reads back equal."""
    for item in items:
        if type(item) in (list, tuple) and depth < _MAX_LIST_DEPTH:
            yield list(_plain_items(key, item, depth + 1))
        elif type(item) in (str, int, float, bool):
            yield item
        else:
            raise UserError(f"{key} takes numbers and texts, got {_describe(item)} in a list")


def _unknown(key: str, known: Iterable[str]) -> str:
    known = list(known)
    if inside := [name for name in known if name.startswith(f"{key}.")]:
        return f"{key} is a group of keys ({inside[0]}, ...) and has no value of its own"
    nearest = difflib.get_close_matches(key.upper(), known, n=1, cutoff=0.0)
    return f"{key} is no config key" + "".join(f"; the nearest one is {name}" for name in nearest)


def _describe(value: Any) -> str:
    # reprlib's text is short however large the value: YAML aliases can spell a list of 10^30 items.
    return f"{type(value).__name__} {_short.repr(value)}"
