"""`CfgNode`: the tree of options, changed by YAML files and `KEY VALUE` pairs.

detectron2's files can be used unchanged. `config.detectron2` lists their keys that are ignored,
which the log names in one line, and the features that are refused.
"""

from __future__ import annotations

import difflib
import io
import logging
import math
import os
from ast import literal_eval
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import getitem
from os import PathLike
from typing import Any

import yaml
from fvcore.common.config import BASE_KEY
from fvcore.common.config import CfgNode as _BaseCfgNode

from tensormask.config.detectron2 import ignored_name, implied_by_head, is_switched_off, shortened
from tensormask.config.files import find_config
from tensormask.utils.errors import UserError, shorten
from tensormask.utils.files import read_text

logger = logging.getLogger(__name__)

# Keys that may be None, with the type of their other values.
_OPTIONAL = {"SOLVER.WEIGHT_DECAY_BIAS": float}
# Keys that are True, False or "auto".
_SWITCHES = ("MODEL.CHANNELS_LAST",)

_MAX_GROUP_DEPTH = 4  # MODEL.PANOPTIC_FPN.COMBINE.ENABLED
_MAX_GROUP_SIZE = 1000  # keys of a group, with those of its merge keys
_MAX_LIST_DEPTH = 2  # [[44, 60], [88, 120]]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with a limit for merge keys (<<), which can double a group per line."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MAX_GROUP_SIZE:
            raise yaml.constructor.ConstructorError(
                problem=f"a group has more than {_MAX_GROUP_SIZE} keys",
                problem_mark=node.start_mark,
            )


class CfgNode(_BaseCfgNode):
    """A tree of options, read as ``cfg.SOLVER.BASE_LR``.

    A merge checks every key before it changes any. Its ``ValueError`` names the key: a key that
    does not exist (with the nearest that does), a value of another type, or a feature of detectron2
    that is not supported. Lists are accepted for tuples and 1 for 1.0, and the other way round.

    Example:
        >>> cfg = CfgNode({"SOLVER": {"MAX_ITER": 100, "BASE_LR": 0.1}})
        >>> cfg.merge_from_list(["SOLVER.BASE_LR", "1"])
        >>> cfg.SOLVER.BASE_LR
        1.0
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self:
            raise AttributeError(_unknown(name, self))
        super().__setattr__(name, value)

    def merge_from_file(self, cfg_filename: str | PathLike[str]) -> None:
        """Merge a YAML file on top of the files that its ``_BASE_`` names (relative to it).

        Args:
            cfg_filename: a path, or a name such as "quickstart": see `find_config`.
        """
        try:
            loaded = self.load_yaml_with_base(str(find_config(cfg_filename)))
        except AssertionError as error:  # fvcore's: a key is a group here and a value in the base
            raise UserError(f"{cfg_filename}: {error}") from error
        self._merge(loaded)

    def merge_from_text(self, text: str, source: str) -> None:
        """Merge YAML text, as of `dump`; `source` names it in errors. A ``_BASE_`` is refused."""
        _, loaded = _load_plain(source, lambda: text)
        try:
            self._merge(loaded)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Merge ``[key, value, key, value, ...]``; a value is a Python literal or plain text."""
        if len(cfg_list) % 2:
            raise UserError(
                f"overrides are pairs KEY VALUE (not KEY=VALUE), got {len(cfg_list)} words: "
                f"{' '.join(map(str, cfg_list))[:500]}"
            )
        if not all(isinstance(key, str) for key in cfg_list[0::2]):
            raise UserError("the keys of overrides are strings, such as SOLVER.MAX_ITER")
        self._merge(dict(zip(cfg_list[0::2], cfg_list[1::2], strict=True)))

    def merge_from_other_cfg(self, cfg_other: Mapping[str, Any]) -> None:
        """Merge another tree, complete or in part."""
        self._merge(cfg_other)

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """Return a YAML file merged with its ``_BASE_`` files as a nested dict."""
        if allow_unsafe:
            raise UserError("allow_unsafe is not supported, because it runs code of the config")
        return super().load_yaml_with_base(filename)

    @classmethod
    def _open_cfg(cls, filename: str) -> io.StringIO:
        """Open a file for fvcore, after checking that it is a mapping of plain data."""
        if os.path.exists(filename) and not os.path.isfile(filename):
            raise UserError(f"{filename} is not a regular file")  # a device or pipe could block
        text, loaded = _load_plain(filename, lambda: read_text(filename))
        # Implied keys are added per file, because a file overrides what its base implies.
        if implied := implied_by_head(dict(leaves(loaded))):
            for key, value in implied.items():
                _put(loaded, key, value)
            text = yaml.safe_dump(loaded)
        bases = loaded.get(BASE_KEY, [])
        if not all(isinstance(b, str) for b in (bases if isinstance(bases, list) else [bases])):
            raise UserError(
                f"{filename}: {BASE_KEY} is a path or a list of paths, got {_describe(bases)}"
            )
        return io.StringIO(text)

    def _merge(self, changes: Mapping[str, Any]) -> None:
        changes = {**changes, **implied_by_head(dict(leaves(changes)))}
        known = dict(leaves(self))
        accepted: dict[str, Any] = {}
        ignored: dict[str, None] = {}  # a set that keeps the order
        for key, given in leaves(changes):
            value = _decode(given)
            if name := ignored_name(key):
                ignored[name] = None
            elif is_switched_off(key, value):
                ignored[key] = None
            elif key in known:
                accepted[key] = _coerce(key, given, value, known[key])
            else:
                raise UserError(_unknown(key, known))
        if accepted.get("VERSION", 2) != 2:
            raise UserError(f"VERSION is {accepted['VERSION']}, but only version 2 is supported")
        for key, value in accepted.items():
            *groups, leaf = key.split(".")
            setattr(reduce(getitem, groups, self), leaf, value)
        if ignored:
            logger.warning("config keys that TensorMask does not use: %s", ", ".join(ignored))


def _load_plain(source: str, read: Callable[[], str]) -> tuple[str, dict[str, Any]]:
    """Return a YAML text, and the groups of keys in it."""
    try:
        text = read()
        loaded = yaml.load(text, _Loader)
    except (OSError, UserError):
        raise
    except RecursionError as error:
        raise UserError(
            f"{source} is nested too deeply, or its {BASE_KEY} leads back to it"
        ) from error
    except Exception as error:  # PyYAML raises AttributeError and more, as on `!!timestamp x`
        raise UserError(f"{source} is not plain YAML (no tags, no objects): {error}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{source}: expected groups of keys, got {_describe(loaded)}")
    return text, loaded


def leaves(tree: Mapping[str, Any], prefix: str = "", depth: int = 1) -> Iterator[tuple[str, Any]]:
    """Yield full key and value of every leaf; an ignored group counts as a leaf.

    Example:
        >>> dict(leaves({"SEED": 1, "SOLVER": {"MAX_ITER": 100}}))
        {'SEED': 1, 'SOLVER.MAX_ITER': 100}
    """
    for key, value in tree.items():
        full_key = f"{prefix}{key}"
        if isinstance(value, dict) and depth < _MAX_GROUP_DEPTH and not ignored_name(full_key):
            yield from leaves(value, f"{full_key}.", depth + 1)
        else:
            yield full_key, value


def _put(tree: dict[str, Any], full_key: str, value: Any) -> None:
    """Set a leaf of a nested dict, unless a group above it is a value: the merge reports that."""
    *groups, leaf = full_key.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
        if not isinstance(tree, dict):
            return
    tree[leaf] = value


def _decode(value: Any) -> Any:
    """Return the Python literal that a text spells, or the text."""
    if not isinstance(value, str):
        return value
    try:
        return literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def _coerce(key: str, given: Any, value: Any, current: Any) -> Any:
    """Return ``value`` (``given``, decoded) in the type of the key's current value."""
    if value is None and key in _OPTIONAL:
        return None
    if key in _SWITCHES:
        if type(value) is bool or value == "auto":
            return value
        raise UserError(f"{key} takes True, False or 'auto', got {_describe(value)}")
    expected: type = _OPTIONAL.get(key, type(current))
    hint = ""
    if expected in (list, tuple):
        if type(value) in (list, tuple):
            return expected(_plain_items(key, value))
        if type(value) in (str, int):
            hint = f"; write {shortened(expected((value,)))}"
    elif type(value) is expected:
        return value
    elif expected is str and type(value) in (int, float) and isinstance(given, str):
        return given  # a text that happens to spell a number, such as OUTPUT_DIR 2024
    elif expected is float and type(value) is int and abs(value) < 1e300:
        return float(value)
    elif expected is float and isinstance(value, str) and value in ("inf", ".inf"):
        return math.inf
    elif expected is int and type(value) is float and value.is_integer():
        return int(value)
    raise UserError(f"{key} takes {expected.__name__}, got {_describe(value)}{hint}")


def _plain_items(key: str, items: Sequence[Any], depth: int = 1) -> Iterator[Any]:
    """Yield the items, with inner tuples as lists, so that a dumped config reads back equal."""
    for item in items:
        if type(item) in (list, tuple) and depth < _MAX_LIST_DEPTH:
            yield list(_plain_items(key, item, depth + 1))
        elif type(item) in (str, int, float, bool):
            yield item
        else:
            raise UserError(f"{key} takes numbers and strings, got {_describe(item)} in a list")


def _unknown(key: str, known: Iterable[str]) -> str:
    known = list(known)
    if inside := [name for name in known if name.startswith(f"{key}.")]:
        return f"{key} is a group of keys ({inside[0]}, ...) and has no value of its own"
    nearest = difflib.get_close_matches(key.upper(), known, n=1, cutoff=0.0)
    return f"{shorten(key)} is not a config key" + "".join(
        f"; the nearest one is {n}" for n in nearest
    )


def _describe(value: Any) -> str:
    return f"{type(value).__name__} {shortened(value)}"
