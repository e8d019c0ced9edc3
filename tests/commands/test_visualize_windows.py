"""The command `tools/visualize_windows.py`: what it counts and shows is what the model says."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from tensormask.commands import visualize_windows
from tensormask.layers import representation, swap_align2nat, up_align2nat
from tensormask.modeling.inspect import aligned_tensor, aligned_units, look, natural_masks
from tensormask.predictor import Predictor

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 64, 96
THRESHOLD = 0.6


def build(head: str, opts=()):
    """A model whose scores and masks differ from window to window."""
    model = tiny.build(head, opts).eval()
    with torch.no_grad():
        model.head.cls_score.weight.normal_(std=0.05)
        model.head.cls_score.bias.zero_()
        for pred in model.mask_head.mask_pred if model.mask_head else ():
            pred.weight.normal_()
    return model


def save_run(folder: Path, head: str = "bipyramid", opts=()) -> list[str]:
    """A config, a checkpoint and an image in `folder`, and the command line that uses them."""
    opts = ["INPUT.MIN_SIZE_TEST", 0, *opts]
    model = build(head, opts)
    (folder / "config.yaml").write_text(tiny.get_cfg(head, opts).dump())
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    rgb = tiny.make_image(HEIGHT, WIDTH).permute(1, 2, 0).numpy()
    Image.fromarray(rgb).save(folder / "image.png")
    paths = {"config-file": "config.yaml", "weights": "model.pth", "input": "image.png"}
    words = [(f"--{option}", str(folder / name)) for option, name in paths.items()]
    return [word for pair in words for word in pair] + ["--output", str(folder / "out")]


def dense_masks(model, seen, level: int, size: int) -> Tensor:
    """All masks by the head's definition, (V, U, H, W)."""
    (masks,) = model.mask_head.dense(seen.features)[level][size]
    side = round(len(masks) ** 0.5)
    return masks.unflatten(0, (side, side))


# ---- what the model says ----


@pytest.mark.parametrize("head", tiny.HEADS)
@torch.no_grad()
def test_natural_masks_are_those_of_the_dense_tensor(head):
    model = build(head)
    seen = look(model, tiny.make_image(HEIGHT, WIDTH), THRESHOLD)
    for level, place in ((0, [3, 5]), (1, [7, 11]), (3, [0, 1])):
        for size in range(model.windows.num_sizes):
            places = torch.tensor([place, [0, 0]])
            masks = natural_masks(model.mask_head, seen.features, level, size, places)
            dense = dense_masks(model, seen, level, size)
            for mask, (y, x) in zip(masks, places.tolist(), strict=True):
                torch.testing.assert_close(mask, dense[:, :, y, x], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head", ["natural", "upscale_natural"])
@torch.no_grad()
def test_the_aligned_view_of_a_natural_head_by_brute_force(head):
    """A(v, u, y, x) is what the window v rows and u columns before the place says of it."""
    model = build(head)
    seen = look(model, tiny.make_image(HEIGHT, WIDTH), THRESHOLD)
    aligned = aligned_tensor(model.mask_head, seen.features, 1, 0)
    natural = dense_masks(model, seen, 1, 0)
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
    model = build(head)
    seen = look(model, tiny.make_image(HEIGHT, WIDTH), THRESHOLD)
    for level in (0, 2):
        aligned = aligned_tensor(model.mask_head, seen.features, level, 0)
        dense = dense_masks(model, seen, level, 0)
        if head == "bipyramid":
            # The op's rim differs from the composition's.
            steps = 2**level
            natural = representation.swap_align2nat(aligned, steps)
            rim = slice(steps // 2, len(natural) - steps // 2)
            natural, dense = natural[rim, rim], dense[rim, rim]
        else:
            mode = model.mask_head.upscale_mode
            natural = up_align2nat(aligned, model.mask_head.upscale, mode=mode)
        torch.testing.assert_close(natural, dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head, level", [("aligned", 2), ("upscale_aligned", 1), ("bipyramid", 2)])
def test_where_a_window_reads_its_mask(head, level):
    """On a ramp, where each place holds its own row, what is read is the row."""
    mask_head = tiny.build(head).mask_head
    steps, alpha = aligned_units(mask_head, level)
    side = round(mask_head.mask_pred[0].out_channels ** 0.5)
    ramp = torch.arange(130.0)[:, None].expand(side, side, 130, 130)
    if head == "bipyramid":
        (natural,) = swap_align2nat(ramp.flatten(0, 1)[None], steps)
        natural = natural.unflatten(0, (side * steps, side * steps))
    else:
        natural = up_align2nat(ramp, mask_head.upscale)
    num_rows, rim = len(natural), steps // 2  # where the padding is mixed in
    assert num_rows == side * alpha
    for y, row in itertools.product((10, 15), range(rim, num_rows - rim)):
        offset = (row - (num_rows - 1) / 2) / alpha  # in pixels of the predicted mask
        read = float(natural[row, num_rows // 2, y, 15])
        assert read == pytest.approx(steps * y + alpha * offset, abs=1e-3)


def test_units_of_the_natural_heads():
    for head in ("natural", "upscale_natural"):
        assert aligned_units(tiny.build(head).mask_head, 3) == (1, 1.0)


@pytest.mark.parametrize(
    "opts", [(), ("MODEL.TENSOR_MASK.BOX_ON", False, "MODEL.TENSOR_MASK.NMS_ON", "masks")]
)
@torch.no_grad()
def test_what_is_kept_is_what_the_model_detects(opts):
    opts = [*opts, "TEST.DETECTIONS_PER_IMAGE", 5000]
    model, image = build("aligned", opts), tiny.make_image(HEIGHT, WIDTH)
    seen = look(model, image, THRESHOLD)
    (found,) = model.detect([image])  # at a threshold of 0.05
    above = found["scores"] > THRESHOLD
    assert 0 < above.sum() < len(above)
    for name in ("boxes", "scores", "labels", "windows"):
        torch.testing.assert_close(getattr(seen.kept, name), found[name][above])


# ---- the command ----


@pytest.mark.parametrize("head", tiny.HEADS)
def test_command_counts_and_draws(head, tmp_path, capsys, monkeypatch):
    command, shown = save_run(tmp_path, head), {}
    for name in ("natural_view", "aligned_view"):
        draw = getattr(visualize_windows, name)
        monkeypatch.setattr(
            visualize_windows,
            name,
            lambda *args, name=name, draw=draw: (
                shown.setdefault(name, []).append(args) or draw(*args)
            ),
        )
    assert visualize_windows.main([*command, "--threshold", str(THRESHOLD)]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [*(f"level_p{level}.png" for level in range(2, 8)), "windows.png"]
    assert lines[-1].startswith("6 levels")

    model = build(head, ["INPUT.MIN_SIZE_TEST", 0])
    model.score_threshold = THRESHOLD
    image = tiny.make_image(HEIGHT, WIDTH)
    with torch.no_grad():
        seen = look(model, image, THRESHOLD)
        _, logits, _ = model.dense([image])
        (found,) = model.detect([image])
        dense = model.mask_head.dense(seen.features)
    sides = (found["windows"][:, 2] - found["windows"][:, 0]).tolist()
    rows = [line.split() for line in lines[1:-1]]
    pairs = list(itertools.product(range(6), range(model.windows.num_sizes)))
    num_fired = 0
    for (level, size), row, natural, aligned in zip(
        pairs, rows, shown["natural_view"], shown["aligned_view"], strict=True
    ):
        side, classes = model.windows.sizes[level][size], range(3 * size, 3 * size + 3)
        scores = logits[level][0].sigmoid()
        height, width = scores.shape[1:]
        fired = sum(
            any(float(scores[c, y, x]) > THRESHOLD for c in classes)
            for y in range(height)
            for x in range(width)
        )
        num_fired += fired
        assert row[:6] == [
            *(f"p{level + 2}", f"{side}", "px", f"{height * width}"),
            *(f"{fired}", f"{sides.count(side)}"),
        ]
        # The tiles are masks, and the maps are those of their offsets.
        masks, ys, xs, *_ = natural
        (expected,) = dense[level][size].sigmoid().unflatten(1, masks.shape[2:])
        for (i, y), (j, x) in itertools.product(enumerate(ys), enumerate(xs)):
            np.testing.assert_allclose(masks[i, j], expected[:, :, y, x], atol=1e-4)
        maps, (vs, us), *_ = aligned
        with torch.no_grad():
            tensor = aligned_tensor(model.mask_head, seen.features, level, size).sigmoid()
        for (i, v), (j, u) in itertools.product(enumerate(vs), enumerate(us)):
            middle = (len(tensor) - 1) / 2
            expected = tensor[int(v + middle), int(u + middle)]
            np.testing.assert_allclose(maps[i, j], expected, atol=1e-5)
    assert 0 < num_fired < sum(int(row[3]) for row in rows)


def test_levels_and_images_without_detections(tmp_path, capsys):
    command = [*save_run(tmp_path), "--threshold", "0.999", "--levels", "p4,p2"]
    assert visualize_windows.main(command) == 0
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["level_p2.png", "level_p4.png", "windows.png"]
    assert [line.split()[4] for line in capsys.readouterr().out.splitlines()[1:-1]] == ["0"] * 4


def test_without_a_mask_head_there_are_windows_only(tmp_path):
    with_masks, without = tmp_path / "with", tmp_path / "without"
    for folder, opts in ((with_masks, []), (without, ["MODEL.MASK_ON", False])):
        folder.mkdir()
        assert visualize_windows.main([*save_run(folder, opts=opts), "--levels", "p2"]) == 0
    heights = [Image.open(f / "out" / "level_p2.png").height for f in (with_masks, without)]
    assert heights[1] < heights[0] / 2


def test_windows_that_fire_are_drawn(tmp_path):
    save_run(tmp_path)
    predictor = Predictor(str(tmp_path / "config.yaml"), tmp_path / "model.pth")
    rgb = np.full((HEIGHT, WIDTH, 3), 100, np.uint8)
    with torch.no_grad():
        seen = look(predictor.model, tiny.make_image(HEIGHT, WIDTH), 0.999)
    assert not len(seen.kept.scores)
    dark = visualize_windows.draw_fired(predictor, seen, rgb, 0, 0)
    assert (dark == dark[0, 0]).all()
    seen.scores[0][0][8, 12] = 1.0  # the window around (48, 32), which reaches from x 26 to 70
    drawn = visualize_windows.draw_fired(predictor, seen, rgb, 0, 0)
    changed = np.nonzero((drawn != dark).any(2))
    scale = drawn.shape[1] // WIDTH
    assert (changed[1].min(), changed[1].max()) == (26 * scale, 70 * scale - 1)
    assert (changed[0].min(), changed[0].max()) == (10 * scale, 54 * scale - 1)


def test_mistakes_are_one_line(tmp_path, capsys):
    command = save_run(tmp_path)
    for more, message in (
        (["--levels", "p2,p9"], "no p9; the model's levels are p2, p3"),
        (["--input", str(tmp_path / "no.png")], "no.png"),
        (["--input", str(tmp_path / "config.yaml")], "config.yaml"),
        (["--weights", str(tmp_path / "no.pth")], "no.pth"),
        (["MODEL.TENSOR_MASK.HAED", "bipyramid"], "HEAD"),
    ):
        assert visualize_windows.main([*command, *more]) == 2
        error = capsys.readouterr().err.strip()
        assert error.splitlines()[-1].startswith("error: ")
        assert message in error.splitlines()[-1]
    with pytest.raises(SystemExit, match="2"):
        visualize_windows.main([*command, "--threshold", "1.5"])


def test_the_image_is_not_overwritten(tmp_path, capsys):
    command = save_run(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    content = (tmp_path / "image.png").read_bytes()
    (out / "level_p3.png").write_bytes(content)
    assert visualize_windows.main([*command, "--input", str(out / "level_p3.png")]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert (out / "level_p3.png").read_bytes() == content
