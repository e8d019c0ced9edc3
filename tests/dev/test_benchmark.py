"""The command `dev/benchmark.py`: its parts by hand, and tiny runs of its subcommands."""

import importlib
import json
from pathlib import Path

import benchmark
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build, get_cfg, make_image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import FrozenBatchNorm2d

data, inference, measure, models, parts, products, train = (
    importlib.import_module(f"benchmarks.{name}")
    for name in ("data", "inference", "measure", "models", "parts", "products", "train")
)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(get_cfg(opts=["TEST.DETECTIONS_PER_IMAGE", 10]).dump())
    return ["--config-file", str(path), "--size", "96", "128", "--rounds", "1"]


def run_command(words, tmp_path):
    file = tmp_path / "results.json"
    code = benchmark.main([words[0], "--json", str(file), *words[1:]])
    return code, json.loads(file.read_text()) if code == 0 else None


# ---- measuring ----


def test_functions_take_turns():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = measure.time_in_turn(functions, rounds=4, warmup=2)
    assert {name: len(t["wall"]) for name, t in times.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 6
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert {names[0] for names in rounds} == {"a", "b", "c"}


def test_comparison_by_hand():
    times = {
        "base": {"wall": [2.0, 2.0, 2.0], "cpu": [4.0, 4.0, 4.0]},
        "a": {"wall": [1.0, 6.0, 3.0], "cpu": [2.0, 8.0, 1.0]},
    }
    assert measure.compare(times, "a", "base") == {
        **{"model": "a", "s": 3.0, "/ base": 1.5, "CPU s": 2.0, "CPU / base": 0.5}
    }
    assert list(measure.compare(times, "a", "not timed")) == ["model", "s", "CPU s"]


def test_time_of_a_part_excludes_its_parts(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(parts, "timer", lambda: clock[0])

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
    listed = [
        ("tower", model.tower, "forward"),
        ("head", model, "head"),
        ("no", model, "parameters"),
    ]
    rows = parts.measure_parts(lambda: model(1), listed, rounds=2)
    assert [(row["part"], row["ms"]) for row in rows] == [
        *(("tower", 4000), ("head", 4000), ("rest", 8000), ("whole", 16000)),
    ]
    assert [row["share"] for row in rows] == [0.25, 0.25, 0.5, 1]
    assert model(1) == 3
    assert clock[0] == 3 * 16


def test_parts_of_our_model():
    model = build().eval()
    inference.make_up_scores(model)
    call = inference.detect_call(model, [make_image(96, 128)])
    call()  # makes up the scores
    rows = parts.measure_parts(call, parts.parts_of(model), rounds=1)
    ms = {row["part"]: row["ms"] for row in rows}
    assert {name for name, *_ in parts.parts_of(model)} | {"rest", "whole"} == set(ms)
    assert ms["rest"] < 0.5 * ms["whole"]
    assert all(value > 0 for value in ms.values())


def test_products_are_all_flops_of_a_model():
    model = build().eval()

    def call():
        return model([make_image(64, 96)])

    recorded = products.record_products(call)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    assert sum(p.flops for p in recorded) == pytest.approx(counter.get_total_flops(), rel=0.01)
    # Computed again by themselves, they are the same.
    again = products.record_products(products.replay(recorded, "cpu"))
    assert [p[1:] for p in again] == [p[1:] for p in recorded]


def test_products_keep_dtype_and_memory_format():
    model = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    x = torch.zeros(1, 4, 6, 6).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        (product,) = products.record_products(lambda: model(x))
    assert product[1:] == (torch.bfloat16, 144, 2 * 9 * 4 * 8 * 16)
    memory = torch.arange(144.0).bfloat16()
    expected = model.bfloat16()(memory.view(1, 6, 6, 4).permute(0, 3, 1, 2))
    torch.testing.assert_close(product.call(memory), expected, rtol=0.02, atol=0.02)


# ---- torchvision's model ----


@pytest.mark.slow
def test_both_models_train_as_much_of_the_backbone():
    args = benchmark.parse_arguments(["inference", "--device", "cpu"])
    cfg = models.configure(args)[models.THEIRS]
    theirs = models.build_model(cfg, "torchvision", (64, 96))
    ours = models.build_model(cfg, "tensormask", (64, 96))
    frozen = {n for n, p in theirs.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(n.startswith(("backbone.body.conv1.", "backbone.body.layer1.")) for n in frozen)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in theirs.modules())
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in theirs.modules()) == 53
    counts = [
        sum(p.numel() for p in backbone.parameters() if p.requires_grad)
        for backbone in (ours.backbone, theirs.backbone.body)
    ]
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_inference(config, tmp_path):
    code, record = run_command(["inference", *config, "--batch", "2"], tmp_path)
    assert code == 0
    results = record["results"]
    ours, theirs = results["times"]
    assert ours["/ base"] == pytest.approx(ours["s"] / theirs["s"])
    assert ours["/ its convolutions"] == pytest.approx(ours["s"] / ours["its convolutions s"])
    for rows in results["parts"].values():
        ms = {row["part"]: row["ms"] for row in rows}
        assert ms["rest"] < 0.5 * ms["whole"]
    assert [row["model"] for row in results["memory"]] == ["tensormask", "torchvision"]
    assert all(0 < row["peak MiB"] < 1000 for row in results["memory"])


@pytest.mark.slow
def test_training(config, tmp_path):
    """Both are trained on the same, but for torchvision's scale of images and labels from 1."""
    words = ["train", *config, "--objects", "3", "--without", "memory"]
    code, record = run_command(words, tmp_path)
    assert code == 0
    ours, theirs = record["results"]["times"]
    assert ours["/ base"] == pytest.approx(ours["s"] / theirs["s"])
    assert ours["positives"] > 0
    assert theirs["positives"] >= 3  # the objects themselves are among the proposals


@pytest.mark.slow
@pytest.mark.parametrize("command", ["inference", "train"])
def test_another_config_as_base(command, config, tmp_path):
    other = tmp_path / "paper.yaml"
    other.write_text(get_cfg(opts=["TEST.DETECTIONS_PER_IMAGE", 10]).dump())
    _, record = run_command([command, *config, "--versus", str(other)], tmp_path)
    results = record["results"]
    assert [row["model"] for row in results["times"]] == ["tensormask", "paper"]
    assert results["times"][1]["/ base"] == 1
    assert [row["model"] for row in results["memory"]] == ["tensormask", "paper"]


def test_samples_for_torchvision():
    (sample,) = train.make_samples(get_cfg(), (64, 96), 1, 3)
    theirs = train._for_torchvision(sample)
    assert torch.equal(theirs["image"], sample["image"] / 255)
    assert torch.equal(theirs["target"]["labels"], sample["target"]["labels"] + 1)
    for key in ("boxes", "masks"):
        assert torch.equal(theirs["target"][key], sample["target"][key])


@pytest.mark.parametrize(
    "words, message",
    [
        (["inference", "--batch", "0"], "--batch must be at least 1"),
        (["inference", "--dtype", "tf32", "--device", "cpu"], "is for a GPU"),
        (["train", "--threads", "0"], "--threads must be at least 1"),
        (["data", "--data-set", "none.json@nowhere"], "none.json"),
    ],
)
def test_errors_are_one_line(words, message, capsys):
    assert benchmark.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_too_few_detections_are_an_error(config, tmp_path, capsys):
    words = ["inference", "--models", "tensormask", *config, "TEST.DETECTIONS_PER_IMAGE", "6000"]
    assert run_command(words, tmp_path)[0] == 2
    assert "not the 6000 of TEST.DETECTIONS_PER_IMAGE" in capsys.readouterr().err


def test_every_subcommand_has_help(capsys):
    for name in benchmark.BENCHMARKS:
        with pytest.raises(SystemExit) as stopped:
            benchmark.main([name, "--help"])
        assert stopped.value.code == 0
        assert "--json" in capsys.readouterr().out


# ---- evaluation ----


def test_evaluators_are_timed_on_the_same_set(tmp_path, capsys):
    pytest.importorskip("faster_coco_eval")
    words = ["evaluation", "--images", "3", "--detections", "20", "--iou-types", "bbox", "segm"]
    assert benchmark.main([*words, "--json", str(tmp_path / "a.json")]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["results"]
    assert [row["evaluator"] for row in rows] == 2 * ["pycocotools", "faster_coco_eval"]
    for ours, theirs in (rows[:2], rows[2:]):
        assert theirs["AP"] == pytest.approx(ours["AP"])
        assert 5 < ours["AP"] < 95


# ---- reading data ----


@pytest.fixture
def small_set(tmp_path):
    """The name of a set of six images with polygons and RLEs; one has no objects."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for image_id in range(1, 7):
        pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": 20, "width": 30})
        polygon = [[4, 4, 12, 4, 12, 12, 4, 12]]
        rle = {"size": [20, 30], "counts": [0, 200, 400]}
        forms = [([4, 4, 8, 8], polygon), ([0, 0, 10, 20], rle)] if image_id > 1 else []
        for box, segmentation in forms:
            fields = {"bbox": box, "segmentation": segmentation, "category_id": 1, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **fields})
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "square"}]
    (tmp_path / "set.json").write_text(json.dumps(content))
    return f"{tmp_path}/set.json@{tmp_path}"


def test_data_speed(small_set, tmp_path):
    words = ["data", "--data-set", small_set, "--min-size", "24", "--max-size", "40"]
    code, record = run_command([*words, "--rounds", "2"], tmp_path)
    assert code == 0
    assert record["options"]["min_size"] == 24
    assert record["machine"]["cpu"]
    assert record["results"]["num_images"] == 5
    theirs, ours = record["results"]["times"]
    assert (theirs["reader"], theirs["speedup"]) == ("torchvision", 1.0)
    assert ours["images/s"] / theirs["images/s"] == pytest.approx(ours["speedup"], rel=0.5)


@pytest.mark.slow
def test_data_speed_of_a_worker_process(small_set, tmp_path):
    words = ["data", "--data-set", small_set, "--min-size", "24", "--workers", "1"]
    assert run_command(words, tmp_path)[0] == 0


def test_data_readers_do_the_same_work(small_set, tmp_path):
    """torchvision's samples have the sizes, boxes and masks of the library's."""
    dataset = data.get_dataset(small_set)
    theirs = data.torchvision_set(dataset, dataset.image_ids[1:], 40, 100, tmp_path)
    ours = data.TrainingSet([dataset], data.Augmentation((40,), 100), seed=0)
    assert len(theirs) == len(ours) == 5
    for i in range(5):
        (image, target), sample = theirs[i], ours[i, i]
        assert image.shape == sample["image"].shape
        assert image.dtype == sample["image"].dtype
        assert len(target["labels"]) == len(sample["target"]["labels"]) == 2
        assert target["masks"].dtype == sample["target"]["masks"].dtype
        # Flips change neither areas nor heights.
        for key, area in (("boxes", box_areas), ("masks", lambda m: m.flatten(1).sum(dim=1))):
            np.testing.assert_allclose(area(target[key]), area(sample["target"][key]), rtol=0.01)


def box_areas(boxes):
    return (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux only")
def test_data_memory(tmp_path):
    code, record = run_command(["data", "--memory", "--images", "140", "--workers", "1"], tmp_path)
    assert code == 0
    readings = record["results"]["readings"]
    assert readings[-1]["images"] >= 140
    assert all(0 < reading["mean MB"] <= reading["highest MB"] for reading in readings)


def test_large_set(tmp_path):
    num_annotations = data.write_large_set(140, tmp_path)
    dataset = data.get_dataset(f"{tmp_path / 'annotations.json'}@{tmp_path / 'images'}")
    assert len(dataset) == 140
    assert dataset.num_annotations == num_annotations
    assert not dataset.issues
    first, repeated = (dataset.training_annotations(i) for i in (0, 100))
    assert [a["bbox"] for a in first] == [a["bbox"] for a in repeated]
