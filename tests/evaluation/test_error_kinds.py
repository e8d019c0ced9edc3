"""TIDE's kinds of error, the confusion matrix and the quality of images."""

import json
import math

import numpy as np
import pytest
from grey import evaluate_found, noisy_case

from tensormask.evaluation import details
from tensormask.evaluation.details import confusion, image_quality
from tensormask.evaluation.error_kinds import KINDS, _collect, _mean_ap, error_kinds
from tensormask.evaluation.matching import match_images

# Objects 10 px high and wide; a box that is moved by 2 px has an IoU of 2/3, by 5 px of 1/3.
OBJECTS = [(0, "cat"), (100, "dog"), (200, "cat"), (300, "cat")]
FOUND = [  # kind, x, label, score
    ("match", 0, "cat", 0.9),
    ("duplicate", 2, "cat", 0.8),
    ("classification", 100, "cat", 0.7),
    ("localization", 205, "cat", 0.6),
    ("both", 105, "cat", 0.5),
    ("background", 150, "dog", 0.4),
]
LABELS = {"cat": 0, "dog": 1}


def matches(objects, found, num_images=1, crowds=()):
    def box(x):
        return [x, 0, 10, 10]

    annotations = [
        {"image_id": 0, "category_id": LABELS[label], "bbox": box(x), "iscrowd": crowd}
        for group, crowd in ((objects, 0), (crowds, 1))
        for x, label in group
    ]
    results = [
        {"image_id": 0, "category_id": LABELS[label], "bbox": box(x), "score": score}
        for _, x, label, score in found
    ]
    return list(match_images(annotations, results, "bbox", num_images))


def test_each_kind_by_hand():
    """Cats: 3 objects, the first of 5 detections matches. Dogs: 1 object, no match."""
    errors = error_kinds(matches(OBJECTS, FOUND), 2)
    assert {name: error["count"] for name, error in errors.items()} == {
        **dict.fromkeys(KINDS, 1), "missed": 1,
    }  # fmt: skip
    # Of 101 recalls, 34 are at most 1/3, 67 at most 2/3, and 51 at most 1/2.
    before = (34 / 101 + 0) / 2
    after = {
        # The dog is found first: precision 1 at its only recall.
        "classification": (34 / 101 + 1) / 2,
        # The second cat is found as the fourth of its class: precision 2/4.
        "localization": (34 / 101 + 33 / 101 * 2 / 4) / 2,
        # What comes after the last match changes nothing.
        **dict.fromkeys(("both", "duplicate", "background"), before),
        # Two of three cats remain, the second and the dog are what other corrections reach.
        "missed": 51 / 101 / 2,
    }
    for name, error in errors.items():
        assert error["dAP"] == pytest.approx(100 * (after[name] - before)), name


def test_false_positives_above_a_match_cost_ap():
    found = [("duplicate", 2, "cat", 0.8), ("match", 0, "cat", 0.9), ("match", 300, "cat", 0.1)]
    errors = error_kinds(matches([(0, "cat"), (300, "cat")], found), 2)
    assert errors["duplicate"] == {"count": 1, "dAP": pytest.approx(100 * 50 / 101 / 3)}


def test_of_corrected_and_matched_detections_the_best_remains():
    """TIDE's section 2.3: the lower one is suppressed. (Its code suppresses the corrected one.)"""
    found = [("localization", 5, "cat", 0.9), ("match", 0, "cat", 0.5)]
    errors = error_kinds(matches([(0, "cat")], found), 2)
    assert errors["localization"] == {"count": 1, "dAP": pytest.approx(50)}
    assert errors["missed"] == {"count": 0, "dAP": 0}


def test_nothing_found_and_nothing_to_find():
    errors = error_kinds(matches(OBJECTS, []), 2)
    assert errors["missed"] == {"count": 4, "dAP": 100}
    for images in (matches([], FOUND), []):
        errors = error_kinds(images, 2)
        assert errors["background"]["count"] == len(FOUND) * bool(images)
        assert all(math.isnan(error["dAP"]) for error in errors.values())


def test_a_detection_of_a_crowd_is_no_error():
    images = matches(OBJECTS, [("crowd", 152, "dog", 0.9)], crowds=[(150, "dog")])
    assert not any(error_kinds(images, 2)[kind]["count"] for kind in KINDS[:-1])
    assert confusion(images, 2, 0.5) == [(0, 2, 3), (1, 2, 1)]
    assert image_quality(images[0], 0.5)["false_positives"] == 0


def test_confusion_and_quality_by_hand():
    (image,) = matches(OBJECTS, FOUND)
    # The cat at 0, the dog as a cat; on the background the duplicate and a cat at 205; two missed.
    assert confusion([image], 2, 0.55) == [(0, 0, 1), (0, 2, 2), (1, 0, 1), (2, 0, 2)]
    assert image_quality(image, 0.85) == {
        **{"matched": 1, "false_positives": 0, "missed": 3, "quality": pytest.approx(1 / 2.5)},
    }  # fmt: skip
    (empty,) = matches([], [])
    assert math.isnan(image_quality(empty, 0.5)["quality"])


def test_only_the_100_best_of_a_class_count():
    found = [("background", 200, "cat", 0.9)] * 100 + [("match", 0, "cat", 0.1)]
    errors = error_kinds(matches([(0, "cat")], found), 2)
    assert errors["background"] == {"count": 100, "dAP": 0}
    assert errors["missed"]["count"] == 1


@pytest.mark.parametrize("evaluator", ["pycocotools", "faster_coco_eval"])
def test_the_file_of_an_evaluation(tmp_path, monkeypatch, evaluator):
    """Our matching gives COCO's AP50, with crowds, duplicates and wrong classes."""
    if evaluator != "pycocotools":
        pytest.importorskip(evaluator)
    dataset, found = noisy_case(tmp_path)
    matched = []
    match_all = details.match_images
    monkeypatch.setattr(
        details, "match_images", lambda *args: matched.append([*match_all(*args)]) or matched[-1]
    )
    metrics = evaluate_found(found, dataset, tmp_path / "out", evaluator=evaluator)
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["dataset"] == "grey"
    assert content["seconds_per_image"] > 0
    for task, images in zip(("bbox", "segm"), matched, strict=True):
        assert any(image.ignored.any() for image in images)
        detections, labels = _collect(images)
        num_objects = np.bincount(labels, minlength=3)
        of_task = content[task]
        expected = pytest.approx(metrics[task]["AP50"], rel=1e-9)
        assert _mean_ap(detections, num_objects, labels) == expected
        for row in of_task["by_class"]:
            ap = metrics[task][f"AP-{row['class']}"]
            assert row["all"] == (None if math.isnan(ap) else pytest.approx(ap))
            if row["objects"]:
                curve = of_task["precision50"][row["class"]]
                assert 100 * np.mean(curve) == pytest.approx(row["AP50"], abs=0.01)
        assert sum(row["objects"] for row in of_task["by_class"]) == len(labels)
        assert [row["image_id"] for row in of_task["images"]] == dataset.image_ids
        assert sum(row["matched"] + row["missed"] for row in of_task["images"]) == len(labels)
        by_object = [count for label, _, count in of_task["confusion"] if label < 3]
        assert sum(by_object) == len(labels)
        # What each image matches, recounted from COCO's best F1.
        true, *wrong = (
            sum(row[key] for row in of_task["images"])
            for key in ("matched", "false_positives", "missed")
        )
        assert 200 * true / (2 * true + sum(wrong)) == pytest.approx(metrics[task]["best_f1"])
