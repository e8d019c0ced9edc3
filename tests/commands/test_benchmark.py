"""The command `tools/benchmark.py` and its made-up images, targets and scores."""

import json
from pathlib import Path

import pytest
import torch
from tiny import build, get_cfg
from torchvision.ops import masks_to_boxes

from tensormask.commands import benchmark, synthetic
from tensormask.utils.errors import UserError

needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(get_cfg().dump())
    return ["--config-file", str(path), "--size", "96", "128", "--seconds", "0.01"]


# ---- the command ----


@pytest.mark.parametrize("mode", ["inference", "train"])
def test_command(config, tmp_path, capsys, mode):
    words = [*config, "--batch", "2", "--mode", mode, "--objects", "3"]
    words += ["--dtype", "bfloat16", "--json", str(tmp_path / "numbers.json")]
    assert benchmark.main([*words, "TEST.DETECTIONS_PER_IMAGE", "10"]) == 0
    printed = capsys.readouterr().out
    assert f"{mode}, 2 x 96 x 128 px, bfloat16" in printed
    assert ("detections per image, with made-up scores: 10" in printed) == (mode == "inference")
    record = json.loads((tmp_path / "numbers.json").read_text())
    assert record["options"]["batch"] == 2
    assert record["machine"]["threads"] == torch.get_num_threads()
    results = record["results"]
    assert results["images_per_s"] == pytest.approx(2 / results["median_s"])
    assert results["peak_mib"] is None or 0 <= results["peak_mib"] < 500


@pytest.mark.parametrize(
    "words, message",
    [
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--dtype", "tf32", "--device", "cpu"], "--dtype tf32 is for a GPU"),
        (["--weights", "none.pth"], "none.pth"),
        (["MODEL.NO_SUCH_KEY", "1"], "NO_SUCH_KEY"),
    ],
)
def test_errors_are_one_line(config, capsys, words, message):
    assert benchmark.main([*config, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_bugs_keep_their_traceback(config, monkeypatch):
    def fail(args):
        raise ValueError("a bug")

    monkeypatch.setattr(benchmark, "measure", fail)
    with pytest.raises(ValueError, match="a bug"):
        benchmark.main(config)


def test_dtype_and_device_become_options_of_the_config(config):
    args = benchmark.build_parser().parse_args([*config, "--dtype", "float16", "--device", "cpu"])
    cfg = benchmark.model_config(args)
    assert (cfg.MODEL.DEVICE, cfg.TEST.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE) == (
        "cpu",
        True,
        "float16",
    )
    for device, message in (("cuda", "no GPU is available"), ("gpu", "'gpu': set it to")):
        words = [*config, "--device", device]
        with pytest.raises(UserError, match=message):
            benchmark.model_config(benchmark.build_parser().parse_args(words))


def test_training_leaves_the_weights_unchanged():
    cfg = get_cfg()
    model = build().train()
    before = [p.clone() for p in model.parameters()]
    benchmark.training_step(cfg, model)(benchmark.make_samples(cfg, (96, 128), 1, 3))
    torch.testing.assert_close(before, list(model.parameters()), rtol=0, atol=1e-20)
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@needs_proc
def test_memory_is_the_peak_of_the_call_only():
    torch.ones(200, 2**18)  # what was freed before does not count
    kept = torch.ones(50, 2**18)
    peak = benchmark.peak_memory(lambda: torch.ones(100, 2**18).sum() + kept.sum(), "cpu")
    assert 95 <= peak <= 130


# ---- what is made up ----


def test_objects_of_a_target():
    made = synthetic.make_target((700, 720), 100)
    sides = made["boxes"][:, 2:] - made["boxes"][:, :2]
    longer, shorter = sides.amax(1), sides.amin(1)
    assert 20 <= longer.min() < 25
    assert 600 < longer.max() <= 700
    assert (shorter >= longer / 2 - 1e-3).all()
    # As many are shorter than the geometric mean of 20 and 700 as are longer.
    assert 40 < (longer < 118).sum() < 60
    assert (made["boxes"][:, :2] >= 0).all()
    assert (made["boxes"][:, 2:] <= torch.tensor([720.0, 700.0])).all()
    areas, whole = made["masks"].sum((1, 2)), sides.prod(1)
    torch.testing.assert_close(areas / whole, torch.full((100,), torch.pi / 4), atol=0.03, rtol=0)
    torch.testing.assert_close(masks_to_boxes(made["masks"]), made["boxes"] - 0.5, atol=3, rtol=0)


def test_objects_have_the_sizes_of_coco():
    # Half of the medium ones are up to 32 * sqrt(3) px, as many as have 16 px of the small ones.
    limits = [16, 32, 55.5, 96, 1]
    assert synthetic.objects_per_level(limits, (480, 640), 200) == [40, 40, 35, 35, 50]
    # All sizes are proportional to the shorter side of the image.
    limits = [32, 64, 111, 192, 1]
    assert synthetic.objects_per_level(limits, (1280, 960), 200) == [40, 40, 35, 35, 50]


def test_scattered_logits():
    shapes, strong = [(3, 40, 50), (3, 20, 25)], torch.full((200,), 2.0)
    levels = synthetic.scatter_logits(shapes, [3, 1], strong, torch.full((100,), 1.0))
    assert [tuple(x.shape) for x in levels] == shapes
    num_strong = [int((x == 2).sum()) for x in levels]
    assert 190 <= sum(num_strong) <= 200  # two may meet at a location
    assert 2 < num_strong[0] / num_strong[1] < 4
    assert 90 <= sum((x == 1).sum() for x in levels) <= 100


@pytest.mark.parametrize("size", [(192, 256), (350, 290)])
def test_a_model_detects_as_much_as_it_may_on_the_levels_of_coco(size):
    model = build(opts=["TEST.DETECTIONS_PER_IMAGE", 50]).eval()
    synthetic.make_up_scores(model)
    with torch.inference_mode():
        first, second = model.detect([synthetic.make_image(size)] * 2)
    assert 48 <= len(first["scores"]) <= 50
    assert torch.equal(first["boxes"], second["boxes"])
    assert (first["scores"] >= 0.5).all()
    # The side of a window tells its level.
    side = first["windows"][:, 2] - first["windows"][:, 0]
    smallest = torch.tensor([float(min(sides)) for sides in model.windows.sizes])
    levels = torch.bincount(torch.searchsorted(smallest, side + 1) - 1, minlength=6)
    largest = [max(sides) for sides in model.windows.sizes]
    meant = torch.tensor(synthetic.objects_per_level(largest, size, 50))
    assert (levels - meant).abs().max() <= 12
    assert (levels > 0).sum() >= 3
