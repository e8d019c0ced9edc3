"""The command `visualize windows`: its counts and views are those of the model."""

import functools
import itertools
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from tensormask.commands import visualize_windows
from tensormask.layers import representation, swap_align2nat, up_align2nat
from tensormask.modeling.inspect import aligned_tensor, aligned_units, natural_masks
from tensormask.predictor import Predictor

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 64, 96
THRESHOLD = 0.6


@functools.cache
def build(head: str, *opts):
    """A model whose scores and masks differ between windows."""
    model = tiny.build(head, list(opts)).eval()
    with torch.no_grad():
        model.head.cls_score.weight.normal_(std=0.05)
        model.head.cls_score.bias.zero_()
        for pred in model.mask_head.mask_pred if model.mask_head else ():
            pred.weight.normal_()
    return model


def save_run(folder: Path, head: str = "bipyramid", opts=()) -> list[str]:
    """Save a config, a checkpoint and an image, and return the command line that uses them."""
    opts = ["INPUT.MIN_SIZE_TEST", 0, *opts]
    model = build(head, *opts)
    (folder / "config.yaml").write_text(tiny.get_cfg(head, opts).dump())
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    rgb = tiny.make_image(HEIGHT, WIDTH).permute(1, 2, 0).numpy()
    Image.fromarray(rgb).save(folder / "image.png")
    paths = {"config-file": "config.yaml", "weights": "model.pth", "input": "image.png"}
    words = [(f"--{option}", str(folder / name)) for option, name in paths.items()]
    return [word for pair in words for word in pair] + ["--output", str(folder / "out")]


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """The folder and the command line of one run, for tests that only read it."""
    folder = tmp_path_factory.mktemp("run")
    return folder, save_run(folder)


def inspected(head: str):
    model = build(head)
    return model, model.inspect(tiny.make_image(HEIGHT, WIDTH), score_threshold=THRESHOLD)


def dense_masks(model, inspection, level: int, size: int) -> Tensor:
    """All masks by the head's definition, (V, U, H, W)."""
    (masks,) = model.mask_head.dense(inspection.features)[level][size]
    side = round(len(masks) ** 0.5)
    return masks.unflatten(0, (side, side))


# ---- the inspection of a model ----


@pytest.mark.parametrize("head", tiny.HEADS)
@torch.no_grad()
def test_natural_masks_are_those_of_the_dense_tensor(head):
    model, inspection = inspected(head)
    for level, index in ((0, [3, 5]), (1, [7, 11]), (3, [0, 1])):
        for size in range(model.windows.num_sizes):
            indices = torch.tensor([index, [0, 0]])
            masks = natural_masks(model.mask_head, inspection.features, level, size, indices)
            dense = dense_masks(model, inspection, level, size)
            for mask, (y, x) in zip(masks, indices.tolist(), strict=True):
                torch.testing.assert_close(mask, dense[:, :, y, x], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head", ["natural", "upscale_natural"])
@torch.no_grad()
def test_the_aligned_view_of_a_natural_head_by_brute_force(head):
    """A(v, u, y, x) is the prediction of the window v rows and u columns before (y, x)."""
    model, inspection = inspected(head)
    aligned = aligned_tensor(model.mask_head, inspection.features, 1, 0)
    natural = dense_masks(model, inspection, 1, 0)
    side, _, height, width = natural.shape
    assert aligned.shape == natural.shape
    for row, column in itertools.product(range(0, side, 4), range(0, side, 3)):
        v, u = row - side // 2, column - side // 2
        for y, x in itertools.product(range(height), range(width)):
            inside = 0 <= y - v < height and 0 <= x - u < width
            expected = float(natural[row, column, y - v, x - u]) if inside else -6.0
            assert float(aligned[row, column, y, x]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("head", [head for head in tiny.HEADS if "natural" not in head])
@torch.no_grad()
def test_the_aligned_view_of_an_aligned_head_makes_its_masks(head):
    model, inspection = inspected(head)
    for level in (0, 2):
        aligned = aligned_tensor(model.mask_head, inspection.features, level, 0)
        dense = dense_masks(model, inspection, level, 0)
        if "bipyramid" in head:
            # At the border the op differs from the composition.
            steps = model.mask_head.lambdas[level]
            natural = representation.swap_align2nat(aligned, steps)
            inner = slice(steps // 2, len(natural) - steps // 2)
            natural, dense = natural[inner, inner], dense[inner, inner]
        else:
            mode = model.mask_head.upscale_mode
            natural = up_align2nat(aligned, model.mask_head.upscale, mode=mode)
        torch.testing.assert_close(natural, dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "head, level",
    [("aligned", 2), ("upscale_aligned", 1), ("bipyramid", 2), ("finer_bipyramid", 1)],
)
def test_where_a_window_reads_its_mask(head, level):
    """On a ramp, whose values are the row, each mask pixel reads its row."""
    mask_head = build(head).mask_head
    steps, alpha = aligned_units(mask_head, level)
    side = round(mask_head.mask_pred[0].out_channels ** 0.5)
    ramp = torch.arange(130.0)[:, None].expand(side, side, 130, 130)
    if "bipyramid" in head:
        (natural,) = swap_align2nat(ramp.flatten(0, 1)[None], steps)
        natural = natural.unflatten(0, (side * steps, side * steps))
    else:
        natural = up_align2nat(ramp, mask_head.upscale)
    num_rows, border = len(natural), steps // 2  # the border is mixed with padding
    assert num_rows == side * alpha
    for y, row in itertools.product((10, 15), range(border, num_rows - border)):
        offset = (row - (num_rows - 1) / 2) / alpha  # in pixels of the predicted mask
        read = float(natural[row, num_rows // 2, y, 15])
        assert read == pytest.approx(steps * y + alpha * offset, abs=1e-3)


def test_units_of_the_natural_heads():
    for head in ("natural", "upscale_natural"):
        assert aligned_units(build(head).mask_head, 3) == (1, 1.0)


@pytest.mark.parametrize(
    "opts", [(), ("MODEL.TENSOR_MASK.BOX_ON", False, "MODEL.TENSOR_MASK.NMS_ON", "masks")]
)
@torch.no_grad()
def test_the_detections_are_the_models(opts):
    opts = [*opts, "TEST.DETECTIONS_PER_IMAGE", 500]
    model, image = build("aligned", *opts), tiny.make_image(HEIGHT, WIDTH)
    inspection = model.inspect(image, score_threshold=THRESHOLD)
    (found,) = model.detect([image])  # at a threshold of 0.05
    above = found["scores"] > THRESHOLD
    assert 0 < above.sum() < len(above)
    for name in ("boxes", "scores", "labels", "windows"):
        torch.testing.assert_close(getattr(inspection.detections, name), found[name][above])


# ---- the command ----


@pytest.mark.parametrize("head", ["bipyramid", "natural"])
@torch.no_grad()
def test_command_counts_and_draws(head, tmp_path, capsys, monkeypatch):
    command, shown = save_run(tmp_path, head), {}
    for name in ("natural_view", "aligned_view"):
        recorder = mock.Mock(wraps=getattr(visualize_windows, name))
        monkeypatch.setattr(visualize_windows, name, recorder)
        shown[name] = recorder.call_args_list
    assert visualize_windows.main([*command, "--threshold", str(THRESHOLD)]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [*(f"level_p{level}.png" for level in range(2, 8)), "windows.png"]
    assert lines[-1].startswith("6 levels")

    model = build(head, "INPUT.MIN_SIZE_TEST", 0)
    monkeypatch.setattr(model, "score_threshold", THRESHOLD)
    image = tiny.make_image(HEIGHT, WIDTH)
    inspection = model.inspect(image, score_threshold=THRESHOLD)
    _, logits, *_ = model.dense([image])
    (found,) = model.detect([image])
    dense = model.mask_head.dense(inspection.features)
    sides = (found["windows"][:, 2] - found["windows"][:, 0]).tolist()
    rows = [line.split() for line in lines[1:-1]]
    pairs = list(itertools.product(range(6), range(model.windows.num_sizes)))
    num_fired = 0
    for (level, size), row, natural, aligned in zip(
        pairs, rows, shown["natural_view"], shown["aligned_view"], strict=True
    ):
        side, classes = model.windows.sizes[level][size], range(3 * size, 3 * size + 3)
        scores = logits[level][0, classes].sigmoid()
        fired = int((scores > THRESHOLD).any(0).sum())
        num_fired += fired
        counts = f"{scores[0].numel()} {fired} {sides.count(side)}"
        assert " ".join(row[:6]) == f"p{level + 2} {side} px {counts}"
        # The tiles are masks, and slices of the aligned tensor at their offsets.
        masks, ys, xs, *_ = natural.args
        (expected,) = dense[level][size].sigmoid().unflatten(1, masks.shape[2:])
        for (i, y), (j, x) in itertools.product(enumerate(ys), enumerate(xs)):
            np.testing.assert_allclose(masks[i, j], expected[:, :, y, x], atol=1e-4)
        slices, (vs, us), *_ = aligned.args
        tensor = aligned_tensor(model.mask_head, inspection.features, level, size).sigmoid()
        middle = (len(tensor) - 1) / 2
        for (i, v), (j, u) in itertools.product(enumerate(vs), enumerate(us)):
            expected = tensor[int(v + middle), int(u + middle)]
            np.testing.assert_allclose(slices[i, j], expected, atol=1e-5)
    assert 0 < num_fired < sum(int(row[3]) for row in rows)


def test_levels_and_images_without_detections(saved_run, tmp_path, capsys):
    command = [*saved_run[1], "--output", str(tmp_path)]
    command += ["--threshold", "0.999", "--levels", "p4,p2"]
    assert visualize_windows.main(command) == 0
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["level_p2.png", "level_p4.png", "windows.png"]
    assert [line.split()[4] for line in capsys.readouterr().out.splitlines()[1:-1]] == ["0"] * 4


def test_without_a_mask_head_only_windows_are_drawn(tmp_path):
    command = save_run(tmp_path, opts=["MODEL.MASK_ON", False])
    assert visualize_windows.main([*command, "--levels", "p2"]) == 0
    # Of each window size one row of panels, with titles.
    height = Image.open(tmp_path / "out" / "level_p2.png").height
    assert height < 2 * (visualize_windows.PANEL_SIDE + 50)


@torch.no_grad()
def test_windows_that_fire_are_drawn(saved_run):
    folder, _ = saved_run
    predictor = Predictor(str(folder / "config.yaml"), folder / "model.pth")
    rgb = np.full((HEIGHT, WIDTH, 3), 100, np.uint8)
    inspection = predictor.model.inspect(tiny.make_image(HEIGHT, WIDTH), score_threshold=0.999)
    assert not len(inspection.detections.scores)
    dark = visualize_windows.draw_fired(predictor, inspection, rgb, 0, 0)
    assert (dark == dark[0, 0]).all()
    inspection.scores[0][0][8, 12] = 1.0  # the window around (48, 32): x from 26 to 70
    drawn = visualize_windows.draw_fired(predictor, inspection, rgb, 0, 0)
    changed = np.nonzero((drawn != dark).any(2))
    scale = drawn.shape[1] // WIDTH
    assert (changed[1].min(), changed[1].max()) == (26 * scale, 70 * scale - 1)
    assert (changed[0].min(), changed[0].max()) == (10 * scale, 54 * scale - 1)


def test_a_page_of_all_windows(saved_run, tmp_path, capsys):
    pytest.importorskip("jinja2")
    folder, command = saved_run
    page, words = tmp_path / "new" / "a.html", command[:-4]
    words += ["--html", str(folder / "image.png"), "--levels", "p3,p5"]
    assert visualize_windows.main([*words, "--output", str(page)]) == 0
    assert capsys.readouterr().out.strip().endswith("MB, open it in a browser")
    html = page.read_text(encoding="utf-8")
    assert "model.pth on image.png</h1>" in html
    assert [f"{name}, " in html for name in ("p2", "p3", "p4", "p5")] == [False, True, False, True]


def test_mistakes_are_one_line(saved_run, tmp_path, capsys):
    command = [*saved_run[1], "--output", str(tmp_path)]
    for more, message in (
        (["--threshold", "1.5"], "score in 0..1"),
        (["--levels", "p2,p9"], "unknown level p9; the model's levels are p2, p3"),
        (["--input", str(tmp_path / "no.png")], "no.png"),
        (["image.png"], "give one image, as INPUT or by --input"),
        (["--html"], "is a folder: --html writes one file"),
        (["MODEL.TENSOR_MASK.HAED", "bipyramid"], "HEAD"),
    ):
        assert visualize_windows.main([*command, *more]) == 2
        error = capsys.readouterr().err.strip()
        assert error.splitlines()[-1].startswith("error: ")
        assert message in error.splitlines()[-1]


def test_the_image_is_not_overwritten(saved_run, tmp_path, capsys):
    folder, command = saved_run
    image = tmp_path / "level_p3.png"
    image.write_bytes((folder / "image.png").read_bytes())
    before = image.read_bytes()
    assert visualize_windows.main([*command, "--output", str(tmp_path), "--input", str(image)]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert image.read_bytes() == before
