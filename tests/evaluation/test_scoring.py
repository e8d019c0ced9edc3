"""Metrics compared with pycocotools and hand-computed values; unusual annotations and ids."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from grey import (
    CATEGORY_IDS,
    CLASS_NAMES,
    FakeModel,
    GreyDataset,
    annotation,
    coco_json,
    detections,
    evaluate_found,
    noisy_case,
    rectangle,
)
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from tensormask.data import CocoDataset
from tensormask.data.checks.segmentation import segmentation_to_rle
from tensormask.evaluation import coco_results, evaluate, evaluate_results, results_table
from tensormask.evaluation.scoring import precision_curves

PHOTOGRAPHS = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco_cc"
STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def check_against_pycocotools(metrics, dataset, annotations, folder, max_dets):
    """Run pycocotools on the files; mask results are without boxes, as in pycocotools' demo."""
    results = json.loads((folder / "coco_instances_results.json").read_text())
    curves = json.loads((folder / "precision_recall.json").read_text())
    for task in ("bbox", "segm"):
        left_out = "bbox" if task == "segm" else ""
        stripped, coco = folder / f"{task}.json", COCO(str(annotations))
        reduced = [{k: v for k, v in result.items() if k != left_out} for result in results]
        stripped.write_text(json.dumps(reduced))
        theirs = COCOeval(coco, coco.loadRes(str(stripped)), task)
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
        for name, value in zip(STATS, theirs.stats, strict=False):
            assert metrics[task][name] == 100 * value, (task, name)
        by_class = np.moveaxis(theirs.eval["precision"], 2, 0)[..., 0, 2]
        for name, values in zip(dataset.class_names, by_class, strict=True):
            expected = 100 * values[values > -1].mean() if values.max() > -1 else math.nan
            np.testing.assert_equal(metrics[task][f"AP-{name}"], expected)  # NaN equals NaN
        assert 5 < metrics[task]["AP"] < 95
        for name, precision in curves[task].items():
            assert len(precision) == 101
            assert 100 * np.mean(precision) == pytest.approx(metrics[task][name])

        theirs.params.maxDets = [1, 100, max_dets]
        theirs.evaluate()
        theirs.accumulate()
        extra = {f"AP@{max_dets}": "precision", f"AR@{max_dets}": "recall"}
        assert extra.keys() & metrics[task] == (extra.keys() if max_dets != 100 else set())
        for name in extra.keys() & metrics[task]:
            values = theirs.eval[extra[name]][..., 0, 2]
            assert metrics[task][name] == 100 * values[values > -1].mean()


@pytest.mark.parametrize("max_dets", [100, 400])
def test_numbers_are_pycocotools_own(tmp_path, max_dets):
    dataset, found = noisy_case(tmp_path)
    metrics = evaluate_found(found, dataset, tmp_path / "out", max_dets=max_dets)
    check_against_pycocotools(metrics, dataset, dataset.json_file, tmp_path / "out", max_dets)
    assert math.isnan(metrics["segm"]["AP-never"])


def test_classes_without_objects_do_not_change_a_curve():
    precision = np.full((10, 101, 2, 4, 3), -1.0)
    params = SimpleNamespace(iouThrs=np.linspace(0.5, 0.95, 10), maxDets=[1, 10, 100])
    coco_eval = SimpleNamespace(params=params, eval={"precision": precision})
    assert precision_curves(coco_eval) == {"AP": [], "AP50": [], "AP75": []}
    precision[:, :, 1] = 0.5
    assert precision_curves(coco_eval)["AP"] == [0.5] * 101


def jittered(dataset, image_id, rng):
    """Annotated objects that are moved, of a wrong class, missed, or detected several times."""
    height, width = dataset.image_size(image_id)
    boxes, labels, masks = [], [], []
    for one in dataset.annotations(image_id):
        code = segmentation_to_rle(one["segmentation"], (height, width))
        x, y, w, h = one["bbox"]
        for _ in range(rng.choice([0, 1, 1, 1, 2, 8])):
            dy, dx = rng.integers(-6, 7, 2)
            masks.append(np.roll(rle_tools.decode(code), (dy, dx), (0, 1)))
            moved = np.array([x + dx, y + dy, x + w + dx, y + h + dy])
            boxes.append(moved + rng.normal(0, 3, 4))
            wrong = rng.random() < 0.2
            labels.append(rng.integers(0, 80) if wrong else dataset.label_of(one))
    return {
        "boxes": torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32),
        "scores": torch.tensor(rng.random(len(boxes)).round(2), dtype=torch.float32),  # with ties
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": torch.from_numpy(np.array(masks, bool).reshape(-1, height, width)),
    }


@pytest.mark.skipif(not PHOTOGRAPHS.exists(), reason="../shared with coco_cc is not here")
def test_numbers_on_photographs_are_pycocotools_own(tmp_path):
    """COCO's polygons and crowds, read by our data set; by hand from the same two files."""
    content = json.loads((PHOTOGRAPHS / "instances_val.json").read_text())
    crowded = {a["image_id"] for a in content["annotations"] if a["iscrowd"]}
    chosen = {*sorted(crowded)[:3], *(image["id"] for image in content["images"][:8])}
    content["images"] = [image for image in content["images"] if image["id"] in chosen]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in chosen]
    path = tmp_path / "photographs.json"
    path.write_text(json.dumps(content))
    dataset = CocoDataset("cc", path, PHOTOGRAPHS / "val")
    rng = np.random.default_rng(0)
    model = nn.Module()
    model.forward = lambda images, output_sizes: [jittered(dataset, int(images[0]), rng)]
    samples = [
        [{"image": torch.tensor(i), "image_id": i, **dataset.image(i)}] for i in dataset.image_ids
    ]
    results = evaluate(model, samples, dataset, tmp_path, max_dets=300)
    check_against_pycocotools(results, dataset, path, tmp_path, 300)


def test_boxes_and_masks_are_scored_separately(tmp_path):
    """Hollow squares: object sizes are the box's for bbox, and the mask's for segm."""
    hollow = rectangle(10, 10, 50, 50) & ~rectangle(12, 12, 48, 48)  # 304 pixels in a 40 x 40 box
    truth = annotation(1, 1, 4, hollow) | {"area": 1600.0}  # medium
    dataset = GreyDataset(coco_json([truth]), tmp_path)
    # Never matched, so that only its own size decides whether it counts as a false positive.
    stray = rectangle(80, 60, 120, 100) & ~rectangle(82, 62, 118, 98)
    found = {1: detections([stray, hollow], [0, 0], [0.9, 0.8])}
    results = evaluate_found(found, dataset)
    # A box of 1600 square pixels is a medium false positive: precision 1/2 at every recall.
    assert results["bbox"]["APm"] == pytest.approx(50)
    # A mask of 304 pixels is a small one, which does not count among the medium ones.
    assert results["segm"]["APm"] == pytest.approx(100)


def test_shifted_detection_has_the_ap_of_its_iou(tmp_path):
    """20 x 20 moved by 3 columns: IoU 340/460 = 0.739, right up to 0.70, wrong from 0.75 on."""
    truth = [annotation(1, 1, 4, rectangle(10, 10, 30, 30))]
    dataset = GreyDataset(coco_json(truth), tmp_path)
    found = {1: detections([rectangle(13, 10, 33, 30)], [0], [0.5])}
    for metrics in evaluate_found(found, dataset).values():
        assert metrics["AP"] == pytest.approx(50)
        assert metrics["AP50"] == pytest.approx(100)
        assert metrics["AP75"] == pytest.approx(0)
        assert metrics["APs"] == pytest.approx(50)
        assert math.isnan(metrics["APm"])


def test_more_than_100_detections(tmp_path):
    """150 objects, all detected: 100 count at 100, so recall is 2/3; all count at 400."""
    masks = [rectangle(4 * c, 4 * r, 4 * c + 3, 4 * r + 3) for r in range(10) for c in range(15)]
    truth = [annotation(i + 1, 1, 4, mask) for i, mask in enumerate(masks)]
    dataset = GreyDataset(coco_json(truth), tmp_path)
    found = {1: detections(masks, [0] * 150, np.linspace(1, 0.1, 150))}
    results = evaluate_found(found, dataset, tmp_path, max_dets=400)
    curves = json.loads((tmp_path / "precision_recall.json").read_text())
    assert curves["segm"] == dict.fromkeys(("AP", "AP50", "AP75"), [1.0] * 67 + [0.0] * 34)
    for metrics in results.values():
        # Precision is 1 at the recalls 0, 0.01, ..., 0.66: 67 of 101.
        assert metrics["AP"] == pytest.approx(100 * 67 / 101)
        assert metrics["AP@400"] == pytest.approx(100)
        assert metrics["AR@400"] == pytest.approx(100)
    fewer = evaluate_found(found, dataset, max_dets=30)["segm"]
    assert fewer["AR@30"] == pytest.approx(20)
    assert fewer["AP@30"] == pytest.approx(100 * 21 / 101)
    assert fewer["AP"] == pytest.approx(100 * 67 / 101)


def test_best_f1_of_all_classes_together(tmp_path):
    """4 objects and a crowd; matches (+), others (-): 0.9 +, 0.8 +, 0.8 -, 0.7 +, 0.6 -, 0.3 +.

    F1 = 2 TP / (detections + objects): 2/5 above 0.8, 4/7 above 0.7, 6/8 above 0.6, 8/10 above 0.3
    if all count. The detection of 0.75 is of a crowd and does not.
    """
    places = [rectangle(20 * i, 10, 20 * i + 15, 30) for i in range(8)]
    truth = [
        *(annotation(i + 1, 1, 4, places[i]) for i in (0, 1)),
        *(annotation(i + 1, 2, 17, places[i]) for i in (2, 3)),
        annotation(5, 1, 4, places[4], iscrowd=1),
    ]
    dataset = GreyDataset(coco_json(truth, 2), tmp_path)
    found = {
        1: detections([places[i] for i in (0, 1, 5, 4)], [0, 0, 0, 0], [0.9, 0.8, 0.8, 0.75]),
        2: detections([places[i] for i in (2, 6, 3)], [1, 0, 1], [0.7, 0.6, 0.3]),
    }
    for metrics in evaluate_found(found, dataset).values():
        assert metrics["best_f1"] == pytest.approx(80)
        assert metrics["best_f1_threshold"] == pytest.approx(0.2997)  # just below the lowest
    found[2] = detections([places[i] for i in (2, 6, 7)], [1, 0, 1], [0.7, 0.6, 0.3])
    metrics = evaluate_found(found, dataset)["segm"]
    assert metrics["best_f1"] == pytest.approx(75)
    assert metrics["best_f1_threshold"] == pytest.approx(0.65)
    # One detection per image and class: 0.9 +, 0.7 +, 0.6 -; 4/6 above 0.6.
    metrics = evaluate_found(found, dataset, max_dets=1)["segm"]
    assert metrics["best_f1"] == pytest.approx(100 * 4 / 6)
    assert metrics["best_f1_threshold"] == pytest.approx(0.65)
    # No threshold separates equal scores: 0.9 +, 0.8 +, 0.8 -.
    found[2] = detections([], [], [])
    assert evaluate_found(found, dataset)["segm"]["best_f1"] == pytest.approx(100 * 4 / 7)


@pytest.mark.parametrize("has_objects", [True, False])
def test_no_best_f1_without_a_match(tmp_path, has_objects):
    truth = [annotation(1, 1, 4, rectangle(10, 10, 30, 30))][: int(has_objects)]
    dataset = GreyDataset(coco_json(truth, 2), tmp_path)
    for masks in ([], [rectangle(50, 50, 60, 60)]):
        results = coco_results(detections(masks, [0] * len(masks), [0.5] * len(masks)), 1, [4])
        metrics = evaluate_results(dataset.to_coco(), results, CLASS_NAMES)["segm"]
        assert not [name for name in metrics if "f1" in name]


def test_only_the_given_images_and_categories_count(tmp_path):
    truth = [annotation(i, i, 4, rectangle(10, 10, 30, 30)) for i in (1, 2)]
    dataset = GreyDataset(coco_json(truth, 2), tmp_path)
    results = coco_results(detections([rectangle(10, 10, 30, 30)], [0], [0.5]), 2, CATEGORY_IDS)
    both = evaluate_results(dataset.to_coco(), results, CLASS_NAMES)
    second = evaluate_results(dataset.to_coco(), results, CLASS_NAMES, image_ids=[2])
    other = evaluate_results(dataset.to_coco(), results, ["bar"], category_ids=[17])
    assert both["segm"]["AP"] == pytest.approx(100 * 51 / 101)  # recall 1/2
    assert second["segm"]["AP"] == pytest.approx(100)
    assert math.isnan(other["segm"]["AP"])


def test_categories_in_any_order_keep_their_names(tmp_path):
    truth = [annotation(1, 1, 17, rectangle(10, 10, 30, 30))]
    dataset = GreyDataset(coco_json(truth), tmp_path)
    results = coco_results(detections([rectangle(10, 10, 30, 30)], [0], [0.5]), 1, [17, 4])
    metrics = evaluate_results(dataset.to_coco(), results, ["bar", "disc"], category_ids=[17, 4])
    assert metrics["bbox"]["AP-bar"] == pytest.approx(100)
    assert math.isnan(metrics["bbox"]["AP-disc"])


def test_classes_with_the_same_name_are_distinguished(tmp_path):
    truth = [annotation(1, 1, 4, rectangle(10, 10, 30, 30))]
    dataset = GreyDataset(coco_json(truth), tmp_path)
    metrics = evaluate_results(dataset.to_coco(), [], ["cell", "cell", "bar"])["bbox"]
    assert metrics["AP-cell (id 4)"] == 0
    assert math.isnan(metrics["AP-cell (id 17)"])


def test_annotations_of_hand_made_files(tmp_path):
    """An id of 0, which COCOeval reads as "not found", and no area, crowd flag or box."""
    mask = rectangle(10, 10, 30, 30)
    bare = annotation(0, 1, 4, mask)
    for key in ("area", "iscrowd", "bbox"):
        del bare[key]
    dataset = GreyDataset(coco_json([bare]), tmp_path)
    for metrics in evaluate_found({1: detections([mask], [0], [0.5])}, dataset).values():
        assert metrics["AP"] == metrics["APs"] == pytest.approx(100)


def test_annotations_without_a_mask_count_for_boxes_only(tmp_path, caplog):
    mask = rectangle(10, 10, 30, 30)
    truth = [annotation(i, 1, 4, mask) for i in (1, 2, 3, 4)]
    del truth[1]["segmentation"], truth[1]["area"]
    truth[2]["segmentation"] = []
    truth[3]["segmentation"] = [[10, 10, 30, 30]]
    dataset = GreyDataset(coco_json(truth), tmp_path)
    found = {1: detections([mask], [0], [0.5])}
    results = evaluate_found(found, dataset, tmp_path / "out", num_visualized=1)
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["bbox"]["AP"] == pytest.approx(100 * 26 / 101)  # recall 1/4
    assert "3 annotations have no region to score as segm" in caplog.text


def test_arguments_are_not_changed(tmp_path):
    dataset, found = noisy_case(tmp_path)
    coco_gt = dataset.to_coco()
    truth = copy.deepcopy(coco_gt.dataset)
    results = [r for i, one in found.items() for r in coco_results(one, i, CATEGORY_IDS)]
    before = copy.deepcopy(results)
    evaluate_results(coco_gt, results, CLASS_NAMES)
    assert coco_gt.dataset == truth
    assert results == before


def test_ids_of_any_kind(tmp_path):
    """Ids are numbers, strings, 0, negative and very large; batches have several images."""
    dataset, found = noisy_case(tmp_path)
    expected = evaluate_found(found, dataset)
    images = {1: -7, 2: 0, 3: 2**62 + 1, 4: 2**62 + 2, 15: "0", 16: "photograph"}
    categories = {4: -1, 17: 0, 90: "never"}
    content = json.loads(dataset.json_file.read_text())
    for group, key, new in (
        *(("images", "id", images), ("categories", "id", categories)),
        *(("annotations", "image_id", images), ("annotations", "category_id", categories)),
    ):
        for entry in content[group]:
            entry[key] = new.get(entry[key], entry[key])
    other = GreyDataset(content, tmp_path)
    assert other.category_ids == [-1, 0, "never"]
    samples = [
        sample | {"image_id": images.get(sample["image_id"], sample["image_id"])}
        for (sample,) in dataset.loader()
    ]
    results = evaluate(FakeModel(found), [samples[:4], samples[4:]], other, tmp_path / "out")
    assert results_table(results) == results_table(expected)
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {"photograph", "0", 0, 2**62 + 1} <= {result["image_id"] for result in written}
    assert {result["category_id"] for result in written} == {-1, 0}
