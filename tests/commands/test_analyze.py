"""The command `tools/analyze_model.py`: its numbers by hand, and against PyTorch's counter."""

import json

import pytest
import torch
from tiny import CONFIGS, HEADS, build, get_cfg
from torch.utils.flop_counter import FlopCounterMode

import tensormask
from tensormask.commands import analyze as command

SIZE = (96, 130)  # padded to 96 x 160: grids from 24 x 40 to 1 x 2
GRIDS = [(24, 40), (12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]
LOCATIONS = sum(height * width for height, width in GRIDS)


def parts_of(results):
    return {row["part"]: row for row in results["parts"]}


def test_parameters_of_the_paper_s_model():
    cfg = tensormask.get_cfg()
    cfg.merge_from_file(str(CONFIGS / "tensormask_R_50_FPN_1x.yaml"))
    results = command.analyze(cfg, (64, 64))
    parts = parts_of(results)
    assert round(results["parameters"] / 1e6, 1) == 36.5
    assert parts["sum"]["parameters"] == results["parameters"]
    heads = parts["sum"]["parameters"] - sum(parts[n]["parameters"] for n in ("backbone", "fpn"))
    assert round(heads / 1e6, 1) == 4.4
    # Laterals of 1x1; outputs of 3x3 for p2 to p5 and p7, and for p6 from res5.
    laterals = sum((channels + 1) * 256 for channels in (256, 512, 1024, 2048))
    outputs = 5 * (9 * 256 + 1) * 256 + (9 * 2048 + 1) * 256
    assert parts["fpn"]["parameters"] == laterals + outputs


def test_convolutions_by_hand():
    """A 3x3 convolution has 2 * 9 * C_in * C_out FLOPs per location; biases are not counted."""
    parts = parts_of(command.analyze(get_cfg(), SIZE))
    for title in ("all", "some"):  # 3 classes, 2 window sizes, towers of one convolution
        assert parts["cls_subnet"][f"{title}: GFLOP"] * 1e9 == 2 * 9 * 16 * 16 * LOCATIONS
        assert parts["cls_score"][f"{title}: GFLOP"] * 1e9 == 2 * 9 * 16 * 6 * LOCATIONS
        assert parts["bbox_pred"][f"{title}: Mvalues"] * 1e6 == 8 * LOCATIONS
        assert parts["bbox_pred"][f"{title}: MiB"] * 2**20 == 4 * 8 * LOCATIONS
    # On the bipyramid all levels have p2's grid: 6 times both mask sizes.
    masks = 6 * 2 * 16 * (15**2 + 11**2) * 24 * 40
    assert parts["mask_pred"]["all: GFLOP"] * 1e9 == pytest.approx(masks)
    assert parts["mask_pred"]["some: GFLOP"] < parts["mask_pred"]["all: GFLOP"]


@pytest.mark.parametrize("head", HEADS)
def test_sum_equals_the_one_of_pytorch(head):
    cfg, model = get_cfg(head), build(head).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        features = model.fpn(model.backbone(torch.zeros(1, 3, 96, 160)))
        model.head(features)
        model.mask_head.dense(features)
    total = parts_of(command.analyze(cfg, SIZE))["sum"]
    assert total["all: GFLOP"] * 1e9 == pytest.approx(counter.get_total_flops())
    assert total["some: GFLOP"] <= total["all: GFLOP"]


def test_levels():
    levels = command.analyze(get_cfg(), SIZE)["levels"]
    assert [row["level"] for row in levels] == ["p2", "p3", "p4", "p5", "p6", "p7"]
    assert [row["grid"] for row in levels] == [f"{h} x {w}" for h, w in GRIDS]
    assert [row["windows"] for row in levels] == [2 * h * w for h, w in GRIDS]
    assert sum(row["with detections"] for row in levels) == 100
    assert levels[5]["mask px"] == "352, 480"
    assert levels[5]["masks of all, MiB"] * 2**18 == 2 * (352**2 + 480**2)


def test_a_model_without_masks():
    """The rows of its mask head are left out."""
    results = command.analyze(get_cfg(opts=["MODEL.MASK_ON", False]), SIZE)
    assert set(parts_of(results)) == {
        *("backbone", "fpn", "cls_subnet", "cls_score", "bbox_subnet", "bbox_pred", "sum")
    }
    assert "mask px" not in results["levels"][0]


def test_command(tmp_path, capsys):
    config, file = tmp_path / "config.yaml", tmp_path / "numbers.json"
    config.write_text(get_cfg().dump())
    options = ["--config-file", str(config), "--size", "96", "130", "--json", str(file)]
    assert command.main([*options, "TEST.DETECTIONS_PER_IMAGE", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "7 detections" in lines[0]
    assert [line.split()[0] for line in lines[2:4]] == ["backbone", "fpn"]
    levels = json.loads(file.read_text())["levels"]
    assert sum(row["with detections"] for row in levels) == 7


@pytest.mark.parametrize("words", [["--size", "0", "64"], ["MODEL.NO_SUCH_KEY", "1"]])
def test_user_errors_are_one_line(tmp_path, capsys, words):
    config = tmp_path / "config.yaml"
    config.write_text(get_cfg().dump())
    assert command.main(["--config-file", str(config), *words]) == 2
    assert capsys.readouterr().err.startswith("error: ")
