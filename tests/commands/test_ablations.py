"""The rows of the paper's tables: each trains and detects, and each of its options matters."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pycocotools import mask as mask_utils
from tiny import CONFIGS, get_cfg

import tensormask
from tensormask.commands import ablations as run_ablations
from tensormask.config import CfgNode
from tensormask.config.node import leaves
from tensormask.data.shapes import generate_image

ROOT = Path(__file__).parents[2]
ROWS = sorted((CONFIGS / "ablations").glob("*.yaml"))
pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def small(name: str) -> CfgNode:
    """The row on a narrow R-18 with six classes, which detects objects without training."""
    cfg = get_cfg(opts=["MODEL.TENSOR_MASK.NUM_CLASSES", 6, "TEST.DETECTIONS_PER_IMAGE", 20])
    cfg.merge_from_list(run_ablations.row_options(name, num_levels=6))
    return cfg


def shapes(index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A drawn image and its objects as a target."""
    image, objects = generate_image("train", index)
    boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]
    masks = []
    for o in objects:
        rle = o["segmentation"]
        if isinstance(rle, list):
            rle = mask_utils.merge(mask_utils.frPyObjects(rle, 128, 128))
        elif isinstance(rle["counts"], list):
            rle = mask_utils.frPyObjects(rle, 128, 128)
        masks.append(mask_utils.decode(rle))
    target = {
        "boxes": boxes,
        "labels": torch.tensor([o["category_id"] - 1 for o in objects]),
        "masks": torch.from_numpy(np.stack(masks)),
    }
    return torch.from_numpy(image).permute(2, 0, 1), target


def run(cfg: CfgNode) -> dict[str, float]:
    """Losses before and after a training step, and sums over the detections in an image."""
    torch.manual_seed(0)
    model = tensormask.build_model(cfg).train()
    torch.nn.init.normal_(model.head.cls_score.bias, -1.0, 0.5)
    images, targets = zip(*(shapes(i) for i in range(2)), strict=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    numbers = {}
    for step in range(2):
        losses = model(list(images), list(targets))
        numbers |= {f"{name}{step}": loss.item() for name, loss in losses.items()}
        if step == 1:
            break
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    with torch.inference_mode():
        (detected,) = model.eval()([images[0]])
    assert len(detected["scores"]) > 0
    assert detected["masks"].shape[1:] == (128, 128)
    names = ("boxes", "scores", "masks")
    return numbers | {name: detected[name].double().sum().item() for name in names}


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_a_row_runs_and_each_of_its_options_changes_something(path: Path) -> None:
    cfg = small(path.stem)
    numbers = run(cfg)
    assert all(np.isfinite(value) for value in numbers.values())
    base = dict(leaves(run_ablations.read_config(run_ablations.BASE, [])))
    for key in options_of(path):
        without = cfg.clone()
        without.merge_from_list([key, base[key]])
        try:
            changed = run(without)
        except ValueError:  # the other options of the row need it
            continue
        assert changed != numbers, key


def options_of(path: Path) -> list[str]:
    """Full names of the options that a file itself sets."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    del content["_BASE_"]
    return [key for key, _ in leaves(content)]


def test_runs_are_compared_by_what_they_do() -> None:
    """`run` returns equal numbers for equal configs, so that a difference is due to the config."""
    assert run(small("bipyramid")) == run(small("bipyramid"))


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_a_row_is_short_and_has_its_ap(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert 3 <= len(lines) <= 8
    assert any(line.startswith("# Paper, as reported: mask AP ") for line in lines)


def test_all_rows_differ() -> None:
    options = {path.stem: tuple(run_ablations.row_options(path.stem, 6)) for path in ROWS}
    assert len(set(options.values())) == len(ROWS) == 15


def test_sizes_are_cut_to_the_levels_of_the_model() -> None:
    assert run_ablations.row_options("bipyramid", 2) == [run_ablations.SIZES, "[[60], [120]]"]


def test_rows_are_found_by_pattern() -> None:
    assert run_ablations.find_rows(["no_*", "bipyramid"]) == ["bipyramid", "no_box_head"]
    with pytest.raises(ValueError, match="no row is named tripyramid"):
        run_ablations.find_rows(["tripyramid"])


def test_the_table_of_the_command(tmp_path, capsys) -> None:
    """Finished runs are not trained again: the table has their last evaluation."""
    for name, ap in (("bipyramid", 31.25), ("no_box_head", 30.0)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model_final.pth").touch()
        metrics = {f"segm/{metric}": ap for metric in run_ablations.METRICS} | {"bbox/AP": 40.0}
        metrics["segm/APl"] = None
        lines = [{"iteration": 1, "segm/AP": 0.0}, {"iteration": 2, **metrics}, {"iteration": 2}]
        text = "\n".join(str(line).replace("'", '"').replace("None", "null") for line in lines)
        (folder / "metrics.json").write_text(text)
    arguments = ["--config-file", str(CONFIGS / "quickstart.yaml"), "--output", str(tmp_path)]
    assert run_ablations.main([*arguments, "--rows", "bipyramid", "no_box_head"]) == 0
    *_, first, second = capsys.readouterr().out.strip().splitlines()
    assert first == "| bipyramid | 31.2 | 31.2 | 31.2 | 31.2 | 31.2 | - | 40.0 |"
    assert second.startswith("| no_box_head | 30.0 |")
    assert run_ablations.main([*arguments, "--rows", "none"]) == 2


def test_an_unfinished_row_is_trained_and_its_failure_ends_the_command(
    tmp_path, monkeypatch
) -> None:
    def run(command, check):
        assert command[1:3] == ["-m", "tensormask.commands.train"]
        assert command[-2:] == ["OUTPUT_DIR", str(tmp_path / "bipyramid")]
        raise subprocess.CalledProcessError(3, command)

    monkeypatch.setattr(run_ablations.subprocess, "run", run)
    arguments = ["--config-file", str(CONFIGS / "quickstart.yaml"), "--output", str(tmp_path)]
    assert run_ablations.main([*arguments, "--rows", "bipyramid"]) == 3
