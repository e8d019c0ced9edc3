"""The benchmark of how costs grow: its points, what the query asks for, and a tiny run."""

import argparse
import importlib
import json

import benchmark
import pytest
import torch
from PIL import Image
from tiny import get_cfg

growth = importlib.import_module("benchmarks.growth")


@pytest.fixture
def words(tmp_path):
    """Return a command line with a small model, and a set of one image with one small object."""
    config = tmp_path / "config.yaml"
    config.write_text(get_cfg(opts=["TEST.DETECTIONS_PER_IMAGE", 10]).dump())
    Image.new("RGB", (128, 96)).save(tmp_path / "1.png")
    image = {"id": 1, "file_name": "1.png", "height": 96, "width": 128}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [40, 40, 26, 24], "area": 624}
    box |= {"iscrowd": 0, "segmentation": [[40, 40, 66, 40, 66, 64, 40, 64]]}
    content = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "set.json").write_text(json.dumps(content))
    return [
        *("growth", "--config-file", str(config), "--objects", f"{tmp_path}/set.json@{tmp_path}"),
        *("--size", "96", "128", "--sizes", "64x96", "192x160", "--counts", "0", "5"),
        *("--shares", "100", "--share", "10", "--rounds", "1", "--threads", "1"),
    ]


def test_points_change_one_thing_each(words) -> None:
    args = benchmark.parse_arguments(words)
    points = growth.points_of(args, get_cfg(opts=["TEST.DETECTIONS_PER_IMAGE", 10]))
    assert points == {
        "megapixels": [((64, 96), 10, 10), ((192, 160), 10, 10)],
        "objects": [((96, 128), 0, 10), ((96, 128), 5, 10)],
        "share": [((96, 128), 10, 100)],
    }
    args.sizes = ["64"]
    with pytest.raises(ValueError, match="HxW in pixels"):
        growth.points_of(args, get_cfg())


def test_larger_images_repeat_the_objects(words) -> None:
    args = benchmark.parse_arguments(words)
    base = growth.asked_at(args, growth.Point((96, 128), 10, 10))
    assert base.shape == (1, 24, 32)
    assert 0 < base.float().mean() <= 0.1
    large = growth.asked_at(args, growth.Point((192, 160), 10, 10))
    assert large.shape == (1, 48, 40)
    assert torch.equal(large, base.repeat(1, 2, 2)[:, :48, :40])


@pytest.mark.slow
def test_run(words, tmp_path) -> None:
    words += ["--plot", f"{tmp_path}/a.png", "--json", f"{tmp_path}/a.json", "--without", "memory"]
    assert benchmark.main(words) == 0
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    assert [len(results[axis]) for axis in ("megapixels", "objects", "share")] == [2, 2, 1]
    for row in (row for rows in results.values() for row in rows):
        for name in (growth.DENSE, growth.QUERY, growth.THEIRS):
            assert row[f"{name} s"] > 0
        ratio = row[f"{growth.QUERY} s"] / row[f"{growth.THEIRS} s"]
        assert row[f"{growth.QUERY} / {growth.THEIRS}"] == pytest.approx(ratio)
    assert results["share"][0]["share"] == 1
    with Image.open(tmp_path / "a.png") as plot:
        assert plot.width == 1100


@pytest.mark.parametrize("name", [growth.DENSE, growth.QUERY])
def test_peak_memory(words, name: str) -> None:
    args = benchmark.parse_arguments(words)
    assert 0 < growth.peak_of(args, name, growth.Point((192, 160), 10, 10)) < 1000


def test_no_objects_mean_no_detections(words) -> None:
    args: argparse.Namespace = benchmark.parse_arguments(words)
    cfg = growth.models.configure(args)[growth.OURS]
    for name in (growth.DENSE, growth.QUERY):
        counts = [
            len(growth.call_of(args, cfg, name, growth.Point((96, 128), number, 10))()[0]["scores"])
            for number in (0, 5)
        ]
        assert counts == [0, 5]
