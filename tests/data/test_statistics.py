"""Statistics of a data set, and the checks that open its files."""

import json

import numpy as np
import pytest
from PIL import Image

from tensormask.data import CocoDataset
from tensormask.data.statistics import area_size, check_files, count_contents


def annotation(identity, image_id, category_id, x, y, side, **fields):
    polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
    ids = {"id": identity, "image_id": image_id, "category_id": category_id}
    return {**ids, "bbox": [x, y, side, side], "segmentation": [polygon], **fields}


@pytest.fixture
def dataset(tmp_path):
    """Three images, two of the same file; four classes, two of the same name."""
    for name, size in (("a.png", (200, 120)), ("b.png", (64, 64))):
        Image.fromarray(np.zeros((*size[::-1], 3), np.uint8)).save(tmp_path / name)
    names = {4: "cup", 5: "fork", 9: "cup", 11: "spoon"}
    content = {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 200, "height": 120},
            {"id": 2, "file_name": "b.png", "width": 64, "height": 64},
            {"id": 3, "file_name": "b.png", "width": 64, "height": 60},
        ],
        "categories": [{"id": i, "name": name} for i, name in names.items()],
        "annotations": [
            annotation(1, 1, 4, 0, 0, 100),
            annotation(2, 1, 9, 10, 10, 40),
            annotation(3, 1, 5, 10, 10, 20),
            annotation(4, 1, 5, 10, 10, 20, area=1024),
            annotation(5, 1, 5, 10, 10, 20, iscrowd=1),
            annotation(6, 2, 5, 10, 10, 0.1),
        ],
    }
    (tmp_path / "set.json").write_text(json.dumps(content))
    return CocoDataset("things", tmp_path / "set.json", tmp_path)


def test_statistics(dataset):
    statistics = count_contents(dataset)
    assert (statistics.images, statistics.images_without_objects) == (3, 1)
    assert (statistics.annotations, statistics.crowds, statistics.objects) == (6, 1, 5)
    assert statistics.sizes == {"width": [64, 64, 200], "height": [60, 64, 120]}
    assert statistics.objects_per_image == [1, 4]
    assert statistics.by_class == {
        "cup": {"small": 0, "medium": 1, "large": 1},
        "fork": {"small": 2, "medium": 1, "large": 0},
        "spoon": {"small": 0, "medium": 0, "large": 0},
    }
    assert statistics.by_size == {"small": 2, "medium": 2, "large": 1}
    assert statistics.classes_without_objects == ["spoon"]
    assert statistics.repeated_names == {"cup": 2}
    assert statistics.repeated_files == {"b.png": 2}
    assert json.loads(json.dumps(statistics.as_record()))["by_size"] == statistics.by_size


def test_object_sizes_equal_cocos():
    # COCO's evaluation counts an area of exactly 32 * 32 as small and as medium; here it is medium.
    sizes = {
        0: "small",
        1023.9: "small",
        1024: "medium",
        9215: "medium",
        9216: "large",
        1e9: "large",
    }
    assert {area: area_size(area) for area in sizes} == sizes


@pytest.mark.parametrize("num_workers", [0, 2])
def test_check_files_opens_images_and_rasterizes_masks(dataset, num_workers):
    assert not dataset.issues
    assert sum(check_files(dataset, num_workers)) == 3
    assert dataset.issues.first_ids == {"image_size": [3], "mask_empty": [6]}
    assert sum(check_files(dataset, num_workers)) == 3
    assert dataset.issues.counts == {"image_size": 1, "mask_empty": 1}


def test_missing_images_are_counted_once(dataset):
    (dataset.image_root / "a.png").unlink()
    again = CocoDataset("things", dataset.image_root / "set.json", dataset.image_root)
    list(check_files(again))
    assert again.issues.counts == {"image_missing": 1, "image_size": 1, "mask_empty": 1}
