"""docs/representation.md: its figures are up to date, its examples run, its tables are correct."""

import doctest
import re
from pathlib import Path

import cv2
import draw_representation
import numpy as np
import pytest
import torch
from PIL import Image

from tensormask.config import get_cfg
from tensormask.modeling.build import build_model, build_windows

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "representation.md").read_text(encoding="utf-8")
FIGURES = sorted((ROOT / "docs").glob("representation_*.png"))


def table_after(heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, without its first two lines."""
    lines = PAGE[PAGE.index(f"\n{heading}\n") :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    last = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines[first + 2 : last]
    ]


# ---- figures ----


def test_the_page_shows_all_figures_of_the_script():
    names = sorted(draw_representation.figures())
    assert [path.name for path in FIGURES] == names
    assert sorted(re.findall(r"\]\((representation_\w+\.png)\)", PAGE)) == names
    assert all(path.stat().st_size < 150_000 for path in FIGURES)


@pytest.mark.skipif(
    int(cv2.__version__.split(".")[0]) < 5, reason="OpenCV 4 writes in another font"
)
def test_figures_are_what_the_script_draws(tmp_path):
    assert draw_representation.main(["--output", str(tmp_path)]) == 0
    for path in FIGURES:
        shown, drawn = (np.asarray(Image.open(p)) for p in (path, tmp_path / path.name))
        assert shown.shape == drawn.shape
        # Interpolation rounds differently on some machines.
        assert np.abs(shown.astype(int) - drawn).mean() < 0.1, f"{path.name} is out of date"


def test_the_natural_tensor_by_brute_force():
    """A pixel is 1 where the nearest object covers at least half of 4 x 4 px of the window."""
    _, masks = draw_representation.read_scene(draw_representation.IMAGE, 1)
    natural = draw_representation.natural_tensor(masks)
    centers = [mask.nonzero().double().mean(0) for mask in masks]
    assert len(masks) == 2
    padded = torch.nn.functional.pad(masks.double(), (40, 40, 40, 40))
    for y, x in [(15, 15), (6, 15), (0, 0), (11, 18), (31, 31), (20, 10)]:
        location = torch.tensor([4.0 * y, 4.0 * x])
        nearest = min((0, 1), key=lambda i: float((centers[i] - location).norm()))
        top, left = 4 * y - 30 + 40, 4 * x - 30 + 40
        cells = padded[nearest, top : top + 60, left : left + 60].reshape(15, 4, 15, 4)
        assert torch.equal(natural[:, :, y, x].bool(), cells.mean((1, 3)) >= 0.5)


def test_iou():
    mask, truth = torch.tensor([[0.9, 0.2], [0.6, 0.4]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert draw_representation.iou(mask, truth) == pytest.approx(1 / 3)


# ---- the page ----


def test_examples():
    source = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    test = doctest.DocTestParser().get_doctest(source, {}, "representation.md", None, 0)
    assert len(test.examples) > 15
    results = doctest.DocTestRunner().run(test)
    assert results.failed == 0


@pytest.mark.parametrize("row", table_after("## The heads"), ids=lambda row: row[0])
def test_heads(row):
    """The options of a head give the channels and masks of the table."""
    _, options, predicted, _, final = row
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / "Base-TensorMask.yaml"))
    cfg.merge_from_list(["MODEL.ANCHOR_GENERATOR.SIZES", [[60 * 2**k] for k in range(6)]])
    cfg.MODEL.DEVICE = "meta"
    cfg.merge_from_list(options.strip("`").split())
    with torch.device("meta"):
        head = build_model(cfg).mask_head
        grids = build_windows(cfg).grids((800, 1344))
        features = [torch.zeros(1, cfg.MODEL.FPN.OUT_CHANNELS, *grid) for grid in grids]
        masks = head.dense(features)
    side = int(re.search(r"\((\d+), ", predicted)[1])
    assert head.mask_pred[0].out_channels == side**2
    assert predicted.startswith("aligned") == head.aligned
    assert ("H_0" in predicted) == head.bipyramid
    for level, (mask,) in enumerate(masks):
        side = 15 * 2**level if "2^k" in final else 15
        assert tuple(mask.shape) == (1, side**2, *grids[level])


def test_sizes_of_the_bipyramid():
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / "Base-TensorMask.yaml"))
    windows = build_windows(cfg)
    expected = []
    for level, (height, width) in enumerate(windows.grids((800, 1344))):
        window, fine = windows.sizes[level][-1], windows.mask_sizes[-1] * 2**level
        expected.append(
            [
                *(windows.level_names[level], f"{height} × {width}", f"{window}"),
                *("15 × 15", f"{window // 15}", f"{fine} × {fine}", f"{window // fine}"),
            ]
        )
    assert table_after("### The tensor bipyramid") == expected


def test_memory_of_the_swap():
    for _, shape, memory in table_after("## Windows left out: swap_align2nat"):
        num_values = np.prod([int(number) for number in re.findall(r"\d+", shape)])
        megabytes = float(memory.removesuffix(" MB").replace(",", ""))
        assert 4 * num_values / 1e6 == pytest.approx(megabytes, rel=0.03)
