"""`dev/benchmark.py inference` and `train`: the models are what is said, and all is counted."""

import importlib
import json
from pathlib import Path

import benchmark
import pytest
import torch
import torchvision
from tiny import build, get_cfg, make_image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import FrozenBatchNorm2d, masks_to_boxes

timing = importlib.import_module("benchmarks.timing")
floor, inference, large_image, memory, models, options, parts, train = (
    importlib.import_module(f"benchmarks.{name}")
    for name in (
        *("floor", "inference", "large_image", "memory", "models", "options", "parts", "train"),
    )
)
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="on Linux only")


@pytest.fixture(scope="module")
def mask_rcnn():
    return models.build_mask_rcnn((64, 96), detections=20, device="cpu")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(get_cfg(opts=["INPUT.MIN_SIZE_TEST", 96]).dump())
    return str(path)


# ---- the models ----


def test_frozen_batch_norms_change_nothing_in_eval_mode():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(norm_layer=lambda n: nn.BatchNorm2d(n, eps=0.01))
    model = model.double().eval()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        for values in (norm.weight, norm.running_var):
            nn.init.uniform_(values, 0.1, 2)
        for values in (norm.bias, norm.running_mean):
            nn.init.normal_(values)
    x = torch.randn(1, 3, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        models.freeze_batch_norms(model)
        torch.testing.assert_close(model(x), expected)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert sum(isinstance(module, FrozenBatchNorm2d) for module in model.modules()) == 20


def test_mask_rcnn_is_trained_from_layer2_on(mask_rcnn):
    frozen = {name for name, p in mask_rcnn.named_parameters() if not p.requires_grad}
    body = "backbone.body"
    convolutions = [f"{body}.layer1.{i}.conv{k}.weight" for i in range(3) for k in (1, 2, 3)]
    assert frozen == {
        *(f"{body}.conv1.weight", f"{body}.layer1.0.downsample.0.weight"),
        *convolutions,
    }
    assert not any(isinstance(module, nn.BatchNorm2d) for module in mask_rcnn.modules())


def test_mask_rcnn_and_ours_train_as_much_of_the_backbone(mask_rcnn):
    cfg = options.read_config(benchmark.parse_arguments(["inference"]))
    ours = models.build_model(cfg).backbone
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == sum(
        p.numel() for p in mask_rcnn.backbone.body.parameters() if p.requires_grad
    )


def test_objects_have_the_sizes_of_coco():
    # Half of the medium ones are up to 32 * sqrt(3) px, as many as have 16 px of the small ones.
    assert models.objects_per_level([16, 32, 55.5, 96, 1], (480, 640), 200) == [40, 40, 35, 35, 50]
    # All sizes go with the shorter side of the image.
    assert models.objects_per_level([32, 64, 111, 192, 1], (1280, 960), 200) == [40, 40, 35, 35, 50]


@pytest.mark.parametrize("size", [(192, 256), (350, 290)])
def test_detections_are_spread_as_meant(size):
    cfg = get_cfg(opts=["TEST.DETECTIONS_PER_IMAGE", 50])
    model = models.build_tensormask(cfg)
    meant = models.spread_detections(model, models.make_image(size))
    with torch.inference_mode():
        (found,) = model.detect([models.make_image(size)])
    assert sum(meant) == len(found["scores"]) == 50
    assert sum(number > 0 for number in meant) >= 3
    found = inference.count_per_level(model, found["windows"])
    assert all(abs(a - b) <= 3 for a, b in zip(meant, found, strict=True))


# ---- parts, floor ----


def test_time_of_a_part_is_its_own(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(parts.time, "perf_counter", lambda: clock[0])

    class Tower(nn.Module):
        def forward(self, x):
            clock[0] += 2
            return x + 1

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = Tower()

        def head(self, x):
            clock[0] += 4
            return self.tower(self.tower(x))

        def forward(self, x):
            clock[0] += 8
            return self.head(x)

    model = Model()
    model.head = model.head  # as an attribute of the object, which is there again afterwards
    before = model.head
    rows = parts.measure_parts(
        lambda: model(1), [("tower", model.tower, "forward"), ("head", model, "head")], rounds=2
    )
    assert [(row["part"], row["ms"]) for row in rows] == [
        *(("tower", 4000), ("head", 4000), ("rest", 8000), ("whole", 16000)),
    ]
    assert [row["share"] for row in rows] == [0.25, 0.25, 0.5, 1]
    assert model.head == before
    assert "forward" not in vars(model.tower)
    assert model(1) == 3


def test_part_that_is_not_there_is_an_error():
    with pytest.raises(AttributeError, match="no_such_part"):
        parts.measure_parts(int, [("part", nn.ReLU(), "no_such_part")], rounds=1)


def test_floor_has_all_flops_of_both_models(mask_rcnn):
    ours = build().eval()
    for call in (
        lambda: ours([make_image(64, 96)]),
        lambda: mask_rcnn([make_image(64, 96) / 255]),
    ):
        products = floor.record_products(call)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        counted = sum(product.flops for product in products)
        assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)
        # Run alone, they are the same once more.
        again = floor.record_products(floor.replay(products, "cpu"))
        assert [(p.size, p.stride, p.dtype, p.flops) for p in again] == [
            (p.size, p.stride, p.dtype, p.flops) for p in products
        ]


def test_floor_keeps_dtype_and_memory_format():
    model = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    x = torch.zeros(1, 4, 6, 6).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        (product,) = floor.record_products(lambda: model(x))
    assert product.dtype == torch.bfloat16
    assert product.stride == (144, 1, 24, 4)
    assert product.flops == 2 * 9 * 4 * 8 * 16
    (again,) = floor.record_products(floor.replay([product], "cpu"))
    assert (again.dtype, again.stride) == (product.dtype, product.stride)


# ---- memory ----


@needs_proc
def test_memory_is_the_peak_of_the_call_alone(tmp_path, monkeypatch):
    (tmp_path / "allocations.py").write_text(
        "import torch\n"
        "def calls(mib):\n"
        "    torch.ones(2 * mib, 2**18)\n"  # what was before does not count
        "    kept = torch.ones(100, 2**18)\n"
        "    return lambda: kept.sum(), lambda: torch.ones(mib, 2**18).sum()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    peak = memory.peak_memory("allocations:calls", mib=200)
    assert 195 <= peak["above"] <= 230
    assert peak["base"] > 100
    assert peak["peak"] - peak["base"] == peak["above"]


@needs_proc
def test_failure_of_the_process_is_said():
    with pytest.raises(ValueError, match="no_such_function"):
        memory.peak_memory("benchmarks.timing:no_such_function")


# ---- training ----


def test_objects_to_train_on():
    made = train.make_target((700, 720), 100)
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


def test_both_are_trained_on_the_same(config, mask_rcnn, monkeypatch):
    """But for torchvision's scale of images, and its labels from 1."""
    batches = []
    monkeypatch.setattr(train, "train_step", lambda state, batch, **_: batches.append(batch))
    words = ["train", "--config-file", config, "--size", "64", "96", "--batch", "2"]
    args = benchmark.parse_arguments(words)
    for name in ("tensormask", "torchvision"):
        train.make_step(args, name, mask_rcnn).run()
    assert [len(batch) for batch in batches] == [2, 2]
    ours, theirs = (batch[0] for batch in batches)
    assert torch.equal(theirs["image"], ours["image"] / 255)
    assert torch.equal(theirs["target"]["labels"], ours["target"]["labels"] + 1)
    for key in ("boxes", "masks"):
        assert torch.equal(theirs["target"][key], ours["target"][key])


# ---- the commands ----


def run_command(words, tmp_path):
    file = tmp_path / "results.json"
    code = benchmark.main([*words, "--json", str(file)])
    return code, json.loads(file.read_text())["results"] if code == 0 else None


def test_inference(config, tmp_path, capsys):
    words = ["inference", "--config-file", config, "--size", "96", "128", "--detections", "10"]
    words += ["--rounds", "1", "--batch", "2", "--without", "memory"]
    code, results = run_command(words, tmp_path)
    assert code == 0
    rows = {row["model"]: row for row in results["times"]}
    assert list(rows) == [
        *("tensormask", "dense", "torchvision"),
        *("convolutions of tensormask", "convolutions of torchvision"),
    ]
    ours, theirs = rows["tensormask"], rows["torchvision"]
    assert ours["/ torchvision"] == pytest.approx(ours["median s"] / theirs["median s"])
    own_floor = rows["convolutions of tensormask"]["median s"]
    assert ours["/ convolutions"] == pytest.approx(ours["median s"] / own_floor)
    assert sum(results["found"]["tensormask"]) == sum(results["found"]["torchvision"]) == 10
    check_parts(results["parts"])
    assert "op at windows, sigmoid, paste: 0." in capsys.readouterr().out


def check_parts(parts_per_model):
    """All parts take part, and little is left."""
    for rows in parts_per_model.values():
        ms = {row["part"]: row["ms"] for row in rows}
        whole, rest = ms.pop("whole"), ms.pop("rest")
        assert sum(ms.values()) + rest == pytest.approx(whole)
        assert all(value > 0 for value in ms.values()), ms
        assert rest < 0.5 * whole


def test_dense_path_gives_the_same(config):
    args = benchmark.parse_arguments(["inference", "--config-file", config, "--size", "96", "128"])
    model = models.build_tensormask(options.read_config(args, detections=30))
    models.spread_detections(model, models.make_image((96, 128)))
    (ours,) = inference.detect_call(args, "tensormask", model)()
    made = []
    model.mask_head.dense = lambda features, dense=model.mask_head.dense: (
        made.append(1) or dense(features)
    )
    (dense,) = inference.detect_call(args, "dense", model)()
    assert made == [1]
    assert ours["masks"].any((1, 2)).sum() > 10
    assert (ours["masks"] == dense["masks"]).float().mean() > 0.9999


def test_image_without_enough_windows_is_an_error(config, tmp_path, capsys):
    words = ["inference", "--config-file", config, "--size", "32", "32", "--models", "tensormask"]
    assert run_command(words, tmp_path)[0] == 2
    assert "NMS leaves too few windows" in capsys.readouterr().err


def test_finding_less_than_asked_for_is_an_error(config, tmp_path, capsys, monkeypatch):
    def find_nothing(model, image):
        nn.init.constant_(model.head.cls_score.bias, -20.0)

    monkeypatch.setattr(inference, "spread_detections", find_nothing)
    words = ["inference", "--config-file", config, "--size", "64", "96", "--models", "tensormask"]
    assert run_command([*words, "--without", "floor", "parts", "memory"], tmp_path)[0] == 2
    assert "has 0 masks of (64, 96) px where 100 of (64, 96) are meant" in capsys.readouterr().err


@needs_proc
def test_memory_of_inference(config, tmp_path):
    words = ["inference", "--config-file", config, "--size", "192", "256", "--detections", "50"]
    words += ["--models", "tensormask", "dense", "--rounds", "1", "--without", "floor", "parts"]
    _, results = run_command(words, tmp_path)
    ours, dense = results["memory"]
    assert dense["above MiB"] > ours["above MiB"] > 0
    assert ours["base MiB"] > 100


@needs_proc
def test_memory_of_large_images(config, tmp_path, monkeypatch):
    cases = [("large", way, (960, 1440), (96, 144), 20) for way in ("predictor", "results")]
    monkeypatch.setattr(large_image, "_CASES", cases)
    _, results = run_command(["inference", "--config-file", config, "--large-image"], tmp_path)
    frames, run_lengths = results["memory"]
    # 20 masks of 1440 x 960 px are 26 MiB.
    assert frames["above MiB"] > run_lengths["above MiB"] > 4


def test_training(config, tmp_path):
    words = ["train", "--config-file", config, "--size", "64", "96", "--objects", "3"]
    code, results = run_command([*words, "--rounds", "1", "--without", "memory"], tmp_path)
    assert code == 0
    ours, theirs = results["times"]
    assert ours["/ torchvision"] == pytest.approx(ours["median s"] / theirs["median s"])
    assert ours["positives"] > 0
    assert theirs["positives"] >= 3  # the objects themselves are among the proposals
    check_parts(results["parts"])


@needs_proc
def test_memory_of_training(config, tmp_path):
    words = ["train", "--config-file", config, "--size", "192", "256", "--models", "tensormask"]
    _, results = run_command([*words, "--rounds", "1", "--without", "parts"], tmp_path)
    (row,) = results["memory"]
    assert 20 < row["above MiB"] < 500


@needs_proc
def test_assignment(config, tmp_path):
    words = ["train", "--config-file", config, "--rounds", "2", "--assignment"]
    code, results = run_command(words, tmp_path)
    assert code == 0
    row = results["assignment"]
    assert row["objects"] == 200
    assert row["windows"] > 200
    assert 0 <= row["above MiB"] < 100


@pytest.mark.parametrize(
    "words, message",
    [
        (["inference", "--batch", "0"], "--batch must be at least 1"),
        (["inference", "--dtype", "tf32"], "is for a GPU"),
        (["train", "--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_mistakes_are_said(words, message, tmp_path, capsys):
    assert run_command(words, tmp_path)[0] == 2
    assert message in capsys.readouterr().err


def test_ratio_by_hand():
    assert timing.median_ratio([1.0, 6.0, 3.0], [2.0, 2.0, 2.0]) == 1.5
