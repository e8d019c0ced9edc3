"""`Detections`: a dict of tensors, and its methods."""

import copy
import json
import pickle
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pretended_cuda import pretend

from tensormask.detections import Detections
from tensormask.utils.errors import UserError

NAMES = ["cat", "dog", "cow"]


def detections(num=3, with_masks=True, **options):
    """Return a dog, a cat and a dog, as rectangles of an image of 20 x 30 pixels."""
    boxes = torch.tensor([[2.0, 3, 12, 9], [10, 5, 18, 15], [0, 0, 5, 5]])[:num]
    fields = {
        "boxes": boxes,
        "scores": torch.tensor([0.75, 0.5, 0.25])[:num],
        "labels": torch.tensor([1, 0, 1])[:num],
    }
    if with_masks:
        fields["masks"] = torch.zeros(num, 20, 30, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(fields["masks"], boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
    options = {"image": np.zeros((20, 30, 3), np.uint8), "category_ids": [7, 8, 9]} | options
    return Detections(fields, size=(20, 30), all_class_names=NAMES, **options)


def test_a_dict_with_a_text():
    found = detections()
    assert found["class_names"] == ["dog", "cat", "dog"]
    assert set(found) == {"boxes", "scores", "labels", "masks", "class_names"}
    assert (len(found), found.num_detections) == (5, 3)
    assert detections(0)
    assert str(found) == "3 detections: 2 dog, 1 cat; scores 0.25..0.75; 20 x 30"
    assert str(detections(1)) == "1 detection: 1 dog; scores 0.75..0.75; 20 x 30"
    assert str(detections(0)) == "0 detections; 20 x 30"
    many = detections()
    many["class_names"] = list("abcdefgh")
    assert "1 f, 2 more classes;" in repr(many)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda found: pickle.loads(pickle.dumps(found))]
)
def test_copies(duplicate):
    found = detections()
    again = duplicate(found)
    assert type(again) is Detections
    assert repr(again) == repr(found)
    assert again.to_coco() == found.to_coco()
    assert np.array_equal(again.draw(), found.draw())
    again["class_names"] = []
    assert found["class_names"]


@pytest.mark.parametrize("rows", [[0, 2], [True, False, True], slice(0, None, 2), np.array([0, 2])])
def test_select(rows):
    found = detections().select(rows)
    assert found["scores"].tolist() == [0.75, 0.25]
    assert found["class_names"] == ["dog", "dog"]
    assert found["masks"].shape == (2, 20, 30)
    assert detections().select([]).num_detections == 0
    assert detections().select(1)["class_names"] == ["cat"]


@pytest.mark.parametrize(
    "options, scores",
    [
        ({}, [0.75, 0.5, 0.25]),
        ({"threshold": 0.5}, [0.75]),
        ({"classes": "dog"}, [0.75, 0.25]),
        ({"classes": ["cat", 2]}, [0.5]),
        ({"classes": 1, "threshold": 0.3}, [0.75]),
        ({"max_detections": 2}, [0.75, 0.5]),
        ({"classes": "dog", "max_detections": 1}, [0.75]),
        ({"classes": np.int64(0)}, [0.5]),
        ({"classes": torch.tensor([0, 2])}, [0.5]),
    ],
)
def test_filter(options, scores):
    assert detections().filter(**options)["scores"].tolist() == scores


@pytest.mark.parametrize(
    "options, message",
    [
        ({"classes": "dgo"}, "nearest name is 'dog'"),
        *(({"classes": [choice]}, r"0\.\.2") for choice in (3, -1, True, 0.5, None)),
        ({"threshold": 30}, r"30 % is 0\.3"),
        ({"max_detections": 0}, "max_detections"),
    ],
)
def test_invalid_filters_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        detections().filter(**options)


def test_to_coco():
    results = detections().to_coco(image_id="a")
    assert [(r["image_id"], r["category_id"], r["score"]) for r in results] == [
        ("a", 8, 0.75), ("a", 7, 0.5), ("a", 8, 0.25)
    ]  # fmt: skip
    assert results[0]["bbox"] == [2, 3, 10, 6]
    assert results[0]["segmentation"]["size"] == [20, 30]
    assert "segmentation" not in detections(with_masks=False).to_coco()[0]


def area(polygon):
    x, y = polygon.T
    return abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def test_polygons_by_hand():
    found = detections()
    found["masks"][1] = False
    found["masks"][2, 2, 2] = False  # a hole
    found["masks"][2, 10:12, 20] = True  # a second part
    rectangle, empty, (second, first) = found.polygons()
    assert sorted(map(tuple, rectangle[0])) == [(2, 3), (2, 9), (12, 3), (12, 9)]
    assert empty == []
    assert sorted(map(tuple, first)) == [(0, 0), (0, 5), (5, 0), (5, 5)]
    assert sorted(map(tuple, second)) == [(20, 10), (20, 12), (21, 10), (21, 12)]


def test_the_area_of_polygons_is_the_number_of_pixels():
    rng = np.random.default_rng(0)
    found = detections(1)
    for share in np.linspace(0.1, 0.9, 40):
        mask = (rng.random((20, 30)) < share).astype(np.uint8)
        # Fill everything that the background outside does not reach through edges.
        outside = np.pad(mask, 1)
        cv2.floodFill(outside, None, (0, 0), 2)
        found["masks"] = torch.from_numpy(mask)[None].bool()
        (polygons,) = found.polygons()
        assert sum(map(area, polygons)) == (outside[1:-1, 1:-1] != 2).sum()


def test_label_image():
    found = detections()
    labels = found.label_image()
    assert labels.dtype == np.uint16
    # The best on top: dog 1 over cat 2 and dog 3.
    assert [labels[4, 3], labels[6, 11], labels[12, 12], labels[0, 0]] == [1, 1, 2, 3]
    assert (labels == 1).sum() == 60
    assert not detections(0).label_image().any()


def test_draw():
    found = detections()
    drawn = found.draw(magnify=1)
    assert drawn.shape == (20, 30, 3)
    assert drawn[6, 6].any()
    assert not found.image.any()
    white = np.full((20, 30, 3), 255, np.uint8)
    for image in (white, Image.fromarray(white), white[..., 0], white / 255):
        assert found.draw(image, magnify=1)[19, 29].tolist() == [255] * 3
    with pytest.raises(UserError, match=r"draw\(image\)"):
        detections(image=None).draw()
    assert detections(with_masks=False).draw().any()


def test_save(tmp_path):
    found = detections()
    found.save(tmp_path / "new" / "a.png", magnify=2)
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.size == (60, 40)
    found.save(str(tmp_path / "new" / "sub" / "a.json"))
    results = json.loads((tmp_path / "new" / "sub" / "a.json").read_text())
    assert [result.pop("category_name") for result in results] == ["dog", "cat", "dog"]
    assert results == found.to_coco()
    with pytest.raises(UserError, match=r"a\.doc"):
        found.save(tmp_path / "a.doc")


def test_without_masks_and_objects():
    for method in ("polygons", "label_image"):
        with pytest.raises(UserError, match="no masks"):
            getattr(detections(with_masks=False), method)()
    assert detections(0).polygons() == []
    assert detections(0).to_coco() == []


def test_supervision(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=SimpleNamespace))
    converted = detections().to_supervision()
    assert converted.xyxy.shape == (3, 4)
    assert (converted.mask.shape, converted.mask.dtype) == ((3, 20, 30), bool)
    assert converted.class_id.tolist() == [1, 0, 1]
    assert converted.data["class_name"].tolist() == ["dog", "cat", "dog"]
    assert detections(with_masks=False).to_supervision().mask is None
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        detections().to_supervision()


def test_masks_on_a_gpu_are_read_once() -> None:
    expected = detections()
    with pretend() as record:
        on_gpu = {
            name: x.to("cuda") if isinstance(x, torch.Tensor) else x for name, x in expected.items()
        }
        ids = expected.category_ids
        on_gpu = Detections(on_gpu, size=(20, 30), all_class_names=NAMES, category_ids=ids)
        for read, waits in (on_gpu.polygons, 1), (on_gpu.label_image, 2), (on_gpu.to_coco, 2):
            record.clear()
            result = read()
            assert str(result) == str(getattr(expected, read.__name__)())
            assert record.waits.total() == waits, record.waits
        assert not record.mixes
