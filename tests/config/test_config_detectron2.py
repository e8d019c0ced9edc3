"""detectron2's config files load, and our YAML files equal its files and the paper's settings."""

import logging
from pathlib import Path

import pytest
import yaml
from tiny import CONFIGS

from tensormask.config import CfgNode, config_names, get_cfg


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(name: str | Path) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(CONFIGS / name)
    return cfg


# Keys of a config.yaml that detectron2 dumps for its TensorMask, and that our tree lacks.
DETECTRON2_ONLY = """
DATALOADER: {REPEAT_SQRT: true, REPEAT_THRESHOLD: 0.0, SAMPLER_TRAIN: TrainingSampler}
DATASETS:
  PRECOMPUTED_PROPOSAL_TOPK_TEST: 1000
  PRECOMPUTED_PROPOSAL_TOPK_TRAIN: 2000
  PROPOSAL_FILES_TEST: []
  PROPOSAL_FILES_TRAIN: []
GLOBAL: {HACK: 1.0}
INPUT:
  CROP: {ENABLED: false, SIZE: [0.9, 0.9], TYPE: relative_range}
MODEL:
  ANCHOR_GENERATOR: {ANGLES: [[-90, 0, 90]], NAME: DefaultAnchorGenerator, OFFSET: 0.0}
  BACKBONE: {NAME: build_retinanet_resnet_fpn_backbone}
  KEYPOINT_ON: false
  LOAD_PROPOSALS: false
  PANOPTIC_FPN: {COMBINE: {ENABLED: true, OVERLAP_THRESH: 0.5}, INSTANCE_LOSS_WEIGHT: 1.0}
  PROPOSAL_GENERATOR: {MIN_SIZE: 0, NAME: RPN}
  RESNETS:
    DEFORM_MODULATED: false
    DEFORM_NUM_GROUPS: 1
    DEFORM_ON_PER_STAGE: [false, false, false, false]
    NUM_GROUPS: 1
    RES2_OUT_CHANNELS: 256
    RES5_DILATION: 1
    STEM_OUT_CHANNELS: 64
    WIDTH_PER_GROUP: 64
  RETINANET: {BBOX_REG_WEIGHTS: &id002 [1.0, 1.0, 1.0, 1.0], NUM_CLASSES: 80}
  ROI_BOX_CASCADE_HEAD: {BBOX_REG_WEIGHTS: [&id001 [10.0, 10.0, 5.0, 5.0]], IOUS: [0.5, 0.6, 0.7]}
  ROI_BOX_HEAD: {BBOX_REG_WEIGHTS: *id001, NAME: ''}
  ROI_HEADS: {NAME: Res5ROIHeads, NUM_CLASSES: 80}
  ROI_KEYPOINT_HEAD: {NUM_KEYPOINTS: 17}
  ROI_MASK_HEAD: {NAME: MaskRCNNConvUpsampleHead}
  RPN: {BBOX_REG_WEIGHTS: *id002, IN_FEATURES: [res4]}
  SEM_SEG_HEAD: {IGNORE_VALUE: 255}
SOLVER: {NUM_DECAYS: 3, REFERENCE_WORLD_SIZE: 0, RESCALE_INTERVAL: false}
TEST:
  AUG:
    ENABLED: false
    FLIP: true
    MAX_SIZE: 4000
    MIN_SIZES: [400, 500, 600, 700, 800, 900, 1000, 1100, 1200]
  KEYPOINT_OKS_SIGMAS: []
  PRECISE_BN: {ENABLED: false, NUM_ITER: 200}
VERSION: 2
VIS_PERIOD: 0
"""

OURS_ONLY = {
    *("DETERMINISTIC", "MODEL.CHANNELS_LAST", "MODEL.COMPILE", "MODEL.SIZE_DIVISOR", "TEST.AMP"),
    *("SOLVER.ACCUMULATE_STEPS", "SOLVER.AMP.DTYPE", "SOLVER.CHECKPOINT_BEST"),
    *("SOLVER.CHECKPOINT_MAX_TO_KEEP", "SOLVER.DETECT_ANOMALY", "SOLVER.EMA.DECAY"),
    *("SOLVER.EMA.ENABLED", "SOLVER.OPTIMIZER"),
    *("TEST.MAX_DETS", "TEST.NUM_VISUALIZED", "TEST.ORACLE_ON"),
    *(f"MODEL.TENSOR_MASK.{key}" for key in ("BOX_ON", "CHECKPOINT_ACTIVATIONS", "HEAD", "INIT")),
    *(f"MODEL.TENSOR_MASK.{key}" for key in ("NMS_ON", "UPSCALE_LAMBDA", "UPSCALE_MODE")),
}


def overlay(low: dict, high: dict) -> dict:
    merged = dict(low)
    for key, value in high.items():
        inner = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = overlay(merged[key], value) if inner else value
    return merged


def detectron2_dump(cfg: CfgNode) -> dict:
    """Return the content of detectron2's dump of the same settings."""
    dump = overlay(yaml.safe_load(cfg.dump()), yaml.safe_load(DETECTRON2_ONLY))
    for key in OURS_ONLY:
        *groups, leaf = key.split(".")
        node = dump
        for group in groups:
            node = node[group]
        del node[leaf]
    return dump


def test_a_dump_of_detectron2_loads_with_one_line_in_the_log(tmp_path, caplog):
    settings = load("tensormask_R_50_FPN_6x.yaml")
    settings.MODEL.DEVICE = "cuda"
    path = write(tmp_path, yaml.safe_dump(detectron2_dump(settings)))
    cfg = get_cfg()
    with caplog.at_level(logging.INFO):
        cfg.merge_from_file(path)
    settings.MODEL.TENSOR_MASK.HEAD = "auto"  # detectron2 has the two switches only
    assert cfg == settings
    (record,) = caplog.records
    named = set(record.getMessage().partition(": ")[2].split(", "))
    assert {"MODEL.RPN", "MODEL.ROI_HEADS", "MODEL.RETINANET", "GLOBAL.HACK"} <= named
    assert {"MODEL.BACKBONE.NAME", "TEST.PRECISE_BN.ENABLED"} <= named
    assert "VERSION" not in named


# The settings of detectron2's three files, with tuples as strings.
DETECTRON2_BASE = {
    **{"VERSION": 2, "MODEL.META_ARCHITECTURE": "TensorMask", "MODEL.MASK_ON": True},
    "DATASETS.TRAIN": "('coco_2017_train',)",
    "DATASETS.TEST": "('coco_2017_val',)",
    "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.FUSE_TYPE": "avg",
    "MODEL.ANCHOR_GENERATOR.SIZES": [[44 * 2**k, 60 * 2**k] for k in range(6)],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0]],
    "MODEL.TENSOR_MASK.ALIGNED_ON": True,
    "MODEL.TENSOR_MASK.BIPYRAMID_ON": True,
    **{"SOLVER.IMS_PER_BATCH": 16, "SOLVER.BASE_LR": 0.02, "SOLVER.MAX_ITER": 90000},
    "SOLVER.STEPS": "(60000, 80000)",
}
DETECTRON2_1X = {
    "_BASE_": "Base-TensorMask.yaml",
    "MODEL.WEIGHTS": "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
    "MODEL.RESNETS.DEPTH": 50,
}
DETECTRON2_6X = {
    **DETECTRON2_1X,
    **{"SOLVER.STEPS": "(480000, 520000)", "SOLVER.MAX_ITER": 540000},
    **{"INPUT.MIN_SIZE_TRAIN": "(640, 800)", "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"},
}


def nested(settings: dict) -> dict:
    tree: dict = {}
    for key, value in settings.items():
        *groups, leaf = key.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return tree


@pytest.mark.parametrize(
    "name, settings",
    [
        ("tensormask_R_50_FPN_1x.yaml", DETECTRON2_1X),
        ("tensormask_R_50_FPN_6x.yaml", DETECTRON2_6X),
    ],
)
def test_detectron2s_files_equal_ours_of_the_same_name(tmp_path, name, settings):
    for file, content in (("Base-TensorMask.yaml", DETECTRON2_BASE), (name, settings)):
        (tmp_path / file).write_text(yaml.safe_dump(nested(content)))
    theirs, ours = get_cfg(), load(name)
    theirs.merge_from_file(tmp_path / name)
    ours.MODEL.TENSOR_MASK.HEAD = "auto"
    assert theirs == ours


def test_r_101_differs_from_r_50_in_depth_and_weights():
    expected = load("tensormask_R_50_FPN_6x.yaml")
    expected.MODEL.RESNETS.DEPTH = 101
    expected.MODEL.WEIGHTS = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
    assert load("tensormask_R_101_FPN_6x.yaml") == expected


# ------------------------------------------------------------ the mask head: by name or by switches


def head_of(cfg: CfgNode) -> tuple:
    options = cfg.MODEL.TENSOR_MASK
    return options.HEAD, options.ALIGNED_ON, options.BIPYRAMID_ON


def test_a_head_sets_the_switches_and_a_switch_the_head():
    cfg = load("Base-TensorMask.yaml")
    assert head_of(cfg) == ("bipyramid", True, True)
    cfg.merge_from_list(["MODEL.TENSOR_MASK.HEAD", "upscale_natural"])
    assert head_of(cfg) == ("upscale_natural", False, False)
    cfg.merge_from_list(["MODEL.TENSOR_MASK.ALIGNED_ON", "True"])
    assert head_of(cfg) == ("auto", True, False)
    cfg.merge_from_other_cfg({"MODEL": {"TENSOR_MASK": {"HEAD": "bipyramid"}}})
    assert head_of(cfg) == ("bipyramid", True, True)
    cfg.merge_from_list(["MODEL.TENSOR_MASK.HEAD", "auto"])
    assert head_of(cfg) == ("auto", True, True)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("MODEL: {TENSOR_MASK: {HEAD: simple_aligned}}", ("simple_aligned", True, False)),
        ("MODEL: {TENSOR_MASK: {BIPYRAMID_ON: False}}", ("auto", True, False)),
        ("MODEL.TENSOR_MASK.HEAD: simple_natural", ("simple_natural", False, False)),
        ("SEED: 3", ("bipyramid", True, True)),
    ],
)
def test_a_file_overrides_the_head_of_its_base(tmp_path, text, expected):
    path = write(tmp_path, f"_BASE_: {CONFIGS / 'Base-TensorMask.yaml'}\n{text}\n")
    cfg = get_cfg()
    cfg.merge_from_file(path)
    assert head_of(cfg) == expected
    again = get_cfg()
    again.merge_from_file(write(tmp_path, cfg.dump()))
    assert again == cfg


def test_head_and_switch_in_one_source_are_both_kept():
    cfg = get_cfg()
    words = ["MODEL.TENSOR_MASK.HEAD", "bipyramid", "MODEL.TENSOR_MASK.ALIGNED_ON", "False"]
    cfg.merge_from_list(words)
    assert head_of(cfg) == ("bipyramid", False, False)  # build_model refuses this


@pytest.mark.parametrize(
    "text", ["MODEL: 3\nMODEL.TENSOR_MASK.HEAD: bipyramid", "MODEL: {TENSOR_MASK: {HEAD: [1]}}"]
)
def test_a_head_in_a_malformed_file(tmp_path, text):
    with pytest.raises(ValueError, match=r"MODEL"):
        get_cfg().merge_from_file(write(tmp_path, text))


def test_our_files_have_no_ignored_keys(caplog):
    for path in CONFIGS.rglob("*.yaml"):
        load(path.relative_to(CONFIGS))
    assert not caplog.records


def test_ignored_overrides_are_logged(caplog):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", "3", "VIS_PERIOD", "0", "SEED", "5"])
    assert cfg.SEED == 5
    (record,) = caplog.records
    assert record.getMessage().endswith(": MODEL.ROI_HEADS, VIS_PERIOD")


@pytest.mark.parametrize(
    "key, value",
    [
        *(("MODEL.KEYPOINT_ON", "True"), ("MODEL.LOAD_PROPOSALS", "True")),
        *(("TEST.PRECISE_BN.ENABLED", "True"), ("VIS_PERIOD", "100")),
        *(("MODEL.RESNETS.NUM_GROUPS", "32"), ("MODEL.RESNETS.RES5_DILATION", "2")),
        ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", "(False, True, True, True)"),
        ("MODEL.ANCHOR_GENERATOR.OFFSET", "0.5"),
        ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
        ("DATASETS.PROPOSAL_FILES_TRAIN", "('a.pkl',)"),
    ],
)
def test_an_unsupported_feature_is_refused(tmp_path, key, value):
    message = rf"^{key} is .*not supported here"
    with pytest.raises(ValueError, match=message):
        get_cfg().merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        get_cfg().merge_from_file(write(tmp_path, f'{key}: "{value}"\n'))


# ------------------------------------------------------------------------------------- YAML files


def test_quickstart_trains_on_shapes():
    cfg = load("quickstart.yaml")
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("shapes_train",), ("shapes_val",))
    assert cfg.MODEL.TENSOR_MASK.NUM_CLASSES == 6
    assert cfg.MODEL.WEIGHTS == ""
    assert cfg.SEED >= 0


@pytest.mark.parametrize("name", config_names())
def test_a_file_begins_with_what_it_is_and_the_command_that_runs_it(name):
    first, second = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith("# ")
    assert second == f"# tensormask train --config-file {name}"
