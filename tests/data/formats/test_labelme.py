"""labelme's JSON: hand-computed examples, and files that are wrong."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from written import (
    NAMES,
    SQUARE,
    masks,
    names,
    read,
    shape,
    square,
    write_image,
    write_labelme,
)

from tensormask.data.formats.labelme import read_labelme


def test_labelme_shapes(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 3), 255, np.uint8)).save(buffer, "PNG")
    png = base64.b64encode(buffer.getvalue()).decode()
    part = [[8, 2], [10, 2], [10, 6], [8, 6]]
    shapes = [
        shape(group_id=1),
        shape("rectangle", [[6, 6], [2, 2]], NAMES[1]),
        shape("circle", [[6, 4], [6, 7]]),
        shape("mask", [[10, 7], [12, 8]], mask=png),  # reaches beyond: clipped
        shape(points=part, group_id=1),
        shape(points=part, group_id=1, label=NAMES[1]),  # another class, another object
        shape(None),
    ]
    write_labelme(tmp_path / "val", shapes)
    source = read(read_labelme, tmp_path)
    parts, rectangle, circle, png_mask, other, ungrouped = masks(source)[0]
    np.testing.assert_array_equal(rectangle, square())
    assert abs(circle.sum() - np.pi * 9) < 5
    assert circle[4, [3, 6]].all()
    assert not circle[1, 3]
    np.testing.assert_array_equal(png_mask, square(10, 7, 12, 8))
    np.testing.assert_array_equal(ungrouped, square())
    np.testing.assert_array_equal(parts, square() | square(8, 2, 10, 6))
    np.testing.assert_array_equal(other, square(8, 2, 10, 6))
    assert source.class_names == sorted(NAMES)
    assert names(source) == [NAMES[i] for i in (0, 1, 0, 0, 1, 0)]
    assert source.images[0].split == "val"
    assert not source.issues


@pytest.mark.parametrize(
    "wrong, kind, reason",
    [
        (shape("point", [[1, 1]]), "shape_unsupported", "point"),
        (shape("line", SQUARE[:2]), "shape_unsupported", "line"),
        (shape(points=SQUARE[:2]), "shape_malformed", "fewer than three"),
        (shape(points="12"), "shape_malformed", ""),
        (shape(points=[["1,5", 2], [3, 4], [5, 6]]), "shape_malformed", "1,5"),
        (shape(points=[[1e999, 2], [3, 4], [5, 6]]), "shape_malformed", "infinity"),
        (shape("circle", SQUARE), "shape_malformed", "4 points"),
        (shape("mask", [[0, 0], [1, 1]], mask="AAAA"), "shape_malformed", "PNG"),
        (shape("mask", []), "shape_malformed", ""),
        (shape(label=""), "class_unknown", ""),
        (shape(label=["a"]), "class_unknown", "list"),
        (shape(label="\ud800"), "class_unknown", ""),
        (7, "shape_malformed", "three points"),
        (shape(points=[[x + 20, y] for x, y in SQUARE]), "shape_outside", ""),
    ],
)
def test_labelme_shapes_that_are_wrong(tmp_path, wrong, kind, reason):
    write_labelme(tmp_path, [shape(), wrong])
    source = read(read_labelme, tmp_path)
    assert source.issues.counts == {kind: 1}
    assert reason in source.issues.table()
    assert "a.json:shapes[1]" in source.issues.table()
    assert names(source) == [NAMES[0]]


@pytest.mark.parametrize(
    "text, kind",
    [
        ('{"shapes": [', "file_malformed"),
        ("[" * 100_000, "file_malformed"),
        ("[]", "file_malformed"),
        ('{"shapes": {}, "imagePath": "b.png"}', "file_malformed"),
        ('{"shapes": []}', "file_malformed"),
        ('{"shapes": [], "imagePath": "../outside.png"}', "image_missing"),
        ('{"shapes": [], "imagePath": "/etc/passwd"}', "image_missing"),
        ('{"shapes": [], "imagePath": "b.png\\u0000"}', "image_missing"),
        ('{"shapes": [], "imagePath": "a.png"}', "image_duplicate"),
        ('{"shapes": [], "imagePath": "b.png", "imageHeight": 9, "imageWidth": 9}', "image_size"),
    ],
    ids=range(10),
)
def test_labelme_files_that_are_wrong(tmp_path, text, kind):
    write_image(tmp_path / "outside.png")
    folder = tmp_path / "set"
    write_labelme(folder, [shape()])
    write_image(folder / "b.png")
    (folder / "b.json").write_text(text)
    source = read(read_labelme, folder)
    assert source.issues.counts == {kind: 1}
    assert [image.path.name for image in source.images] == ["a.png"]


@pytest.mark.parametrize("name", ["C:\\data\\b.png", "/home/me/b.png", "..\\x\\b.png", "./b.png"])
def test_paths_of_another_machine_are_found_beside_the_file(tmp_path, name):
    write_image(tmp_path / "b.png")
    write_labelme(tmp_path, [shape()], name="b", imagePath=name)
    write_image(tmp_path / "c.png")
    source = read(read_labelme, tmp_path)
    assert [image.path.name for image in source.images] == ["b.png"]
    assert source.issues.counts == {"image_unlabeled": 1}  # c.png
