"""The command `dev/benchmark.py`: its parts by hand, and tiny runs of its subcommands."""

import json
import re
import sys
from pathlib import Path

import benchmark
import numpy as np
import pytest
from PIL import Image

TOOLS = Path(__file__).parents[2] / "tools"


timing = sys.modules["benchmarks.timing"]


def test_candidates_take_turns():
    calls = []
    candidates = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = timing.time_in_turn(candidates, rounds=4, warmup=2)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 6
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert {names[0] for names in rounds} == {"a", "b", "c"}


def test_summary_by_hand():
    seconds = {"base": [2.0, 4.0, 6.0], "other": [1.0, 1.0, 6.0]}
    summary = timing.summarise(seconds, "base")
    assert summary["base"] == {"median_s": 4.0, "min_s": 2.0, "speedup": 1.0}
    assert summary["other"] == {"median_s": 1.0, "min_s": 1.0, "speedup": 2.0}


def test_table_by_hand():
    rows = [{"name": "a", "count": 10, "ms": 1234.56}, {"name": "bcdef", "count": 9, "ms": 0.5}]
    assert timing.format_table(rows).splitlines() == [
        "name   count    ms",
        "a         10  1235",
        "bcdef      9   0.5",
    ]


def test_machine_says_what_numbers_depend_on():
    machine = timing.describe_machine()
    assert machine["cpu"]
    assert machine["torch_threads"] >= 1
    assert machine["commit"] is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", machine["commit"])
    json.dumps(machine)


def test_every_subcommand_has_help(capsys):
    for name in benchmark.BENCHMARKS:
        with pytest.raises(SystemExit) as stopped:
            benchmark.main([name, "--help"])
        assert stopped.value.code == 0
        assert "--json" in capsys.readouterr().out


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


@pytest.mark.parametrize("workers", [[], ["--workers", "1"]])
def test_data_speed(small_set, tmp_path, capsys, workers):
    options = ["--data-set", small_set, "--min-size", "24", "--max-size", "40", "--rounds", "2"]
    file = tmp_path / "results.json"
    assert benchmark.main(["data", *options, *workers, "--json", str(file)]) == 0
    table = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in table] == ["reader", "torchvision", "tensormask"]
    record = json.loads(file.read_text())
    assert record["benchmark"] == "data"
    assert record["options"]["min_size"] == 24
    assert record["machine"]["cpu"]
    results = record["results"]
    assert results["num_images"] == 5
    assert results["torchvision"]["speedup"] == 1.0
    assert all(results[name]["images_per_s"] > 0 for name in ("torchvision", "tensormask"))


def test_data_readers_do_the_same_work(small_set, tmp_path):
    """torchvision's samples have the sizes, boxes and masks of the library's."""
    data = sys.modules["benchmarks.data"]
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
        # Its flips are drawn elsewhere: areas and heights do not know of them.
        for key, area in (("boxes", box_areas), ("masks", lambda m: m.flatten(1).sum(dim=1))):
            np.testing.assert_allclose(area(target[key]), area(sample["target"][key]), rtol=0.01)


def box_areas(boxes):
    return (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux counts it")
def test_data_memory(tmp_path, capsys):
    options = ["--memory", "--images", "40", "--workers", "1"]
    file = tmp_path / "results.json"
    assert benchmark.main(["data", *options, "--json", str(file)]) == 0
    assert "mean_mb" in capsys.readouterr().out
    results = json.loads(file.read_text())["results"]
    assert results["num_images"] == 40
    assert 150 < results["num_annotations"] < 450
    assert results["readings"][-1]["images"] >= 40
    assert all(0 < entry["mean_mb"] <= entry["highest_mb"] for entry in results["readings"])


def test_mistakes_are_said(capsys):
    assert benchmark.main(["data", "--data-set", "none.json@nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
