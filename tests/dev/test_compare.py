"""dev/compare_maskrcnn.py and dev/ablation_v2.py: their parts by hand, and runs of two steps."""

import json
from types import SimpleNamespace

import ablation_v2
import compare_maskrcnn
import numpy as np
import pytest
import tiny
import torch
from experiments import plot, runs
from experiments.mask_rcnn import MaskRCNNAdapter
from matplotlib.figure import Figure

from tensormask.data import CocoDataset
from tensormask.data.shapes import write_split
from tensormask.utils.errors import UserError

SMALL = [
    *("MODEL.TENSOR_MASK.NUM_CONVS", "1", "MODEL.FPN.OUT_CHANNELS", "16"),
    *("SOLVER.IMS_PER_BATCH", "1", "SOLVER.MAX_ITER", "2", "SOLVER.WARMUP_ITERS", "1"),
    *("INPUT.MIN_SIZE_TRAIN", "[64]", "INPUT.MIN_SIZE_TEST", "64"),
]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_split("val", 2, folder)
    return f"{folder}/annotations.json@{folder}/images"


# ---- files of runs ----


def test_runs_are_found_by_their_settings(tmp_path):
    file = tmp_path / "new" / "runs.jsonl"
    assert runs.read_runs(file) == []
    runs.append_run(file, {"lr": 0.1, "sizes": (1, 2)}, {"AP": 3.0})
    runs.append_run(file, {"lr": 0.2, "sizes": (1, 2)}, {"AP": 4.0})
    assert runs.find_run(file, {"lr": 0.2, "sizes": (1, 2)})["AP"] == 4.0
    assert runs.find_run(file, {"lr": 0.2, "sizes": (1, 3)}) is None
    assert {"commit", "machine"} < runs.read_runs(file)[0].keys()


def test_runs_are_chosen_by_values(tmp_path):
    file = tmp_path / "runs.jsonl"
    for model, lr in (("v1", 0.1), ("v1", 0.2), ("v2", 0.1)):
        runs.append_run(file, {"data": "shapes", "model": model, "lr": lr}, {})
    assert len(runs.choose_runs(file, "shapes")) == 3
    (run,) = runs.choose_runs(file, "shapes", model=["v1", "v3"], lr=[0.1])
    assert (run["settings"]["model"], run["settings"]["lr"]) == ("v1", 0.1)
    with pytest.raises(UserError, match=r"no run of nuclei, lr \[0.1\]"):
        runs.choose_runs(file, "nuclei", lr=[0.1])


def test_seeds_are_rows_of_mean_and_spread():
    records = [
        {
            "settings": {"lr": lr, "seed": seed},
            "segm": {f"{m}@100": 10.0 * seed for m in ("AP", "AP50", "AP75", "APs", "APm")}
            | {"APl@100": -1.0},
            "bbox": {f"{m}@100": 1.0 for m in ("AP", "AP50", "AP75", "APs", "APm", "APl")},
            **{"steps": 7, "train_cpu_seconds": 2.0},
        }
        for lr, seed in ((0.1, 1), (0.2, 1), (0.1, 3))
    ]
    first, second = runs.group_seeds(records)
    row = runs.summarize(first)
    assert row["seeds"] == "1 3"
    assert row["mask AP at 100"] == "20.0 ± 10.0"
    assert "mask APl at 100" not in row
    assert runs.summarize(second)["mask AP at 100"] == "10.0"
    assert runs.markdown([{"a": 1, "b": 2}]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_score_by_hand(tmp_path):
    """Of two objects the better detection finds one; a limit of one detection hides the other."""
    squares = [[[x, 0.0, x + 8, 0.0, x + 8, 8.0, x, 8.0]] for x in (0.0, 20.0)]
    common = {"image_id": 1, "category_id": 1}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 10, "width": 40}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": i, "segmentation": s, "bbox": [s[0][0], 0, 8, 8], "iscrowd": 0, "area": 64}
            | common
            for i, s in enumerate(squares, start=1)
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    dataset = CocoDataset("a", tmp_path / "a.json", tmp_path)
    truth = dataset.to_coco()
    found = [
        {**common, "score": score, "bbox": [20.0 * i, 0, 8, 8]}
        | {"segmentation": truth.annToRLE(truth.anns[key])}
        for i, (key, score) in enumerate(zip(sorted(truth.anns), (0.9, 0.8), strict=True))
    ]
    for one in found:
        one["segmentation"]["counts"] = one["segmentation"]["counts"].decode()
    (tmp_path / "found.json").write_text(json.dumps(found))
    scores = runs.score(dataset, tmp_path / "found.json", [1, 100])
    for metrics in scores.values():
        assert metrics["AP@100"] == metrics["APs@100"] == metrics["AP75@100"] == 100
        # Precision 1 at the 51 recalls up to 0.5, of 101.
        assert metrics["AP@1"] == pytest.approx(100 * 51 / 101)
        assert metrics["APm@100"] == -1
    (tmp_path / "found.json").write_text("[]")
    assert runs.score(dataset, tmp_path / "found.json", [100])["segm"]["AP@100"] == 0


def test_points_of_a_plot(tmp_path, monkeypatch):
    """A point is the mean of the seeds, their range the bar; a model's line goes up in time."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: figures.append(self))
    records = [
        {
            "settings": {"model": model, "opts": [], "budget": seconds, "seed": seed},
            "segm": {"AP@100": ap},
            **{"train_cpu_seconds": seconds + seed, "steps": 10 * seconds},
        }
        for model, seconds, seed, ap in (
            ("v2", 300, 1, 40.0),
            ("v2", 100, 1, 20.0),
            ("v2", 300, 3, 46.0),
            ("maskrcnn", 100, 1, 10.0),
        )
    ]
    plot.plot_comparison(records, tmp_path / "a.png")
    by_time, by_steps = figures[0].axes
    (ours, _, (bars,)), (theirs, *_) = by_time.containers
    assert ours.get_xydata().tolist() == [[101, 20], [302, 43]]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[20, 20], [40, 46]]
    assert theirs.get_xydata().tolist() == [[101, 10]]
    assert by_steps.containers[0][0].get_xydata().tolist() == [[1000, 20], [3000, 43]]
    assert [text.get_text() for text in by_time.get_legend().texts] == ["v2", "maskrcnn"]


# ---- Mask R-CNN ----


@pytest.fixture(scope="module")
def mask_rcnn():
    torch.manual_seed(0)
    return MaskRCNNAdapter(
        "maskrcnn_narrow",
        norm="GN",
        num_classes=3,
        anchor_sizes=((8, 12), (16, 24), (32, 48), (64, 96), (128, 192)),
        num_regions=64,
        pixel_mean=[127.5] * 3,
        pixel_std=[57.0] * 3,
        score_threshold=0.02,
        num_detections=7,
    )


@pytest.mark.parametrize("training", [True, False])
def test_mask_rcnn_does_not_resize_images(mask_rcnn, training):
    sizes = []
    hook = mask_rcnn.model.backbone.register_forward_pre_hook(
        lambda _, inputs: sizes.append(inputs[0].shape)
    )
    image, target = tiny.make_image(64, 96), tiny.target(64, 96, [[8, 8, 40, 40]])
    with torch.no_grad():
        mask_rcnn.train(training)([image], [target] if training else None)
    hook.remove()
    assert sizes == [(1, 3, 64, 96)]


def test_mask_rcnn_has_losses_also_without_objects(mask_rcnn):
    images = [tiny.make_image(64, 96), tiny.make_image(64, 64)]
    targets = [tiny.target(64, 96, [[8, 8, 40, 40], [50, 20, 80, 60]]), tiny.target(64, 64, [])]
    seen = []
    hook = mask_rcnn.model.roi_heads.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[3])
    )
    losses = mask_rcnn.train()(images, targets)
    hook.remove()
    assert len(losses) == 5
    assert all(loss.isfinite() for loss in losses.values())
    assert seen[0][0]["labels"].tolist() == [1, 2]  # 0 is the background
    assert torch.equal(seen[0][0]["boxes"], targets[0]["boxes"])


def test_mask_rcnn_detections_are_torchvisions_in_our_form(mask_rcnn):
    image = tiny.make_image(64, 96)
    with torch.no_grad():
        (own,), (larger,) = (
            mask_rcnn.eval()([image], output_sizes=[size]) for size in ((64, 96), (128, 192))
        )
        (theirs,) = mask_rcnn.model([image / 255])
    assert 0 < len(own["scores"]) <= 7
    assert torch.equal(own["boxes"], theirs["boxes"])
    assert torch.equal(own["labels"], theirs["labels"] - 1)
    assert own["labels"].min() >= 0
    assert torch.equal(own["masks"], theirs["masks"][:, 0] > 0.5)
    assert torch.allclose(larger["boxes"], 2 * own["boxes"])
    assert larger["masks"].shape[1:] == (128, 192)


def test_crop_by_hand():
    target = tiny.target(8, 10, [[0, 0, 3, 3], [4, 2, 10, 8], [5, 5, 6, 8]])
    image = torch.arange(240, dtype=torch.uint8).reshape(3, 8, 10)
    corner = iter([2, 4])
    rng = SimpleNamespace(integers=lambda high: next(corner))
    sample = compare_maskrcnn.crop_sample({"image": image, "target": target}, rng, side=5)
    assert torch.equal(sample["image"], image[:, 2:7, 4:9])
    # The first object is outside, the third one is 1 px wide.
    assert sample["target"]["boxes"].tolist() == [[0, 0, 5, 5]]
    assert sample["target"]["labels"].tolist() == [1]
    assert sample["target"]["masks"].all()
    whole = compare_maskrcnn.crop_sample(
        {"image": image, "target": target}, np.random.default_rng(0), side=20
    )
    assert whole["image"].shape == (3, 8, 10)


# ---- the commands ----


@pytest.fixture
def in_this_process(monkeypatch, nothing_left_behind):
    for module in (compare_maskrcnn, ablation_v2):
        monkeypatch.setattr(module, "in_fresh_process", lambda call, *args: call(*args))


def test_comparison_of_two_steps(shapes, tmp_path, capsys, in_this_process):
    words = ["--results", str(tmp_path / "runs.jsonl"), "--data", "shapes", "--steps", "2"]
    words += ["--model", "v1", "maskrcnn_narrow", "--opts", *SMALL]
    words += ["DATASETS.TRAIN", f"['{shapes}']", "DATASETS.TEST", f"['{shapes}']"]
    assert compare_maskrcnn.main(words) == 0
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split(" |")[0].split()[1] for line in table] == ["v1", "maskrcnn_narrow"]
    records = runs.read_runs(tmp_path / "runs.jsonl")
    assert [record["steps"] for record in records] == [2, 2]
    assert records[0]["curve"][-1]["steps"] == 2
    assert compare_maskrcnn.main(words) == 0  # nothing is trained again
    assert len(runs.read_runs(tmp_path / "runs.jsonl")) == 2
    assert compare_maskrcnn.main([*words, "--draw", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").is_file()
    assert compare_maskrcnn.main([*words, "--plot", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "b.png").is_file()


def test_ablation_of_two_steps(shapes, tmp_path, capsys, in_this_process):
    variants = tmp_path / "variants.yaml"
    variants.write_text(
        "shapes:\n  first:\n    config: quickstart_paper\n    SOLVER.BASE_LR: 0.002\n"
        "  second: {base: first, MODEL.TENSOR_MASK.MASK_LOSS_WEIGHT: 3.0}\n"
    )
    words = ["--results", str(tmp_path / "runs.jsonl"), "--data", "shapes"]
    words += ["--variants", str(variants), "--variant", "s*", "--opts", *SMALL]
    words += ["DATASETS.TRAIN", f"['{shapes}']", "DATASETS.TEST", f"['{shapes}']"]
    assert ablation_v2.main(words) == ablation_v2.main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("| second ")
    (record,) = runs.read_runs(tmp_path / "runs.jsonl")
    assert record["settings"]["overrides"] == {
        "SOLVER.BASE_LR": 0.002,
        "MODEL.TENSOR_MASK.MASK_LOSS_WEIGHT": 3.0,
    }
    assert record["steps"] == 2
    assert 0 < record["train_cpu_seconds"] < record["cpu_seconds"]
    (dumped,) = (
        path.read_text() for path in tmp_path.glob("runs/shapes_second_1_????????/config.yaml")
    )
    assert "MASK_LOSS_WEIGHT: 3.0" in dumped
    assert "BASE_LR: 0.002" in dumped


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("shapes: {a: {config: b}}", "no variant of shapes is named c"),
        ("shapes: {c: {base: d}}", "base d, which is not there"),
        ("shapes: {c: {SOLVER.BASE_LR: 1.0}}", "neither config nor base"),
    ],
)
def test_wrong_variants(content, words, tmp_path):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UserError, match=words):
        ablation_v2.read_variants(tmp_path / "a.yaml", "shapes", ["c"])


def test_variants_of_the_file_are_complete():
    for data in ("shapes", "nuclei"):
        variants = ablation_v2.read_variants(ablation_v2.VARIANTS, data, ["*"])
        for variant in variants.values():
            settings = {**variant, "data": data, "seed": 1, "opts": []}
            ablation_v2.build_config(settings, "nuclei", ablation_v2.ROOT)
