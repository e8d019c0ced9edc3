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
    noisy_case,
    rectangle,
)
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from tensormask.data import CocoDataset
from tensormask.data.checks.segmentation import segmentation_to_rle
from tensormask.evaluation import (
    coco_results,
    evaluate,
    evaluate_results,
    results_table,
)
from tensormask.evaluation.scoring import precision_curves

PHOTOGRAPHS = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco_cc"
STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def pycocotools_by_hand(annotation_path, results_path, iou_type, tmp_path):
    """Run pycocotools on the files; mask results are without boxes, as in pycocotools' demo."""
    results = json.loads(results_path.read_text())
    if iou_type == "segm":
        results = [{k: v for k, v in result.items() if k != "bbox"} for result in results]
    stripped = tmp_path / f"{iou_type}.json"
    stripped.write_text(json.dumps(results))
    coco = COCO(str(annotation_path))
    coco_eval = COCOeval(coco, coco.loadRes(str(stripped)), iou_type)
    coco_eval.evaluate()
    coco_eval.accumulate()
    coco_eval.summarize()
    return coco_eval


@pytest.mark.parametrize("max_dets", [100, 400])
def test_numbers_are_pycocotools_own(tmp_path, max_dets):
    dataset, found = noisy_case(tmp_path)
    results = evaluate(
        FakeModel(found), dataset.loader(), dataset, tmp_path / "out", max_dets=max_dets
    )
    path = tmp_path / "out" / "coco_instances_results.json"
    for task in ("bbox", "segm"):
        theirs = pycocotools_by_hand(dataset.json_file, path, task, tmp_path)
        for name, value in zip(STATS, theirs.stats, strict=False):
            assert results[task][name] == 100 * value, (task, name)
        for index, name in enumerate(CLASS_NAMES[:2]):
            by_class = theirs.eval["precision"][:, :, index, 0, 2]
            assert results[task][f"AP-{name}"] == 100 * by_class[by_class > -1].mean()
        assert math.isnan(results[task]["AP-never"])
        assert 5 < results[task]["AP"] < 95
        assert ("AP@400" in results[task]) == (max_dets == 400)


def test_the_area_under_a_curve_is_its_ap(tmp_path):
    dataset, found = noisy_case(tmp_path)
    results = evaluate(FakeModel(found), dataset.loader(), dataset, tmp_path / "out")
    for task, curves in json.loads(
        (tmp_path / "out" / "precision_recall.json").read_text()
    ).items():
        for name, precision in curves.items():
            assert len(precision) == 101
            assert 100 * np.mean(precision) == pytest.approx(results[task][name])


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
    for task in ("bbox", "segm"):
        theirs = pycocotools_by_hand(path, tmp_path / "coco_instances_results.json", task, tmp_path)
        for name, value in zip(STATS, theirs.stats, strict=False):
            assert results[task][name] == 100 * value, (task, name)
        for name, by_class in zip(
            dataset.class_names, np.moveaxis(theirs.eval["precision"], 2, 0), strict=True
        ):
            by_class = by_class[..., 0, 2]
            expected = 100 * by_class[by_class > -1].mean() if by_class.max() > -1 else math.nan
            assert results[task][f"AP-{name}"] == pytest.approx(expected, abs=0, nan_ok=True)

        theirs.params.maxDets = [1, 100, 300]
        theirs.evaluate()
        theirs.accumulate()
        for name, key in (("AP@300", "precision"), ("AR@300", "recall")):
            values = theirs.eval[key][..., 0, 2]
            assert results[task][name] == 100 * values[values > -1].mean()
        assert 5 < results[task]["AP"] < 95


def test_boxes_and_masks_are_scored_separately(tmp_path):
    """Hollow squares: object sizes are the box's for bbox, and the mask's for segm."""
    hollow = rectangle(10, 10, 50, 50) & ~rectangle(12, 12, 48, 48)  # 304 pixels in a 40 x 40 box
    truth = annotation(1, 1, 4, hollow) | {"area": 1600.0}  # medium
    dataset = GreyDataset(coco_json([truth], 1), tmp_path)
    # Never matched, so that only its own size decides whether it counts as a false positive.
    stray = rectangle(80, 60, 120, 100) & ~rectangle(82, 62, 118, 98)
    found = {1: detections([stray, hollow], [0, 0], [0.9, 0.8])}
    results = evaluate(FakeModel(found), dataset.loader(), dataset)
    # A box of 1600 square pixels is a medium false positive: precision 1/2 at every recall.
    assert results["bbox"]["APm"] == pytest.approx(50)
    # A mask of 304 pixels is a small one, which does not count among the medium ones.
    assert results["segm"]["APm"] == pytest.approx(100)


def test_perfect_detections_score_100(tmp_path):
    masks = [rectangle(5, 5, 20, 25), rectangle(30, 40, 100, 90), rectangle(30, 5, 150, 125)]
    truth = [annotation(i + 1, 1, c, masks[i]) for i, c in enumerate([4, 17, 17])]
    dataset = GreyDataset(coco_json(truth, 1), tmp_path)
    found = {1: detections(masks, [0, 1, 1], [0.9, 0.8, 0.7])}
    results = evaluate(FakeModel(found), dataset.loader(), dataset)
    for task in ("bbox", "segm"):
        assert [results[task][name] for name in STATS] == [pytest.approx(100)] * 6


def test_shifted_detection_has_the_ap_of_its_iou(tmp_path):
    """20 x 20 moved by 3 columns: IoU 340/460 = 0.739, right up to 0.70, wrong from 0.75 on."""
    truth = [annotation(1, 1, 4, rectangle(10, 10, 30, 30))]
    dataset = GreyDataset(coco_json(truth, 1), tmp_path)
    found = {1: detections([rectangle(13, 10, 33, 30)], [0], [0.5])}
    for metrics in evaluate(FakeModel(found), dataset.loader(), dataset).values():
        assert metrics["AP"] == pytest.approx(50)
        assert metrics["AP50"] == pytest.approx(100)
        assert metrics["AP75"] == pytest.approx(0)
        assert metrics["APs"] == pytest.approx(50)
        assert math.isnan(metrics["APm"])


def test_more_than_100_detections(tmp_path):
    """150 objects, all detected: 100 count at 100, so recall is 2/3; all count at 400."""
    masks = [rectangle(4 * c, 4 * r, 4 * c + 3, 4 * r + 3) for r in range(10) for c in range(15)]
    truth = [annotation(i + 1, 1, 4, mask) for i, mask in enumerate(masks)]
    dataset = GreyDataset(coco_json(truth, 1), tmp_path)
    found = {1: detections(masks, [0] * 150, np.linspace(1, 0.1, 150))}
    results = evaluate(FakeModel(found), dataset.loader(), dataset, tmp_path, max_dets=400)
    curves = json.loads((tmp_path / "precision_recall.json").read_text())
    assert curves["segm"] == dict.fromkeys(("AP", "AP50", "AP75"), [1.0] * 67 + [0.0] * 34)
    for metrics in results.values():
        # Precision is 1 at the recalls 0, 0.01, ..., 0.66: 67 of 101.
        assert metrics["AP"] == pytest.approx(100 * 67 / 101)
        assert metrics["AP@400"] == pytest.approx(100)
        assert metrics["AR@400"] == pytest.approx(100)
    fewer = evaluate(FakeModel(found), dataset.loader(), dataset, max_dets=30)["segm"]
    assert fewer["AR@30"] == pytest.approx(20)
    assert fewer["AP@30"] == pytest.approx(100 * 21 / 101)
    assert fewer["AP"] == pytest.approx(100 * 67 / 101)


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
    dataset = GreyDataset(coco_json(truth, 1), tmp_path)
    results = coco_results(detections([rectangle(10, 10, 30, 30)], [0], [0.5]), 1, [17, 4])
    metrics = evaluate_results(dataset.to_coco(), results, ["bar", "disc"], category_ids=[17, 4])
    assert metrics["bbox"]["AP-bar"] == pytest.approx(100)
    assert math.isnan(metrics["bbox"]["AP-disc"])


def test_classes_with_the_same_name_are_distinguished(tmp_path):
    truth = [annotation(1, 1, 4, rectangle(10, 10, 30, 30))]
    dataset = GreyDataset(coco_json(truth, 1), tmp_path)
    metrics = evaluate_results(dataset.to_coco(), [], ["cell", "cell", "bar"])["bbox"]
    assert metrics["AP-cell (id 4)"] == 0
    assert math.isnan(metrics["AP-cell (id 17)"])


def test_annotations_of_hand_made_files(tmp_path):
    """An id of 0, which COCOeval reads as "not found", and no area, crowd flag or box."""
    mask = rectangle(10, 10, 30, 30)
    bare = annotation(0, 1, 4, mask)
    for key in ("area", "iscrowd", "bbox"):
        del bare[key]
    dataset = GreyDataset(coco_json([bare], 1), tmp_path)
    results = evaluate(FakeModel({1: detections([mask], [0], [0.5])}), dataset.loader(), dataset)
    for metrics in results.values():
        assert metrics["AP"] == metrics["APs"] == pytest.approx(100)


def test_annotations_without_a_mask_count_for_boxes_only(tmp_path, caplog):
    mask = rectangle(10, 10, 30, 30)
    truth = [annotation(i, 1, 4, mask) for i in (1, 2, 3, 4)]
    del truth[1]["segmentation"], truth[1]["area"]
    truth[2]["segmentation"] = []
    truth[3]["segmentation"] = [[10, 10, 30, 30]]
    dataset = GreyDataset(coco_json(truth, 1), tmp_path)
    found = {1: detections([mask], [0], [0.5])}
    results = evaluate(
        FakeModel(found), dataset.loader(), dataset, tmp_path / "out", num_visualized=1
    )
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


def test_errors_say_what_to_change(tmp_path):
    with pytest.raises(ValueError, match=r"3 categories.*NUM_CLASSES"):
        coco_results(detections([rectangle(1, 1, 9, 9)], [3], [0.5]), 1, CATEGORY_IDS)
    dataset = GreyDataset(coco_json([annotation(1, 1, 4, rectangle(1, 1, 9, 9))], 1), tmp_path)
    result = {"image_id": 5, "category_id": 4, "bbox": [1, 1, 8, 8], "score": 0.5}
    with pytest.raises(ValueError, match=r"no images .* \[5\]"):
        evaluate_results(dataset.to_coco(), [result], CLASS_NAMES)
    with pytest.raises(ValueError, match=r"'segm' needs a 'segmentation'"):
        evaluate_results(dataset.to_coco(), [result | {"image_id": 1}], CLASS_NAMES)
    with pytest.raises(ValueError, match="1 class names for 3"):
        evaluate_results(dataset.to_coco(), [], ["disc"])


def test_ids_of_any_kind(tmp_path):
    """Images and categories have numbers, strings, 0, negative and very large ids."""
    dataset, found = noisy_case(tmp_path)
    expected = evaluate(FakeModel(found), dataset.loader(), dataset)
    images = {1: -7, 2: 0, 3: 2**62 + 1, 4: 2**62 + 2, 15: "0", 16: "photograph"}
    categories = {4: -1, 17: 0, 90: "never"}
    content = json.loads(dataset.json_file.read_text())
    for entry in content["images"]:
        entry["id"] = images.get(entry["id"], entry["id"])
    for entry in content["categories"]:
        entry["id"] = categories[entry["id"]]
    for entry in content["annotations"]:
        entry["image_id"] = images.get(entry["image_id"], entry["image_id"])
        entry["category_id"] = categories[entry["category_id"]]
    other = GreyDataset(content, tmp_path)
    assert other.category_ids == [-1, 0, "never"]
    samples = [
        [sample | {"image_id": images.get(sample["image_id"], sample["image_id"])}]
        for (sample,) in dataset.loader()
    ]
    results = evaluate(FakeModel(found), samples, other, tmp_path / "out")
    assert results_table(results) == results_table(expected)
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {"photograph", "0", 0, 2**62 + 1} <= {result["image_id"] for result in written}
    assert {result["category_id"] for result in written} == {-1, 0}
