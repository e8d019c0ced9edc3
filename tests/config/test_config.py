"""The config tree: defaults, files, overrides, errors."""

import math
from pathlib import Path

import pytest
import yaml
from tiny import CONFIGS

from tensormask.config import CfgNode, get_cfg
from tensormask.config.node import leaves


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load(name: str) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(CONFIGS / name)
    return cfg


# --------------------------------------------------------------------------------------- the tree


def test_defaults_equal_detectron2s():
    cfg = get_cfg()
    assert (cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE) == ("auto", "GeneralizedRCNN")
    assert cfg.MODEL.MASK_ON is False
    assert cfg.MODEL.FPN.FUSE_TYPE == "sum"
    assert cfg.MODEL.PIXEL_MEAN == [103.53, 116.28, 123.675]
    assert cfg.MODEL.RESNETS.OUT_FEATURES == ["res4"]
    assert cfg.MODEL.TENSOR_MASK.BBOX_REG_WEIGHTS == (1.5, 1.5, 0.75, 0.75)
    assert cfg.MODEL.TENSOR_MASK.ALIGNED_ON is False
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS) == (0.001, (30000,))
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS is None
    assert cfg.INPUT.MIN_SIZE_TRAIN == (800,)


def test_configs_share_no_values():
    first = get_cfg()
    first.MODEL.PIXEL_MEAN.append(1.0)
    first.SOLVER.MAX_ITER = 1
    assert get_cfg().MODEL.PIXEL_MEAN == [103.53, 116.28, 123.675]
    assert get_cfg().SOLVER.MAX_ITER == 40000


def test_every_key_is_below_a_comment():
    """A comment explains the keys that follow it, up to the next group."""
    text = (CONFIGS.parent / "tensormask" / "config" / "defaults.py").read_text(encoding="utf-8")
    explained, num_keys = False, 0
    for line in map(str.strip, text.splitlines()):
        if line.startswith("#"):
            explained = True
        elif line.startswith('"') and line.endswith("{"):
            explained = False
        elif line.startswith('"') and '": ' in line:
            assert explained, line
            num_keys += 1
    assert num_keys == len(dict(leaves(get_cfg())))


def test_assigning_an_unknown_name_is_refused():
    cfg = get_cfg()
    with pytest.raises(AttributeError, match="MAX_ITER"):
        cfg.SOLVER.MAX_ITERS = 10


def test_a_frozen_config_cannot_be_changed():
    cfg = get_cfg()
    cfg.freeze()
    with pytest.raises(AttributeError):
        cfg.merge_from_list(["SOLVER.MAX_ITER", "1"])
    assert cfg.SOLVER.MAX_ITER == 40000


def test_dump_reads_back_equal(tmp_path):
    cfg = load("quickstart.yaml")
    overrides = {
        "TEST.EXPECTED_RESULTS": "(('segm', 'AP', 31.5, 3.0),)",
        "MODEL.ANCHOR_GENERATOR.SIZES": "((44, 60), (88, 120))",
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE": "inf",
        "DATASETS.TRAIN": "('a', 'b')",
        "SOLVER.BASE_LR": "1e-05",
        "OUTPUT_DIR": "2024",
    }
    cfg.merge_from_list([word for pair in overrides.items() for word in pair])
    again = get_cfg()
    again.merge_from_file(write(tmp_path, cfg.dump()))
    assert again == cfg
    assert again.TEST.EXPECTED_RESULTS == [["segm", "AP", 31.5, 3.0]]
    assert again.DATASETS.TRAIN == ("a", "b")
    assert again.OUTPUT_DIR == "2024"
    assert math.isinf(again.SOLVER.CLIP_GRADIENTS.NORM_TYPE)


# --------------------------------------------------------------------------------- merging, types


@pytest.mark.parametrize(
    "key, given, expected",
    [
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.MAX_ITER", "9e4", 90000),
        ("SOLVER.STEPS", [1, 2], (1, 2)),
        ("SOLVER.STEPS", "()", ()),
        ("MODEL.PIXEL_STD", "(57.0, 57.0, 57.0)", [57.0, 57.0, 57.0]),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "((44, 60),)", [[44, 60]]),
        ("MODEL.MASK_ON", "True", True),
        ("MODEL.WEIGHTS", "", ""),
        ("MODEL.WEIGHTS", "/some/where.pkl", "/some/where.pkl"),
        ("DATASETS.TRAIN", "('a b/ä.json@images',)", ("a b/ä.json@images",)),
        ("SOLVER.WEIGHT_DECAY_BIAS", "0", 0.0),
        ("SOLVER.WEIGHT_DECAY_BIAS", "None", None),
        ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", ".inf", math.inf),
    ],
)
def test_values_take_the_type_of_the_key(key, given, expected):
    cfg = get_cfg()
    cfg.merge_from_list([key, given])
    value = dict(leaves(cfg))[key]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    "key, given, expected, kind",
    [
        ("SOLVER.MAX_ITER", "abc", "int", "str"),
        ("SOLVER.MAX_ITER", "1.5", "int", "float"),
        ("SOLVER.MAX_ITER", "True", "int", "bool"),
        ("SOLVER.BASE_LR", "fast", "float", "str"),
        ("SOLVER.BASE_LR", 10**400, "float", "int"),
        ("MODEL.MASK_ON", "1", "bool", "int"),
        ("MODEL.WEIGHTS", "None", "str", "NoneType"),
        ("INPUT.MIN_SIZE_TRAIN", "800", "tuple", "int"),
        ("DATASETS.TRAIN", "coco_2017_train", "tuple", "str"),
        ("SOLVER.STEPS", "(None,)", "numbers and strings", "NoneType"),
        ("SOLVER.STEPS", "[[[1]]]", "numbers and strings", "list"),
    ],
)
def test_a_wrong_type_names_key_expected_and_given_type(key, given, expected, kind):
    with pytest.raises(ValueError, match=rf"^{key} takes {expected}, got {kind} "):
        get_cfg().merge_from_list([key, given])


def test_a_single_value_for_a_tuple_shows_how_to_write_it():
    with pytest.raises(ValueError, match=r"write \('shapes_train',\)"):
        get_cfg().merge_from_list(["DATASETS.TRAIN", "shapes_train"])


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("SOLVER.MAX_ITERS", "SOLVER.MAX_ITER"),
        ("solver.max_iter", "SOLVER.MAX_ITER"),
        ("MAX_ITER", "SOLVER.MAX_ITER"),
        ("MODEL.TENSORMASK.NUM_CLASSES", "MODEL.TENSOR_MASK.NUM_CLASSES"),
        ("DATASET.TRAIN", "DATASETS.TRAIN"),
        ("SOLVER.BASE_LR.VALUE", "SOLVER.BASE_LR"),
        ("OUTPUT", "OUTPUT_DIR"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path, key, nearest):
    nested = 1
    for part in reversed(key.split(".")):
        nested = {part: nested}
    message = rf"^{key} is not a config key; the nearest one is {nearest}$"
    with pytest.raises(ValueError, match=message):
        get_cfg().merge_from_list([key, "1"])
    with pytest.raises(ValueError, match=message):
        get_cfg().merge_from_file(write(tmp_path, yaml.safe_dump(nested)))


def test_a_long_unknown_key_is_shortened():
    with pytest.raises(ValueError, match="is not a config key") as info:
        get_cfg().merge_from_list(["a" * 3000, 1])
    assert len(str(info.value)) < 200


def test_a_group_takes_no_value(tmp_path):
    with pytest.raises(ValueError, match=r"MODEL is a group of keys \(MODEL\.DEVICE"):
        get_cfg().merge_from_list(["MODEL", "1"])
    with pytest.raises(ValueError, match="SOLVER is a group of keys"):
        get_cfg().merge_from_file(write(tmp_path, "SOLVER:\n"))


def test_overrides_come_in_pairs():
    with pytest.raises(ValueError, match=r"pairs KEY VALUE.*got 3 words: SOLVER.MAX_ITER 1 SEED"):
        get_cfg().merge_from_list(["SOLVER.MAX_ITER", "1", "SEED"])


def test_a_refused_merge_changes_nothing():
    cfg = get_cfg()
    with pytest.raises(ValueError, match="SEEDS"):
        cfg.merge_from_list(["SOLVER.MAX_ITER", "1", "SEEDS", "2"])
    assert cfg == get_cfg()


@pytest.mark.parametrize(
    "text", ["SEED: 1\nSOLVER: {MAX_ITR: 2}", "_BASE_: a.yaml", "a", "x: !!a b"]
)
def test_text_is_merged_like_a_file(text):
    cfg = get_cfg()
    cfg.merge_from_text("SEED: 5", "text")
    assert cfg.SEED == 5
    with pytest.raises(ValueError, match=r"model\.pth"):
        cfg.merge_from_text(text, "the config in model.pth")
    assert cfg.SEED == 5


def test_merging_another_tree():
    cfg = get_cfg()
    cfg.merge_from_other_cfg(load("quickstart.yaml"))
    assert cfg == load("quickstart.yaml")


# ------------------------------------------------------------------------------------------ files


def test_bases_are_relative_and_overridden(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "SEED: 1\nSOLVER: {MAX_ITER: 10, BASE_LR: 0.5}\n", "grand.yaml")
    write(tmp_path, "_BASE_: grand.yaml\nSEED: 2\n", "parent.yaml")
    child = write(tmp_path / "sub", "_BASE_: ../parent.yaml\nSOLVER: {MAX_ITER: 20}\n")
    cfg = get_cfg()
    cfg.merge_from_file(child)
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (2, 20, 0.5)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected groups of keys"),
        ("- 1\n", "expected groups of keys, got list"),
        ("SEED: [1\n", "not plain YAML"),
        ("_BASE_: 3\n", "a path or a list of paths, got int 3"),
        ("_BASE_: config.yaml\n", "leads back to it"),
        ("_BASE_: other.yaml\nSEED: {A: 1}\n", "SEED"),
        ("[" * 1000, "nested too deeply"),
        ("VERSION: 1\n", "VERSION is 1"),
    ],
)
def test_an_invalid_file_is_a_clear_error(tmp_path, text, message):
    write(tmp_path, "SEED: 1\n", "other.yaml")
    with pytest.raises(ValueError, match=message):
        get_cfg().merge_from_file(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        get_cfg().merge_from_file(write(tmp_path, "_BASE_: nowhere.yaml\n"))
    with pytest.raises(ValueError, match="not a regular file"):
        get_cfg().merge_from_file(str(tmp_path))


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch {marker}']",
        "!!python/object/apply:open ['{marker}', 'w']",
        "!!python/name:os.system",
        "!!python/tuple [1, 2]",
    ],
)
@pytest.mark.parametrize("in_base", [False, True])
def test_a_yaml_with_objects_is_refused_and_not_executed(tmp_path, value, in_base):
    marker = tmp_path / "executed"
    path = write(tmp_path, f"OUTPUT_DIR: {value.format(marker=marker)}\n", "evil.yaml")
    if in_base:
        path = write(tmp_path, "_BASE_: evil.yaml\n")
    with pytest.raises(ValueError, match=r"evil\.yaml is not plain YAML"):
        get_cfg().merge_from_file(path)
    with pytest.raises(ValueError, match=r"allow_unsafe"):
        CfgNode.load_yaml_with_base(str(path), allow_unsafe=True)
    assert not marker.exists()


def test_an_override_is_never_evaluated(tmp_path):
    marker = tmp_path / "executed"
    text = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    cfg = get_cfg()
    cfg.merge_from_list(["OUTPUT_DIR", text])
    assert cfg.OUTPUT_DIR == text
    assert not marker.exists()


def test_exponential_aliases_are_refused_at_once(tmp_path):
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    text = "TEST:\n  EXPECTED_RESULTS: *a29\n"
    bomb = write(tmp_path, "\n".join(["MODEL:", "  RPN:", *(f"    {x}" for x in lines), text]))
    with pytest.raises(ValueError, match=r"TEST\.EXPECTED_RESULTS"):
        get_cfg().merge_from_file(bomb)
