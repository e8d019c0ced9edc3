"""What is wrong with a whole set: causes in random sets of random sizes, and in few entries."""

import copy
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from random_sets import (
    CAUSES,
    diagnosed,
    fields,
    names_of,
    polygon_of,
    random_set,
    scaled,
    swapped_axes,
)

from tensormask.data.checks.diagnosis import DIAGNOSES
from tensormask.data.statistics import count_contents
from tensormask.evaluation import evaluate_results

NUM_SETS = 2  # random sets for each cause


@pytest.mark.parametrize("cause", CAUSES)
def test_a_cause_in_the_whole_set_is_named_and_one_in_few_entries_is_not(tmp_path, cause):
    change, name = CAUSES[cause]
    rng = np.random.default_rng(list(CAUSES).index(cause))
    for num_annotations in rng.integers(10, 50, NUM_SETS).tolist():
        content = random_set(rng, num_annotations)
        images = {image["id"]: image for image in content["images"]}
        # In most of the annotations, and in few of them.
        for share, expected in ((1.0, [name]), (0.8, [name]), (0.08, [])):
            changed = copy.deepcopy(content)
            for annotation in changed["annotations"]:
                if rng.random() < share:
                    change(annotation, images[annotation["image_id"]])
            dataset = diagnosed(changed, tmp_path)
            assert names_of(dataset) == expected, (num_annotations, share)
            for diagnosis in dataset.diagnoses:
                assert diagnosis.name in str(diagnosis)
                assert set(diagnosis.as_record()) == {"name", "meaning", "detail", "mend"}
                assert len(str(diagnosis)) < 600


@pytest.mark.parametrize(
    "cause", ["shares", "shares, boxes only", "shares, masks only", "corners", "centers"]
)
@pytest.mark.parametrize("every", [2, 4])
def test_the_form_of_one_of_several_joined_files(tmp_path, cause, every):
    content = random_set(np.random.default_rng(every), 30)
    images = {image["id"]: image for image in content["images"]}
    for annotation in content["annotations"][::every]:
        CAUSES[cause][0](annotation, images[annotation["image_id"]])
    assert names_of(diagnosed(content, tmp_path)) == [CAUSES[cause][1]]


@pytest.mark.parametrize("num_annotations", [1, 2, 3, 4, 7, 15, 100])
def test_sets_without_a_cause(tmp_path, num_annotations):
    rng = np.random.default_rng(num_annotations)
    for _ in range(max(1, 30 // num_annotations)):
        assert names_of(diagnosed(random_set(rng, num_annotations), tmp_path)) == []


@pytest.mark.parametrize("num_annotations", [1, 2, 3])
def test_small_sets_of_tiny_and_crowded_objects(tmp_path, num_annotations):
    """One pixel at a corner, integers in 0..1, and a crowd beside an object are no causes."""
    image = {"id": 1, "file_name": "a.png", "height": 8, "width": 12}
    annotation = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "area": 1}
    annotation["segmentation"] = [[0, 0, 1, 0, 1, 1, 0, 1]]
    for crowds in range(num_annotations + 1):
        annotations = [
            {**annotation, "id": i, "iscrowd": int(i < crowds)} for i in range(num_annotations)
        ]
        content = {"images": [image], "categories": [{"id": 1, "name": "a"}]}
        dataset = diagnosed(content | {"annotations": annotations}, tmp_path)
        assert names_of(dataset) == ["crowds"] * (crowds == num_annotations)  # nothing is left


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("side", [1.0, 1.6, 2.9])
def test_boxes_of_tiny_objects_are_rounded(tmp_path, side, pad):
    rng = np.random.default_rng(0)
    content = random_set(rng, 20)
    for annotation in content["annotations"]:
        x, y = rng.uniform(3, 40, 2).tolist()
        box = [x, y, side, side]
        annotation["segmentation"] = [polygon_of({"segmentation": None, "bbox": box})]
        low, high = np.floor([x, y]), np.ceil([x + side, y + side])
        annotation["bbox"] = [*(low - pad).tolist(), *(high - low + pad).tolist()]
        annotation["area"] = side**2
    assert names_of(diagnosed(content, tmp_path)) == []


def test_percent_of_large_images(tmp_path):
    rng = np.random.default_rng(0)
    for num_annotations in (30, 60, 120):
        content = random_set(rng, num_annotations, with_rle=False)
        for image in content["images"]:
            image["height"] += 300
            image["width"] += 300
        images = {image["id"]: image for image in content["images"]}
        for annotation in content["annotations"]:
            image = images[annotation["image_id"]]
            size = image["width"] - 300, image["height"] - 300  # they reach near the border
            scaled(100)(annotation, {"width": size[0], "height": size[1]})
        assert names_of(diagnosed(content, tmp_path)) == ["coordinates_normalized"]


@pytest.mark.parametrize("region", [5, 40, 90, 130])
def test_objects_at_the_corner_of_their_images_are_not_in_percent(tmp_path, region):
    content = random_set(np.random.default_rng(region), 40, with_rle=False)
    for image in content["images"]:
        image |= {"height": 400, "width": 500}
    content["annotations"] = random_in(
        [image | {"height": region, "width": region} for image in content["images"]],
        np.random.default_rng(0),
        40,
    )
    assert names_of(diagnosed(content, tmp_path)) == []


def test_axes_of_boxes_and_masks_are_swapped(tmp_path):
    rng = np.random.default_rng(0)
    for num_annotations in (30, 100):
        content = random_set(rng, num_annotations)
        for image in content["images"]:
            image["width"] = 2 * image["height"]
        content["annotations"] = random_in(content["images"], rng, num_annotations)
        for annotation in content["annotations"]:
            swapped_axes(annotation, None)
        assert names_of(diagnosed(content, tmp_path)) == ["axes_swapped"]


def random_in(images, rng, num_annotations):
    """Boxes with a rectangular mask, anywhere in the images."""
    annotations = []
    for identity in range(num_annotations):
        image = images[identity % len(images)]
        size = np.array([image["width"], image["height"]])
        low, high = np.sort(rng.uniform(0, 1, (2, 2)) * size, axis=0)
        box = [*low.tolist(), *(high - low).tolist()]
        annotation = {"id": identity, "image_id": image["id"], "category_id": 1, "bbox": box}
        polygon = polygon_of(annotation | {"segmentation": None})
        annotations.append(annotation | {"segmentation": [polygon]})
    return annotations


def test_corners_without_masks_are_known_by_what_reaches_beyond(tmp_path):
    rng = np.random.default_rng(0)
    for num_annotations in (12, 40, 100):
        content = random_set(rng, num_annotations)
        content["annotations"] = random_in(content["images"], rng, num_annotations)
        for annotation in content["annotations"]:
            del annotation["segmentation"]
        assert names_of(diagnosed(content, tmp_path)) == ["masks_missing"]
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            annotation["bbox"] = [x, y, x + width, y + height]
        assert names_of(diagnosed(content, tmp_path)) == ["boxes_as_corners", "masks_missing"]


@pytest.mark.parametrize("shift, first", [(-1, 1), (1, 0), (-1, 40)])
def test_category_ids_that_count_from_another_number(tmp_path, shift, first):
    rng = np.random.default_rng(0)
    for num_classes in (2, 3, 10):
        content = random_set(rng, 60)
        content["categories"] = [{"id": first + i, "name": str(i)} for i in range(num_classes)]
        for i, annotation in enumerate(content["annotations"]):
            annotation["category_id"] = first + i % num_classes
        assert names_of(diagnosed(content, tmp_path)) == []
        changed = copy.deepcopy(content)
        changed["annotations"][0]["category_id"] = first - 1
        assert names_of(diagnosed(changed, tmp_path)) == []
        for annotation in content["annotations"]:
            annotation["category_id"] += shift
        assert "ids_shifted" in names_of(diagnosed(content, tmp_path))


@pytest.mark.parametrize("shift", [1, -1])
def test_image_ids_that_count_from_another_number(tmp_path, shift):
    content = random_set(np.random.default_rng(0), 40)
    changed = copy.deepcopy(content)
    changed["annotations"][0]["image_id"] += 99  # of an image that was taken out
    assert names_of(diagnosed(changed, tmp_path)) == []
    for annotation in content["annotations"]:
        annotation["image_id"] += shift
    assert "ids_shifted" in names_of(diagnosed(content, tmp_path))


@pytest.mark.parametrize("every", [2, 3, 4])
def test_brush_masks_that_are_crowds_beside_polygons(tmp_path, every):
    """CVAT writes the masks of one tool as crowds, and the others not."""
    content = random_set(np.random.default_rng(0), 40)
    for annotation in content["annotations"][::every]:
        annotation["iscrowd"] = 1
    assert names_of(diagnosed(content, tmp_path)) == ["crowds"]


def test_large_crowds_are_crowds(tmp_path):
    """A third of the annotations are regions of many objects: larger than the others."""
    content = random_set(np.random.default_rng(0), 45)
    for annotation in content["annotations"][::3]:
        image = content["images"][annotation["image_id"] - 1]
        width, height = image["width"] - 2, image["height"] - 2
        annotation |= {"iscrowd": 1, "bbox": [1, 1, width, height], "area": width * height}
        annotation["segmentation"] = None
        annotation["segmentation"] = [polygon_of(annotation)]
    assert names_of(diagnosed(content, tmp_path)) == []


def test_wrong_areas_are_replaced_by_those_of_the_masks(tmp_path):
    rng = np.random.default_rng(0)
    content = random_set(rng, 30)
    for annotation in content["annotations"][:20]:
        annotation["area"] *= 100
    del content["annotations"][25]["segmentation"]
    dataset = diagnosed(content, tmp_path)
    assert names_of(dataset) == ["areas_wrong"]
    for image_id in dataset.image_ids:
        size = dataset.image_size(image_id)
        for annotation in dataset.annotations(image_id):
            if annotation["segmentation"] is None:
                assert "area" not in annotation  # evaluation takes that of the box
                continue
            segmentation = annotation["segmentation"]
            if isinstance(segmentation, list):
                segmentation = mask_utils.merge(mask_utils.frPyObjects(segmentation, *size))
            assert annotation["area"] == mask_utils.area(segmentation)


def test_areas_within_a_factor_of_two_and_few_wrong_ones_are_kept(tmp_path):
    rng = np.random.default_rng(0)
    content = random_set(rng, 30)
    for i, annotation in enumerate(content["annotations"]):
        annotation["area"] *= 50 if i < 14 else rng.uniform(0.6, 1.8)
    dataset = diagnosed(content, tmp_path)
    assert names_of(dataset) == []
    stated = {annotation["id"]: annotation["area"] for annotation in content["annotations"]}
    assert {a["id"]: a["area"] for a in dataset.to_coco().anns.values()} == stated


def test_every_diagnosis_has_a_meaning_and_a_mend():
    for name, (meaning, mend) in DIAGNOSES.items():
        assert meaning[0].islower(), name
        assert mend[0].isupper(), name
        assert not mend.endswith(".")


def test_the_documentation_has_the_table_of_diagnoses():
    text = (Path(__file__).parents[2] / "docs" / "data_issues.md").read_text(encoding="utf-8")
    rows = [f"| `{name}` | {meaning} | {mend} |" for name, (meaning, mend) in DIAGNOSES.items()]
    assert "\n".join(rows) in text


def test_scores_by_size_are_those_of_the_masks_where_areas_are_wrong(tmp_path):
    content = random_set(np.random.default_rng(0), 40)
    scores = []
    for change in (fields(area=1.0), fields(area=lambda area: area * 100), fields(area=None)):
        changed = copy.deepcopy(content)
        for annotation in changed["annotations"]:
            change(annotation, None)
        dataset = diagnosed(changed, tmp_path)
        results = [
            {**{key: a[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.5}
            for a in content["annotations"][::2]
        ]
        metrics = evaluate_results(
            dataset.to_coco(), results, dataset.class_names, iou_types=["bbox"]
        )
        scores.append([round(metrics["bbox"][key], 6) for key in ("APs", "APm", "APl")])
        assert count_contents(dataset).by_size["small"] < 40
    assert scores[0] == scores[1] == scores[2]
    assert not np.isnan(scores[0]).any()
