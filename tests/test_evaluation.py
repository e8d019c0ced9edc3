"""Evaluation against pycocotools run by hand, hand-computed values, and empty cases."""

import copy
import json
import logging
import math

import numpy as np
import pytest
import torch
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from tensormask.evaluation import (
    UnexpectedResultsError,
    coco_results,
    evaluate,
    evaluate_results,
    results_table,
    verify_results,
)
from tensormask.evaluation.pictures import draw_ground_truth, evenly_spread

CATEGORY_IDS = [4, 17, 90]
CLASS_NAMES = ["disc", "bar", "never"]  # no object is of the class "never"
STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class FakeModel(nn.Module):
    """Gives out detections by the id that the first pixel of a picture holds."""

    def __init__(self, detections):
        super().__init__()
        self.detections = detections
        self.frozen = nn.BatchNorm2d(1).eval()
        self.tower = nn.Dropout()

    def forward(self, images, output_sizes):
        assert not self.training
        assert not self.tower.training
        assert torch.is_inference_mode_enabled()
        found = [self.detections[int(image[0, 0, 0])] for image in images]
        for one, size in zip(found, output_sizes, strict=True):
            assert tuple(one["masks"].shape[1:]) == size
        return found


class FakeDataset:
    """What evaluation needs of a CocoDataset, from a dict in COCO's annotation format."""

    def __init__(self, annotations, tmp_path):
        path = tmp_path / "annotations.json"
        path.write_text(json.dumps(annotations))
        self.path = path
        self.name = "fake"
        self.coco = COCO(str(path))
        self.category_ids = CATEGORY_IDS
        self.class_names = CLASS_NAMES
        self.image_ids = sorted(self.coco.imgs)

    def load(self, image_id):
        size = self.coco.imgs[image_id]
        rgb = np.full((size["height"], size["width"], 3), 90, np.uint8)
        return rgb, self.coco.imgToAnns[image_id]

    def loader(self):
        for image_id in self.image_ids:
            size = self.coco.imgs[image_id]
            image = torch.full((3, 8, 8), image_id, dtype=torch.uint8)
            yield [{"image": image, "image_id": image_id, **size}]


def rectangle(x0, y0, x1, y1, height=128, width=160):
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def annotation(number, image_id, category_id, mask, iscrowd=0):
    code = rle_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": rle_tools.toBbox(code).tolist(),
        "area": float(mask.sum()),
        "iscrowd": iscrowd,
        "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
    }


def coco_json(annotations, num_images, height=128, width=160):
    images = [
        {"id": i, "file_name": f"{i}.png", "height": height, "width": width}
        for i in range(1, num_images + 1)
    ]
    categories = [
        {"id": i, "name": name} for i, name in zip(CATEGORY_IDS, CLASS_NAMES, strict=True)
    ]
    return {"images": images, "categories": categories, "annotations": annotations}


def detections(masks, labels, scores, size=(128, 160)):
    boxes = []
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": torch.from_numpy(np.array(masks, bool).reshape(-1, *size)),
    }


def noisy_case(tmp_path, num_images=16):
    """Objects of all sizes, shifted, missed, doubled and mislabelled, and a crowd."""
    rng = np.random.default_rng(0)
    annotations, found = [], {}
    for image_id in range(1, num_images + 1):
        masks, labels, scores = [], [], []
        for _ in range(rng.integers(0, 7)):
            w, h = np.exp(rng.uniform(np.log(6), np.log(126), 2)).astype(int)
            x, y = rng.integers(0, 160 - w), rng.integers(0, 128 - h)
            label = int(rng.integers(0, 2))
            mask = rectangle(x, y, x + w, y + h)
            crowd = int(rng.random() < 0.1)
            number = len(annotations) + 1
            annotations.append(annotation(number, image_id, CATEGORY_IDS[label], mask, crowd))
            for _ in range(rng.integers(0, 3)):
                shift = tuple(rng.integers(-3, 4, 2))
                moved = np.roll(mask, shift, (0, 1))
                masks.append(moved)
                labels.append(label if rng.random() < 0.8 else 1 - label)
                scores.append(rng.random())
        order = np.argsort(-np.array(scores, float))
        found[image_id] = detections(
            [masks[i] for i in order], [labels[i] for i in order], [scores[i] for i in order]
        )
    return FakeDataset(coco_json(annotations, num_images), tmp_path), found


def pycocotools_by_hand(annotation_path, results_path, iou_type, tmp_path):
    """Independent run from files: without boxes for masks, as pycocotools' own demo has results."""
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
        theirs = pycocotools_by_hand(dataset.path, path, task, tmp_path)
        for name, value in zip(STATS, theirs.stats, strict=False):
            assert results[task][name] == 100 * value, (task, name)
        for place, name in enumerate(CLASS_NAMES[:2]):
            by_class = theirs.eval["precision"][:, :, place, 0, 2]
            assert results[task][f"AP-{name}"] == 100 * by_class[by_class > -1].mean()
        assert math.isnan(results[task]["AP-never"])
        assert 5 < results[task]["AP"] < 95
        assert ("AP@400" in results[task]) == (max_dets == 400)


def test_boxes_and_masks_are_scored_apart(tmp_path):
    """Frames with large boxes and few pixels: sizes are the box's for bbox, the mask's for segm."""
    frame = rectangle(10, 10, 50, 50) & ~rectangle(12, 12, 48, 48)  # 304 pixels in a 40 x 40 box
    truth = annotation(1, 1, 4, frame) | {"area": 1600.0}  # medium
    dataset = FakeDataset(coco_json([truth], 1), tmp_path)
    # Never matched, so that only its own size decides whether it counts as a false positive.
    stray = rectangle(80, 60, 120, 100) & ~rectangle(82, 62, 118, 98)
    found = {1: detections([stray, frame], [0, 0], [0.9, 0.8])}
    results = evaluate(FakeModel(found), dataset.loader(), dataset)
    # A box of 1600 square pixels is a medium false positive: precision 1/2 at every recall.
    assert results["bbox"]["APm"] == pytest.approx(50)
    # A mask of 304 pixels is a small one, which does not count among the medium ones.
    assert results["segm"]["APm"] == pytest.approx(100)


def test_perfect_detections_score_100(tmp_path):
    masks = [rectangle(5, 5, 20, 25), rectangle(30, 40, 100, 90), rectangle(30, 5, 150, 125)]
    truth = [annotation(i + 1, 1, c, masks[i]) for i, c in enumerate([4, 17, 17])]
    dataset = FakeDataset(coco_json(truth, 1), tmp_path)
    found = {1: detections(masks, [0, 1, 1], [0.9, 0.8, 0.7])}
    results = evaluate(FakeModel(found), dataset.loader(), dataset)
    for task in ("bbox", "segm"):
        assert [results[task][name] for name in STATS] == [pytest.approx(100)] * 6


def test_shifted_detection_has_the_ap_of_its_iou(tmp_path):
    """20 x 20 moved by 3 columns: IoU 340/460 = 0.739, right up to 0.70, wrong from 0.75 on."""
    truth = [annotation(1, 1, 4, rectangle(10, 10, 30, 30))]
    dataset = FakeDataset(coco_json(truth, 1), tmp_path)
    found = {1: detections([rectangle(13, 10, 33, 30)], [0], [0.5])}
    for metrics in evaluate(FakeModel(found), dataset.loader(), dataset).values():
        assert metrics["AP"] == pytest.approx(50)
        assert metrics["AP50"] == pytest.approx(100)
        assert metrics["AP75"] == pytest.approx(0)
        assert metrics["APs"] == pytest.approx(50)
        assert math.isnan(metrics["APm"])


def test_more_than_100_detections(tmp_path):
    """150 objects, all found: 100 of them count at 100, so recall is 2/3; all of them at 400."""
    masks = [rectangle(4 * c, 4 * r, 4 * c + 3, 4 * r + 3) for r in range(10) for c in range(15)]
    truth = [annotation(i + 1, 1, 4, mask) for i, mask in enumerate(masks)]
    dataset = FakeDataset(coco_json(truth, 1), tmp_path)
    found = {1: detections(masks, [0] * 150, np.linspace(1, 0.1, 150))}
    results = evaluate(FakeModel(found), dataset.loader(), dataset, max_dets=400)
    for metrics in results.values():
        # Precision is 1 at the recalls 0, 0.01, ..., 0.66: 67 of 101.
        assert metrics["AP"] == pytest.approx(100 * 67 / 101)
        assert metrics["AP@400"] == pytest.approx(100)
        assert metrics["AR@400"] == pytest.approx(100)
    fewer = evaluate(FakeModel(found), dataset.loader(), dataset, max_dets=30)["segm"]
    assert fewer["AR@30"] == pytest.approx(20)
    assert fewer["AP@30"] == pytest.approx(100 * 21 / 101)
    assert fewer["AP"] == pytest.approx(100 * 67 / 101)


def test_no_detections_score_0(tmp_path):
    truth = [annotation(1, 1, 4, rectangle(10, 10, 30, 30))]
    dataset = FakeDataset(coco_json(truth, 1), tmp_path)
    out = tmp_path / "out"
    results = evaluate(
        FakeModel({1: detections([], [], [])}), dataset.loader(), dataset, out, num_visualized=1
    )
    assert results["bbox"]["AP"] == results["segm"]["AP"] == 0
    assert results["segm"]["AP-disc"] == 0
    assert math.isnan(results["segm"]["AP-bar"])
    assert json.loads((out / "coco_instances_results.json").read_text()) == []


def test_set_without_annotations_is_written_but_not_scored(tmp_path, caplog):
    images = coco_json([], 1)
    del images["annotations"]
    dataset = FakeDataset(images, tmp_path)
    found = {1: detections([rectangle(3, 4, 10, 12)], [1], [0.5])}
    with caplog.at_level(logging.WARNING, logger="tensormask"):
        assert evaluate(FakeModel(found), dataset.loader(), dataset, tmp_path / "out") == {}
    assert "no annotations" in caplog.text
    (result,) = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert result["bbox"] == [3, 4, 7, 8]
    assert result["category_id"] == 17


def test_model_without_masks_has_box_ap_only(tmp_path):
    truth = [annotation(1, 1, 4, rectangle(10, 10, 30, 30))]
    dataset = FakeDataset(coco_json(truth, 1), tmp_path)
    found = detections([rectangle(10, 10, 30, 30)], [0], [0.5])
    del found["masks"]
    model = nn.Module()
    model.forward = lambda images, output_sizes: [found]
    results = evaluate(model, dataset.loader(), dataset, tmp_path / "out", num_visualized=1)
    assert list(results) == ["bbox"]
    assert results["bbox"]["AP"] == pytest.approx(100)


def test_only_the_given_pictures_and_categories_count(tmp_path):
    truth = [annotation(i, i, 4, rectangle(10, 10, 30, 30)) for i in (1, 2)]
    dataset = FakeDataset(coco_json(truth, 2), tmp_path)
    results = coco_results(detections([rectangle(10, 10, 30, 30)], [0], [0.5]), 2, CATEGORY_IDS)
    both = evaluate_results(dataset.coco, results, CLASS_NAMES)
    second = evaluate_results(dataset.coco, results, CLASS_NAMES, image_ids=[2])
    other = evaluate_results(dataset.coco, results, ["bar"], category_ids=[17])
    assert both["segm"]["AP"] == pytest.approx(100 * 51 / 101)  # recall 1/2
    assert second["segm"]["AP"] == pytest.approx(100)
    assert math.isnan(other["segm"]["AP"])


def test_categories_in_any_order_keep_their_names(tmp_path):
    truth = [annotation(1, 1, 17, rectangle(10, 10, 30, 30))]
    dataset = FakeDataset(coco_json(truth, 1), tmp_path)
    results = coco_results(detections([rectangle(10, 10, 30, 30)], [0], [0.5]), 1, [17, 4])
    metrics = evaluate_results(dataset.coco, results, ["bar", "disc"], category_ids=[17, 4])
    assert metrics["bbox"]["AP-bar"] == pytest.approx(100)
    assert math.isnan(metrics["bbox"]["AP-disc"])


def test_classes_of_one_name_are_told_apart(tmp_path):
    truth = [annotation(1, 1, 4, rectangle(10, 10, 30, 30))]
    dataset = FakeDataset(coco_json(truth, 1), tmp_path)
    metrics = evaluate_results(dataset.coco, [], ["cell", "cell", "bar"])["bbox"]
    assert metrics["AP-cell (id 4)"] == 0
    assert math.isnan(metrics["AP-cell (id 17)"])


def test_annotations_of_hand_made_files(tmp_path):
    """An id of 0, which COCOeval reads as "not found", and no area, crowd flag or box."""
    mask = rectangle(10, 10, 30, 30)
    bare = annotation(0, 1, 4, mask)
    for key in ("area", "iscrowd", "bbox"):
        del bare[key]
    dataset = FakeDataset(coco_json([bare], 1), tmp_path)
    results = evaluate(FakeModel({1: detections([mask], [0], [0.5])}), dataset.loader(), dataset)
    for metrics in results.values():
        assert metrics["AP"] == metrics["APs"] == pytest.approx(100)


def test_annotations_without_a_mask_count_for_boxes_only(tmp_path, caplog):
    mask = rectangle(10, 10, 30, 30)
    truth = [annotation(i, 1, 4, mask) for i in (1, 2, 3, 4)]
    del truth[1]["segmentation"], truth[1]["area"]
    truth[2]["segmentation"] = []
    truth[3]["segmentation"] = [[10, 10, 30, 30]]
    dataset = FakeDataset(coco_json(truth, 1), tmp_path)
    found = {1: detections([mask], [0], [0.5])}
    results = evaluate(
        FakeModel(found), dataset.loader(), dataset, tmp_path / "out", num_visualized=1
    )
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["bbox"]["AP"] == pytest.approx(100 * 26 / 101)  # recall 1/4
    assert "3 annotations have nothing to score as segm" in caplog.text


def test_nothing_that_is_given_is_changed(tmp_path):
    dataset, found = noisy_case(tmp_path)
    truth = copy.deepcopy(dataset.coco.dataset)
    results = [r for i, one in found.items() for r in coco_results(one, i, CATEGORY_IDS)]
    before = copy.deepcopy(results)
    evaluate_results(dataset.coco, results, CLASS_NAMES)
    assert dataset.coco.dataset == truth
    assert results == before


def test_modes_are_restored_even_after_an_error(tmp_path):
    dataset, found = noisy_case(tmp_path)
    model = FakeModel(found).train()
    model.frozen.eval()
    evaluate(model, dataset.loader(), dataset)
    assert (model.training, model.tower.training, model.frozen.training) == (True, True, False)
    model.detections = {}
    with pytest.raises(KeyError):
        evaluate(model, dataset.loader(), dataset)
    assert (model.training, model.tower.training, model.frozen.training) == (True, True, False)


def test_pycocotools_prints_nothing(tmp_path, capsys):
    dataset, found = noisy_case(tmp_path)
    capsys.readouterr()
    evaluate(FakeModel(found), dataset.loader(), dataset)
    assert capsys.readouterr().out == ""


def test_coco_results_round_trip_through_json():
    masks = [rectangle(3, 4, 10, 12) | rectangle(20, 4, 22, 6), rectangle(0, 0, 160, 128)]
    found = detections(masks, [2, 0], [0.875, 0.1])
    results = json.loads(json.dumps(coco_results(found, 7, CATEGORY_IDS)))
    assert [result["category_id"] for result in results] == [90, 4]
    assert [result["bbox"] for result in results] == [[3, 4, 19, 8], [0, 0, 160, 128]]
    assert results[0]["score"] == 0.875
    assert results[1]["score"] == float(np.float32(0.1))
    for result, mask in zip(results, masks, strict=True):
        assert result["image_id"] == 7
        assert np.array_equal(rle_tools.decode(result["segmentation"]), mask)


def test_errors_say_what_to_change(tmp_path):
    with pytest.raises(ValueError, match=r"3 categories.*NUM_CLASSES"):
        coco_results(detections([rectangle(1, 1, 9, 9)], [3], [0.5]), 1, CATEGORY_IDS)
    dataset = FakeDataset(coco_json([annotation(1, 1, 4, rectangle(1, 1, 9, 9))], 1), tmp_path)
    result = {"image_id": 5, "category_id": 4, "bbox": [1, 1, 8, 8], "score": 0.5}
    with pytest.raises(ValueError, match=r"no picture \[5\]"):
        evaluate_results(dataset.coco, [result], CLASS_NAMES)
    with pytest.raises(ValueError, match=r"'segm' needs a 'segmentation'"):
        evaluate_results(dataset.coco, [result | {"image_id": 1}], CLASS_NAMES)
    with pytest.raises(ValueError, match="1 class names for 3"):
        evaluate_results(dataset.coco, [], ["disc"])


def test_pictures_are_written_for_evenly_spread_images(tmp_path):
    dataset, found = noisy_case(tmp_path)
    dataset.coco.imgs[16]["file_name"] = "below/1.png"  # the name of another one, elsewhere
    out = tmp_path / "out"
    evaluate(FakeModel(found), dataset.loader(), dataset, out, num_visualized=3)
    names = sorted(path.name for path in (out / "pictures").iterdir())
    assert names == ["1.png", "1_2.png", "9.png"]
    assert (out / "contact_sheet.png").stat().st_size > 1000


def test_no_pictures_by_default(tmp_path):
    dataset, found = noisy_case(tmp_path)
    evaluate(FakeModel(found), dataset.loader(), dataset, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["coco_instances_results.json"]


def test_ground_truth_is_drawn_without_crowds(tmp_path):
    truth = [
        annotation(1, 1, 4, rectangle(10, 10, 40, 40)),
        annotation(2, 1, 4, rectangle(80, 60, 120, 110), iscrowd=1),
    ]
    dataset = FakeDataset(coco_json(truth, 1), tmp_path)
    rgb = np.full((128, 160, 3), 90, np.uint8)
    picture, num_crowds = draw_ground_truth(rgb, dataset, 1)
    assert num_crowds == 1
    factor = picture.shape[0] // 128
    assert (picture[25 * factor, 25 * factor] != 90).any()
    assert (picture[85 * factor, 100 * factor] == 90).all()


@pytest.mark.parametrize(
    "count, expected", [(0, []), (1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (99, list(range(10)))]
)
def test_evenly_spread(count, expected):
    assert evenly_spread(list(range(10)), count) == expected


RESULTS = {"segm": {"AP": 30.5, "AP50": math.nan, "AP-a": 1.0}, "bbox": {"AP": 40.0, "AP-a": 2.0}}


def test_expected_results_within_tolerance_pass():
    verify_results([], RESULTS)
    verify_results([["segm", "AP", 30.0, 0.5], ["bbox", "AP", 43, 3]], RESULTS)


@pytest.mark.parametrize(
    "row, shown",
    [
        (["segm", "AP", 30.0, 0.4], "30.5000"),
        (["segm", "AP", 31.0, 0.4], "30.5000"),
        (["segm", "AP50", 30.0, 100.0], "nan"),
        (["segm", "AP75", 30.0, 100.0], "missing"),
        (["keypoints", "AP", 30.0, 100.0], "missing"),
    ],
)
def test_unexpected_results_fail_with_all_rows(row, shown):
    with pytest.raises(UnexpectedResultsError, match="1 of 2") as caught:
        verify_results([["bbox", "AP", 40.0, 0.1], row], RESULTS)
    *_, good, bad = str(caught.value).splitlines()
    assert good.split() == ["bbox", "AP", "40", "0.1", "40.0000", "ok"]
    assert bad.split()[-2:] == [shown, "FAILED"]


def test_a_malformed_expectation_is_refused():
    with pytest.raises(ValueError, match="EXPECTED_RESULTS"):
        verify_results([["segm", "AP", 30.0]], RESULTS)


def test_results_table():
    oracle = {"AP": 51.2, "AP-a": 3.0}
    assert results_table(RESULTS, oracle).splitlines() == [
        "           AP  AP50  AP75  APs  APm  APl",
        "segm    30.50     -     -    -    -    -",
        "bbox    40.00     -     -    -    -    -",
        "oracle  51.20     -     -    -    -    -",
        "",
        "AP by class  segm  bbox  oracle",
        "a            1.00  2.00    3.00",
    ]


def test_results_table_holds_every_class_and_limit():
    names = [f"class {i}" for i in range(80)]
    metrics = {"AP": 1.0, "AP@400": 22.0} | {f"AP-{name}": i for i, name in enumerate(names)}
    table = results_table({"segm": metrics})
    assert "AP@400" in table
    assert all(f"class {i} " in table and f"{i}.00" in table for i in range(80))
    assert len(table.splitlines()) < 40


def test_same_pictures_with_larger_batches(tmp_path):
    dataset, found = noisy_case(tmp_path)
    one_by_one = evaluate(FakeModel(found), dataset.loader(), dataset)
    samples = [sample for batch in dataset.loader() for sample in batch]
    batched = evaluate(FakeModel(found), [samples[:4], samples[4:]], dataset)
    assert results_table(one_by_one) == results_table(batched)
