"""Tables of parameter names: those of detectron2, torchvision and Caffe2 beside ours.

A field in braces has the same text on both sides of a row, unless `_CHANGES` has another one.
"""

import re
from collections.abc import Collection, Sequence
from functools import cache

Table = tuple[tuple[str, str], ...]

_BACKBONE: Table = (
    ("stem.conv1.norm.{leaf}", "backbone.stem.bn1.{leaf}"),
    ("stem.conv1.{leaf}", "backbone.stem.conv1.{leaf}"),
    ("{block}.shortcut.norm.{leaf}", "backbone.{block}.downsample.1.{leaf}"),
    ("{block}.shortcut.{leaf}", "backbone.{block}.downsample.0.{leaf}"),
    ("{block}.conv{n}.norm.{leaf}", "backbone.{block}.bn{n}.{leaf}"),
    ("{block}.conv{n}.{leaf}", "backbone.{block}.conv{n}.{leaf}"),
)
_DETECTRON2: Table = (
    *((f"backbone.bottom_up.{theirs}", ours) for theirs, ours in _BACKBONE),
    ("backbone.fpn_{way}{n}.norm.{leaf}", "fpn.{way}.p{n}.1.{leaf}"),
    ("backbone.fpn_{way}{n}.{leaf}", "fpn.{way}.p{n}.{leaf}"),
    ("backbone.fpn_{way}{n}.{leaf}", "fpn.{way}.p{n}.0.{leaf}"),  # with a norm
    ("backbone.top_block.p{n}.{leaf}", "fpn.p{n}.{leaf}"),
    ("head.{tower}.{rest}", "mask_head.{tower}.{rest}"),
    ("head.mask_pred_{size}.{leaf}", "mask_head.mask_pred.{size}.{leaf}"),
    ("head.{part}.{rest}", "head.{part}.{rest}"),
)
_TORCHVISION: Table = (
    ("conv1.{leaf}", "backbone.stem.conv1.{leaf}"),
    ("bn1.{leaf}", "backbone.stem.bn1.{leaf}"),
    ("layer1.{rest}", "backbone.res2.{rest}"),
    ("layer2.{rest}", "backbone.res3.{rest}"),
    ("layer3.{rest}", "backbone.res4.{rest}"),
    ("layer4.{rest}", "backbone.res5.{rest}"),
)
_FEATURES: Table = (("features.{rest}", "backbone.features.{rest}"),)
_CAFFE2: Table = (
    ("conv1_w", "backbone.stem.conv1.weight"),
    ("res_conv1_bn_{affine}", "backbone.stem.bn1.{affine}"),
    ("res{n}_{i}_branch1_w", "backbone.res{n}.{i}.downsample.0.weight"),
    ("res{n}_{i}_branch1_bn_{affine}", "backbone.res{n}.{i}.downsample.1.{affine}"),
    ("res{n}_{i}_branch2{abc}_w", "backbone.res{n}.{i}.conv{abc}.weight"),
    ("res{n}_{i}_branch2{abc}_bn_{affine}", "backbone.res{n}.{i}.bn{abc}.{affine}"),
)

# The texts that a field matches.
_FIELDS = {
    "leaf": r"[^.]+",
    "rest": r".+",
    "block": r"res[2-5]\.\d+",
    "n": r"\d",
    "i": r"\d+",
    "way": r"lateral|output",
    "size": r"\d+",
    "tower": r"mask_subnet|mask_fuse",
    "part": r"cls_subnet|cls_score|bbox_subnet|bbox_pred",
    "abc": r"[abc]",
    "affine": r"\w+",
}
# Fields with another text in our names. Other texts of these fields do not match.
_CHANGES = {
    "abc": {"a": "1", "b": "2", "c": "3"},
    "affine": {
        **{"s": "weight", "b": "bias", "gamma": "weight", "beta": "bias"},
        **{"running_mean": "running_mean", "running_var": "running_var"},
        **{"rm": "running_mean", "riv": "running_var"},
    },
}

# Kinds of files: the names that identify one, its table, and the names that are not used here. Any
# other file has our names.
_KINDS: dict[str, tuple[str, Table, str]] = {
    "detectron2": (
        r"backbone\.(bottom_up|fpn_\w+|top_block)\..+|head\.mask_.+",
        _DETECTRON2,
        r"pixel_mean|pixel_std|anchor_generator\..+",
    ),
    "Caffe2": (r"conv1_w|res\d_\d+_branch\d.*", _CAFFE2, r".+"),
    "torchvision": (r"layer\d\.\d+\..+", _TORCHVISION, r"fc\..+"),
    # MobileNets, ConvNeXts, ...
    "torchvision's features": (r"features\.\d+\..+", _FEATURES, r"classifier\..+"),
    "detectron2's backbone": (r"stem\..+|res\d\.\d+\..+", _BACKBONE, r"(stem\.)?(fc|linear)\..+"),
}
OURS = "TensorMask"


def find_kind(names: Collection[str]) -> str:
    """Return the kind of file that has these names: a key of `_KINDS`, or `OURS`."""
    for kind, (mark, _, _) in _KINDS.items():
        if any(re.fullmatch(mark, name) for name in names):
            return kind
    return OURS


def to_our_names(
    names: Collection[str], kind: str, mask_sizes: Sequence[int]
) -> tuple[dict[str, str], list[str]]:
    """Return our names for those in a file, and the names that are left out.

    A name without a row in the table stays the same, or is left out if it is known to be unused.

    Args:
        kind: of the file, as returned by `find_kind`.
        mask_sizes: side of the masks of the finest level, per window size. detectron2 names the
            mask predictors by it, we number them.

    Example:
        >>> to_our_names(["layer1.0.bn1.bias", "fc.bias"], "torchvision", [])
        ({'layer1.0.bn1.bias': 'backbone.res2.0.bn1.bias'}, ['fc.bias'])
    """
    if kind == OURS:
        return {name: name for name in names}, []
    _, table, unused = _KINDS[kind]
    # With a norm, our convolution is the first layer of two.
    with_norm = any(re.fullmatch(r"backbone\.fpn_\w+\.norm\..+", name) for name in names)
    skipped = "fpn.{way}.p{n}.{leaf}" if with_norm else "fpn.{way}.p{n}.0.{leaf}"
    table = tuple(row for row in table if row[1] != skipped)
    numbers = {f"{side:02d}": str(i) for i, side in enumerate(mask_sizes)}
    renamed, left_out = {}, []
    for name in names:
        ours = _rename(name, table, {**_CHANGES, "size": numbers})
        if ours is None and re.fullmatch(unused, name):
            left_out.append(name)
        else:
            renamed[name] = ours or name
    return renamed, left_out


def to_detectron2_names(
    names: Collection[str], mask_sizes: Sequence[int]
) -> tuple[dict[str, str], list[str]]:
    """Return detectron2's names for ours, and the names that it does not have."""
    table = tuple((ours, theirs) for theirs, ours in _DETECTRON2)
    sides = {str(i): f"{side:02d}" for i, side in enumerate(mask_sizes)}
    renamed = {name: _rename(name, table, {"size": sides}) for name in names}
    unknown = [name for name, theirs in renamed.items() if theirs is None]
    return {name: theirs for name, theirs in renamed.items() if theirs is not None}, unknown


def _rename(name: str, table: Table, changes: dict[str, dict[str, str]]) -> str | None:
    """Return the name by the first row that matches; None if no row does."""
    for given, wanted in table:
        if match := _pattern(given).fullmatch(name):
            fields = match.groupdict()
            fields |= {key: changes[key].get(fields[key]) for key in fields.keys() & changes.keys()}
            if None not in fields.values():
                return wanted.format(**fields)
    return None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """Return the pattern of a template, with a group for each field in braces."""
    text = re.sub(r"\\{(\w+)\\}", lambda m: f"(?P<{m[1]}>{_FIELDS[m[1]]})", re.escape(template))
    return re.compile(text)
