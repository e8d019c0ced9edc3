"""Arbitrary configs: either a merge that keeps all types, or one ValueError and no change.

``TENSORMASK_FUZZ_EXAMPLES=20000`` runs longer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzz import fuzz_examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIGS

from tensormask.config import CfgNode, get_cfg
from tensormask.config.node import leaves

TIME_LIMIT = 10_000  # milliseconds for a file of some kilobytes; a longer time is a loop

fuzz = settings(max_examples=fuzz_examples(40), deadline=TIME_LIMIT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


DEFAULTS, UNCHANGED = dict(leaves(get_cfg())), repr(get_cfg())


def check_merge(merge: Callable[[CfgNode], None], folder: Path) -> None:
    cfg, refusal = get_cfg(), None
    try:
        merge(cfg)
    except (ValueError, OSError) as error:
        refusal = error
    if refusal is not None:
        assert repr(cfg) == UNCHANGED
        assert len(str(refusal)) < 2000
        # The error names a base that cannot be opened.
        assert isinstance(refusal, ValueError) or refusal.filename is not None
        return
    merged = dict(leaves(cfg))
    assert merged.keys() == DEFAULTS.keys()
    for key, value in merged.items():
        of_key = {"SOLVER.WEIGHT_DECAY_BIAS": (float, type(None)), "MODEL.CHANNELS_LAST": (bool,)}
        optional = of_key.get(key, ())
        assert type(value) in (type(DEFAULTS[key]), *optional), key
    # An accepted config can be dumped and read again.
    path = folder / "dumped.yaml"
    path.write_text(cfg.dump(), encoding="utf-8")
    again = get_cfg()
    again.merge_from_file(path)
    assert repr(again) == repr(cfg)


# Names that exist, nearly exist, or have a meaning in YAML.
KEYS = [
    *DEFAULTS,
    *("MODEL", "SOLVER", "MODEL.TENSOR_MASK", "MODEL.RPN", "MODEL.RPN.X", "MODEL.ROI_HEADS.NAME"),
    *("MODEL.KEYPOINT_ON", "SOLVER.AMP.ENABLED", "INPUT.CROP.TYPE", "VIS_PERIOD", "_BASE_", ""),
    *("SOLVER.MAX_ITERS", "SOLVER.BASE_LR.X", ".", "MODEL..DEVICE", "__class__", "<<", "MODEL."),
    "é",
]
WORDS = [
    *("1", "-1", "1e400", "nan", "inf", ".inf", "None", "True", "[]", "()", "(1,)"),
    *("[[1, 2], [3]]", "a" * 3000, "9" * 5000),
    *("{}", "{1: 2}", "'a'", "b'a'", "1_000", "0x10", "1j", "...", "[" * 200, "-" * 300 + "1"),
    *("__import__('os')", "!!python/name:os.system", "\0", "\x1b[31m", "bipyramid", "auto"),
]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
    st.sampled_from(WORDS), st.binary(max_size=3), st.dates(),
)  # fmt: skip
NAMES = st.sampled_from(KEYS) | st.text(max_size=3) | st.integers()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


def nested(flat: dict[Any, Any]) -> dict:
    """Return a tree of names with dots; of two that collide, the first remains."""
    tree: dict = {}
    for key, value in flat.items():
        *groups, leaf = str(key).split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node.setdefault(leaf, value)
    return tree


TREES = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4).map(nested)


@fuzz
@given(words=st.lists(st.one_of(st.sampled_from(KEYS), VALUES), max_size=6))
def test_any_list_of_overrides(folder: Path, words: list[Any]) -> None:
    check_merge(lambda cfg: cfg.merge_from_list(words), folder)


@fuzz
@given(key=st.sampled_from(sorted(DEFAULTS)), value=VALUES | st.text(max_size=30))
def test_any_value_of_a_key(folder: Path, key: str, value: Any) -> None:
    check_merge(lambda cfg: cfg.merge_from_list([key, value]), folder)


@fuzz
@given(tree=TREES)
def test_any_tree(folder: Path, tree: dict) -> None:
    check_merge(lambda cfg: cfg.merge_from_other_cfg(tree), folder)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8", errors="surrogatepass")
    check_merge(lambda cfg: cfg.merge_from_file(path), folder)


@fuzz
@given(base=TREES, tree=TREES)
def test_any_base(folder: Path, base: dict, tree: dict) -> None:
    (folder / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**tree, "_BASE_": "base.yaml"}), encoding="utf-8")
    check_merge(lambda cfg: cfg.merge_from_file(path), folder)


MARKER = "tensormask_fuzz_executed"
YAML_PARTS = [
    *(
        "MODEL:\n",
        "  DEVICE: ",
        "cpu\n",
        "SOLVER: {MAX_ITER: 3}\n",
        "- ",
        "? ",
        ": ",
        "{",
        "}",
        "[",
    ),
    *("]", "&a ", "*a", "<<: *a\n", "|\n", ">-\n", "'", '"', "# ", "---\n", "...\n", "%YAML 1.1\n"),
    *("!!binary ", "!!set ", "!!timestamp ", "!!python/tuple ", "!x ", "\t", "  ", "\n", "=", "~"),
    f"!!python/object/apply:os.mkdir ['{MARKER}']\n",
    *(
        "_BASE_: ",
        "base.yaml\n",
        "config.yaml\n",
        "../",
        "/dev/null\n",
        "1e3",
        "2001-01-01",
        "0o17",
    ),
]


@fuzz
@given(text=st.lists(st.sampled_from(YAML_PARTS) | st.text(max_size=3), max_size=20).map("".join))
def test_any_text(folder: Path, text: str) -> None:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    check_merge(lambda cfg: cfg.merge_from_file(path), folder)
    assert not Path(MARKER).exists()


@fuzz
@given(
    name=st.sampled_from(sorted(path.name for path in CONFIGS.glob("*.yaml"))),
    start=st.integers(0, 1500),
    length=st.integers(0, 8),
    inserted=st.binary(max_size=8) | st.sampled_from([part.encode() for part in YAML_PARTS]),
)
def test_damaged_configs(folder, name: str, start: int, length: int, inserted: bytes) -> None:
    data = (CONFIGS / name).read_bytes()
    start %= len(data)
    base = folder / "Base-TensorMask.yaml"
    base.write_bytes((CONFIGS / base.name).read_bytes())
    path = folder / name
    path.write_bytes(data[:start] + inserted + data[start + length :])
    check_merge(lambda cfg: cfg.merge_from_file(path), folder)
    assert not Path(MARKER).exists()


def test_exponential_merge_keys_are_refused_at_once(folder: Path) -> None:
    """Each line doubles the one before: 20 lines would take seconds, 40 all memory."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 20)]
    path = folder / "config.yaml"
    path.write_text("MODEL:\n  RPN:\n" + "".join(f"    {line}\n" for line in lines))
    with pytest.raises(ValueError, match=r"config\.yaml is not plain YAML"):
        get_cfg().merge_from_file(path)


def test_an_accepted_merge_changes_the_tree(folder: Path) -> None:
    """So the checks above can fail."""
    cfg = get_cfg()
    cfg.merge_from_other_cfg(nested({"SOLVER.MAX_ITER": 3.0, "MODEL.RPN.X": 1, "SEED": 5}))
    assert (cfg.SOLVER.MAX_ITER, cfg.SEED) == (3, 5)
    check_merge(lambda cfg: cfg.merge_from_list(["SOLVER.STEPS", "[1, 2]"]), folder)
