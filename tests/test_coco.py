"""CocoDataset on a small set written by the test."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from tensormask.data import CocoDataset
from tensormask.data.images import read_image
from tensormask.data.segmentation import segmentation_to_rle, usable_polygons

SQUARE = [2, 2, 6, 2, 6, 6, 2, 6]


def annotation(**fields):
    given = {"image_id": 5, "category_id": 40, "bbox": [2, 2, 4, 4], "segmentation": [SQUARE]}
    return {"iscrowd": 0, "area": 16, **given, **fields}


@pytest.fixture
def make_dataset(tmp_path):
    def make(annotations, **fields):
        Image.new("RGB", (12, 8), (10, 20, 30)).save(tmp_path / "a.png")
        images = [
            {"id": 9, "file_name": "sub/b.png", "height": 8, "width": 12},
            {"id": 5, "file_name": "a.png", "height": 8, "width": 12},
        ]
        numbered = [{"id": i, **a} for i, a in enumerate(annotations, start=1)]
        categories = [{"id": 40, "name": "cup"}, {"id": 3, "name": "car"}]
        data = {"images": images, "annotations": numbered, "categories": categories, **fields}
        (tmp_path / "a.json").write_text(json.dumps(data))
        return CocoDataset("a", tmp_path / "a.json", tmp_path)

    return make


def test_attributes(make_dataset, tmp_path, capsys):
    dataset = make_dataset([annotation(), annotation(category_id=3)])
    assert capsys.readouterr().out == ""
    assert (dataset.name, len(dataset)) == ("a", 2)
    assert dataset.image_ids == [5, 9]
    assert dataset.category_ids == [3, 40]
    assert dataset.class_names == ["car", "cup"]
    assert [dataset.label_of(a) for a in dataset.annotations(5)] == [1, 0]
    assert dataset.annotations(9) == []
    assert dataset.image_size(9) == (8, 12)
    assert dataset.file_name(9) == str(tmp_path / "sub" / "b.png")


def test_load(make_dataset):
    image, annotations = make_dataset([annotation(), annotation(iscrowd=1)]).load(5)
    assert image.shape == (8, 12, 3)
    assert image[0, 0].tolist() == [10, 20, 30]
    assert len(annotations) == 2


def test_a_missing_picture_is_named(make_dataset):
    with pytest.raises(FileNotFoundError, match=r"sub.b\.png"):
        make_dataset([]).load(9)


def test_a_picture_of_another_size_is_refused(make_dataset):
    images = [{"id": 5, "file_name": "a.png", "height": 12, "width": 8}]
    with pytest.raises(ValueError, match=r"a\.png is 12 x 8 .* say 8 x 12"):
        make_dataset([], images=images).load(5)


def test_what_cannot_be_trained_on_is_left_out_and_counted(make_dataset):
    rle = mask_utils.encode(np.ones((8, 12), dtype=np.uint8, order="F"))
    rle = {"size": [8, 12], "counts": rle["counts"].decode()}
    dataset = make_dataset(
        [
            annotation(),
            annotation(segmentation=rle),
            annotation(segmentation=rle, iscrowd=1),
            annotation(category_id=7),
            annotation(bbox=[1, 1, 0, 5]),
            annotation(bbox=[1, 1, float("nan"), 5]),
            annotation(bbox=None),
            annotation(segmentation=[]),
            annotation(segmentation=[[1, 1, 2, 2]]),
        ]
    )
    assert [a["id"] for a in dataset.training_annotations(5)] == [1, 2]
    assert dataset.count_untrainable() == {
        "crowd": 1,
        "unknown category": 1,
        "box missing or without area": 3,
        "no segmentation": 1,
        "no polygon of three points": 1,
    }


def test_a_file_without_annotations(make_dataset, tmp_path):
    """COCO's test sets hold pictures and categories only."""
    dataset = make_dataset([])
    data = json.loads((tmp_path / "a.json").read_text())
    del data["annotations"]
    (tmp_path / "a.json").write_text(json.dumps(data))
    dataset = CocoDataset("a", tmp_path / "a.json", tmp_path)
    assert dataset.load(5)[1] == []
    assert dataset.class_names == ["car", "cup"]


@pytest.mark.parametrize("form", ["polygons", "runs", "string", "bytes"])
def test_every_form_of_segmentation(form):
    expected = np.zeros((8, 12), dtype=np.uint8)
    expected[2:6, 2:6] = 1
    rle = mask_utils.encode(np.asfortranarray(expected))
    columns = [18, 4, 4, 4, 4, 4, 4, 4, 50]  # 2 columns of 8, then 2 rows; runs of 0 and 1 in turn
    segmentation = {
        "polygons": [SQUARE],
        "runs": {"size": [8, 12], "counts": columns},
        "string": {"size": [8, 12], "counts": rle["counts"].decode()},
        "bytes": rle,
    }[form]
    decoded = mask_utils.decode(segmentation_to_rle(segmentation, (8, 12)))
    np.testing.assert_array_equal(decoded, expected)


def test_rle_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\[12, 8\].*\[8, 12\]"):
        segmentation_to_rle({"size": [12, 8], "counts": [96]}, (8, 12))


def test_usable_polygons():
    assert usable_polygons([SQUARE, [1, 1, 2, 2], [1, 2, 3, 4, 5, 6, 7]]) == [SQUARE]


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    turned = read_image(tmp_path / "turned.png")
    assert turned.shape == (6, 4, 3)
    assert turned[0, 3].tolist() == [255, 255, 255]
    assert turned.sum() == 3 * 255


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_become_rgb(tmp_path, mode):
    Image.new("RGB", (3, 2), (204, 204, 204)).convert(mode).save(tmp_path / "picture.png")
    image = read_image(tmp_path / "picture.png")
    assert image.shape == (2, 3, 3)
    assert image.dtype == np.uint8
    assert (image == 204).all()
