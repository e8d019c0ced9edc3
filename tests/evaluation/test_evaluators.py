"""pycocotools and faster-coco-eval give the same numbers; boundaries by their definition."""

import contextlib
import io
import math

import numpy as np
import pytest
from grey import (
    CATEGORY_IDS,
    CLASS_NAMES,
    GreyDataset,
    annotation,
    coco_json,
    detections,
    evaluate_found,
    noisy_case,
    rectangle,
)
from pycocotools.coco import COCO

import tensormask
from tensormask.data import IssueReporter, get_dataset
from tensormask.data.classes import UNKNOWN
from tensormask.engine import evaluator
from tensormask.evaluation import coco_results, evaluate_results
from tensormask.evaluation.evaluators import EVALUATORS, FASTER, find_matches, run_evaluator
from tensormask.utils.errors import UserError

faster = pytest.importorskip("faster_coco_eval", reason="the extra fast-eval is not installed")


def random_case(seed):
    """Images with crowds, ignored objects, ties, duplicates; every second case is malformed, too.

    Boxes have negative or huge sizes there, and masks no pixel.
    """
    rng, is_odd = np.random.default_rng(seed), seed % 2
    images = [{"id": i, "height": 24, "width": 30} for i in range(rng.integers(1, 5))]
    objects, found = [], []

    def region():
        (x, y), (w, h) = rng.integers(0, (27, 21)), rng.integers(1 - is_odd, 10, 2)
        box = np.array([x, y, w, h], float)
        if is_odd and rng.random() < 0.2:
            box[2:] *= rng.choice([-1, 1e5])
        return rectangle(x, y, x + w, y + h, 24, 30), box

    for image in images:
        regions = [region() for _ in range(rng.integers(0, 5))]
        for mask, box in regions:
            entry = annotation(len(objects) + 1, image["id"], int(rng.integers(0, 2)), mask)
            entry |= {"bbox": box.tolist(), "iscrowd": int(rng.random() < 0.2)}
            objects.append(entry | {"area": entry["area"] * rng.choice([1.0, 20, 200, 1e9])})
        for mask, box in [*regions, region(), region()]:
            for _ in range(rng.integers(0, 4)):
                moved = np.roll(mask, tuple(rng.integers(-1, 2, 2)), (0, 1))
                entry = annotation(0, image["id"], int(rng.integers(0, 2)), moved)
                entry["bbox"] = (box + rng.integers(-1, 2, 4) / 2).tolist()
                found.append(entry | {"score": round(rng.random(), 1)})
    return {"images": images, "annotations": objects, "categories": [{"id": 0}, {"id": 1}]}, found


def run(name, content, found, iou_type):
    region = {"bbox": "bbox"}.get(iou_type, "segmentation")
    keys = ("image_id", "category_id", "score", region)
    ground_truth = COCO()
    ground_truth.dataset = {key: [dict(entry) for entry in content[key]] for key in content}
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth.createIndex()
    results = [{key: entry[key] for key in keys} for entry in found]
    return run_evaluator(name, ground_truth, results, iou_type, [1, 3, 10, 100])


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(24))
def test_both_evaluators_are_equal(seed, iou_type):
    content, found = random_case(seed)
    ours, theirs = (run(name, content, found, iou_type) for name in EVALUATORS)
    for key in ("precision", "recall", "scores"):
        np.testing.assert_allclose(theirs.eval[key], ours.eval[key], rtol=0, atol=1e-15)
    # The matches at IoU 0.5, against those that pycocotools returns.
    images = [e for e in ours.evalImgs if e is not None and e["aRng"] == ours.params.areaRng[0]]
    expected = sorted(
        (score, match > 0)
        for e in images
        for score, match, ignored in zip(
            e["dtScores"][:3], e["dtMatches"][0, :3], e["dtIgnore"][0, :3], strict=True
        )
        if not ignored
    )
    for evaluation in (ours, theirs):
        scores, is_match, num_objects = find_matches(evaluation, 3)
        assert sorted(zip(scores.tolist(), is_match.tolist(), strict=True)) == expected
        assert num_objects == sum(np.count_nonzero(e["gtIgnore"] == 0) for e in images)


@pytest.mark.parametrize("max_dets", [7, 100, 400])
def test_all_metrics_of_an_evaluation_are_equal(tmp_path, max_dets):
    dataset, found = noisy_case(tmp_path)
    places = [rectangle(4 * c, 4 * r, 4 * c + 3, 4 * r + 3) for r in range(10) for c in range(15)]
    found[1] = detections(places, [0] * 150, np.linspace(1, 0.1, 150))  # more than 100
    found[2] = detections([], [], [])
    ours, theirs = (
        evaluate_found(found, dataset, max_dets=max_dets, evaluator=name) for name in EVALUATORS
    )
    for task in ("bbox", "segm"):
        assert theirs[task].keys() == ours[task].keys()
        for name, value in ours[task].items():
            assert theirs[task][name] == pytest.approx(value, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("objects", [0, 1])
def test_no_detections(tmp_path, objects):
    truth = [annotation(1, 1, 4, rectangle(10, 10, 30, 30))][:objects]
    dataset = GreyDataset(coco_json(truth), tmp_path)
    metrics = evaluate_results(dataset.to_coco(), [], CLASS_NAMES, evaluator=FASTER)["segm"]
    assert metrics["AP"] == 0 if objects else math.isnan(metrics["AP"])


def test_other_keys_of_annotations_have_no_influence(tmp_path):
    mask = rectangle(10, 10, 30, 30)
    keys = {"ignore": 1, "is_crowd": 1, "lvis_mark": True, "drop": True, "rle": 0, "score": "good"}
    dataset = GreyDataset(coco_json([annotation(1, 1, 4, mask) | keys]), tmp_path)
    found = {1: detections([mask], [0], [0.5])}
    for name in EVALUATORS:
        metrics = evaluate_found(found, dataset, evaluator=name)
        assert metrics["segm"]["AP"] == pytest.approx(100)


# ---- boundary AP ----


def boundary(mask):
    """The pixels of a mask less than its width, 2 % of the diagonal, from a pixel outside."""
    (height, width), inner = mask.shape, mask.copy()
    side = max(1, math.ceil(0.02 * math.hypot(height, width) - 0.5))
    padded = np.pad(mask, side)  # beyond the image is outside
    for y in range(2 * side + 1):
        for x in range(2 * side + 1):
            inner &= padded[y : y + height, x : x + width]
    return mask & ~inner


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_boundary_iou_is_that_of_its_definition():
    """Diagonals of 75, 125 and 175 px give widths of 1.5, 2.5 and 3.5, rounded down."""
    rng = np.random.default_rng(0)
    sizes = [(45, 60), (75, 100), (105, 140), (8, 60), (60, 8), (37, 53), (150, 90)]
    lower = 0
    for height, width in 3 * sizes:
        rows, columns = np.mgrid[:height, :width]
        masks = []
        for _ in range(2):
            center, radius = rng.uniform(0.4, 0.6, 2), rng.uniform(0.2, 0.7, 2)
            y, x = rows / height - center[0], columns / width - center[1]
            x, y = x / radius[1], y / radius[0]
            masks.append((x**2 + y**2 < 1) & (rng.random(x.shape) > 0.02))  # with holes
        truth, found = (annotation(1, 0, 0, mask) for mask in masks)
        content = {"images": [{"id": 0, "height": height, "width": width}]}
        content |= {"categories": [{"id": 0}], "annotations": [truth]}
        evaluation = run(FASTER, content, [found | {"score": 0.5}], "boundary")
        expected = min(iou(*masks), iou(*map(boundary, masks)))
        lower += expected < iou(*masks)
        assert evaluation.ious[0, 0] == pytest.approx(expected)
    assert lower > len(sizes)


def test_boundary_ap_is_lower_than_mask_ap_for_an_outline_that_is_off(tmp_path):
    """A square of 80 px grown by 2 px: mask IoU 6400/7056 = 0.907; widths of 4 px, IoU 0.373."""
    truth = [annotation(1, 1, 4, rectangle(20, 20, 100, 100))]
    dataset = GreyDataset(coco_json(truth), tmp_path)
    found = {1: detections([rectangle(18, 18, 102, 102)], [0], [0.5])}
    metrics = evaluate_found(found, dataset, tmp_path, evaluator=FASTER, boundary=True)
    assert metrics["segm"]["AP"] == pytest.approx(90)
    assert metrics["boundary"]["AP"] == metrics["boundary"]["AP50"] == 0
    assert metrics["segm"].keys() > metrics["boundary"].keys()  # no threshold without a match


@pytest.mark.parametrize(
    "options, message",
    [
        (["TEST.EVALUATOR", "pycoco"], "nearest name is 'pycocotools'"),
        (["TEST.BOUNDARY_AP", True], "needs TEST.EVALUATOR faster_coco_eval, it is pycocotools"),
    ],
)
def test_a_wrong_evaluator_is_refused_before_the_run(options, message):
    cfg = tensormask.get_cfg()
    cfg.merge_from_list(["DATASETS.TEST", ("nuclei_val",), "MODEL.TENSOR_MASK.NUM_CLASSES", 1])
    cfg.merge_from_list(options)
    with pytest.raises(UserError, match=message):
        evaluator.check_evaluation(cfg, UNKNOWN)


def test_the_keys_reach_the_evaluation_and_the_oracle(tmp_path, monkeypatch):
    given = []
    for name in ("evaluate", "evaluate_oracle"):
        monkeypatch.setattr(evaluator, name, lambda *_, **options: given.append(options) or {})
    cfg = tensormask.get_cfg()
    for key, value in {"EVALUATOR": FASTER, "BOUNDARY_AP": True, "ORACLE_ON": True}.items():
        cfg.merge_from_list([f"TEST.{key}", value])
    cfg.merge_from_list(["MODEL.TENSOR_MASK.NUM_CLASSES", 1, "MODEL.MASK_ON", True])
    dataset, reporter = get_dataset("nuclei_val"), IssueReporter({}, strict=False)
    model = object.__new__(tensormask.TensorMask)
    evaluator._evaluate_one(cfg, model, dataset, tmp_path, reporter, ())
    assert [options["evaluator"] for options in given] == [FASTER, FASTER]
    assert given[0]["boundary"]


def test_flat_images_have_no_boundary_ap(tmp_path):
    mask = rectangle(10, 0, 30, 4, 8, 200)
    dataset = GreyDataset(coco_json([annotation(1, 1, 4, mask)], 1, 8, 200), tmp_path)
    results = coco_results(detections([mask], [0], [0.5], (8, 200)), 1, CATEGORY_IDS)
    options = {"evaluator": FASTER, "iou_types": ["boundary"]}
    with pytest.raises(UserError, match="images of height 8 and width 200"):
        evaluate_results(dataset.to_coco(), results, CLASS_NAMES, **options)
