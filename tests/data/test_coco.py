"""CocoDataset: attributes, images, annotations, and errors of the file."""

import json

import pytest
from PIL import Image

from tensormask.data import CocoDataset
from tensormask.data.images import ImageError

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
    assert dataset.path(dataset.image(9)) == str(tmp_path / "sub" / "b.png")


def test_load(make_dataset):
    image, annotations = make_dataset([annotation(), annotation(iscrowd=1)]).load(5)
    assert image.shape == (8, 12, 3)
    assert image[0, 0].tolist() == [10, 20, 30]
    assert len(annotations) == 2


@pytest.mark.parametrize(
    "file_name, kind, message",
    [
        ("b.png", "image_missing", r"b\.png"),
        ("small.png", "image_size", r"small\.png has 8 x 12 .* state 12 x 8 .*EXIF"),
        ("text.png", "image_broken", r"text\.png"),
        ("../a.png", "image_missing", "is outside of"),
        ("sub/../../a.png", "image_missing", "is outside of"),
        ("/etc/passwd", "image_missing", "is outside of"),
    ],
)
def test_images_that_cannot_be_read(make_dataset, tmp_path, file_name, kind, message):
    Image.new("RGB", (8, 12)).save(tmp_path / "small.png")
    Image.new("RGB", (12, 8)).save(tmp_path.parent / "a.png")
    (tmp_path / "text.png").write_text("no image")
    images = [{"id": 5, "file_name": file_name, "height": 8, "width": 12}]
    dataset = make_dataset([annotation()], images=images)
    with pytest.raises(ImageError, match=message) as raised:
        dataset.load(5)
    assert raised.value.kind == kind
    known_before = kind == "image_missing"
    assert dataset.issues.counts == ({kind: 1} if known_before else {})
    assert dataset.has_file.tolist() == [not known_before]


@pytest.mark.parametrize(
    "file_name", ["sub dir/a.png", "zwölf – 十二.png", "./a.png", "b/../a.png"]
)
def test_file_names(make_dataset, tmp_path, file_name):
    path = tmp_path / file_name
    for folder in ("b", "sub dir"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (12, 8)).save(path)
    images = [{"id": 5, "file_name": file_name, "height": 8, "width": 12}]
    dataset = make_dataset([annotation()], images=images)
    assert dataset.load(5)[0].shape == (8, 12, 3)
    assert not dataset.issues


def test_ids_are_integers_or_strings(make_dataset):
    names = {"cat": "c", 0: "a", 7.0: "b", -5: "z"}
    categories = [{"id": identity, "name": name} for identity, name in names.items()]
    images = [
        {"id": "x", "file_name": "a.png", "height": 8, "width": 12.0},
        {"id": 0, "file_name": "a.png", "height": 8, "width": 12},
    ]
    annotations = [
        annotation(image_id="x", category_id="cat", id="first"),
        annotation(image_id="x", category_id=0),
        annotation(image_id=0, category_id=7),
        annotation(image_id=0.0, category_id=-5),
    ]
    dataset = make_dataset(annotations, images=images, categories=categories)
    assert not dataset.issues
    assert dataset.image_ids == [0, "x"]
    assert dataset.category_ids == [-5, 0, 7, "cat"]
    assert dataset.class_names == ["z", "a", "b", "c"]
    assert [dataset.label_of(a) for a in dataset.annotations(0)] == [2, 0]
    assert [dataset.label_of(a) for a in dataset.annotations("x")] == [3, 1]
    assert [a["id"] for a in dataset.annotations("x")] == ["first", 2]


def test_annotations_that_cannot_be_trained_on(make_dataset):
    rle = {"size": [8, 12], "counts": [0, 96]}
    dataset = make_dataset(
        [
            annotation(),
            annotation(segmentation=rle, bbox=[0, 0, 12, 8]),
            annotation(segmentation=rle, bbox=[0, 0, 12, 8], iscrowd=1),
            annotation(category_id=7),
            annotation(bbox=[1, 1, 0, 5]),
            annotation(bbox=None),
            annotation(segmentation=[]),
            annotation(segmentation=[[1, 1, 2, 2]]),
            annotation(segmentation=[[1, 1, 2, 2], SQUARE]),
        ]
    )
    assert [a["id"] for a in dataset.training_annotations(5)] == [1, 2, 9]
    assert [a["id"] for a in dataset.annotations(5)] == [1, 2, 3, 5, 6, 7, 8, 9]
    assert dataset.annotations(5)[-1]["segmentation"] == [SQUARE]
    assert dataset.num_trainable.tolist() == [3, 0]
    assert (dataset.num_annotations, dataset.num_crowds) == (8, 1)
    assert dataset.issues.as_record() == {
        "image_missing": {"count": 1, "first_ids": [9]},
        "annotation_malformed": {"count": 1, "first_ids": [4]},
        "box_malformed": {"count": 1, "first_ids": [6]},
        "box_empty": {"count": 1, "first_ids": [5]},
        "mask_missing": {"count": 1, "first_ids": [7]},
        "polygon_malformed": {"count": 2, "first_ids": [8, 9]},
    }


def test_to_coco(make_dataset):
    dataset = make_dataset([annotation(), annotation(iscrowd=1, segmentation=[])])
    coco = dataset.to_coco()
    assert sorted(coco.imgs) == [5, 9]
    assert coco.loadCats([3, 40]) == [{"id": 3, "name": "car"}, {"id": 40, "name": "cup"}]
    assert list(coco.anns.values()) == dataset.annotations(5)
    coco.anns[1]["area"] = -1
    assert dataset.annotations(5)[0]["area"] == 16


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"images": [' + "1" * 5000 + "]}", "not JSON"),
        ("7", "holds a int"),
        ("[]", "holds a list .results instead of annotations"),
        ('{"images": {}, "categories": []}', "no list 'images'"),
        ('{"images": [], "categories": 5}', "no list 'categories'"),
        ('{"images": [], "categories": [], "annotations": null}', "no list 'annotations'"),
        ('{"images": [], "categories": []}', "no valid images"),
        (
            '{"images": [{"id": 1}], "categories": []}',
            "(?s)no valid images.*image_malformed.*height None",
        ),
    ],
)
def test_files_of_another_format_are_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        CocoDataset("a", tmp_path / "a.json", tmp_path)
    assert "a.json" in str(raised.value)
    assert len(str(raised.value)) < 500


def test_a_file_without_annotations(make_dataset, tmp_path):
    """COCO's test sets hold images and categories only."""
    make_dataset([])
    data = json.loads((tmp_path / "a.json").read_text())
    del data["annotations"]
    (tmp_path / "a.json").write_text(json.dumps(data))
    dataset = CocoDataset("a", tmp_path / "a.json", tmp_path)
    assert dataset.load(5)[1] == []
    assert dataset.class_names == ["car", "cup"]
