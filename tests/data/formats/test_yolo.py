"""YOLO's polygons and its data.yaml: hand-computed examples, and files that are wrong."""

import numpy as np
import pytest
from written import (
    NAMES,
    SQUARE,
    masks,
    names,
    read,
    square,
    write_image,
    write_yolo,
    yolo_line,
)

from tensormask.data.formats.yolo import read_yolo
from tensormask.utils.errors import UserError


@pytest.mark.parametrize("prefix, end", [("", "\n"), ("\ufeff", "\r\n")])
def test_yolo(tmp_path, prefix, end):
    """Also with a byte order mark and the line ends of Windows."""
    line = prefix + yolo_line(SQUARE, 1).replace("\n", end)
    write_yolo(tmp_path, {"train/a": line, "val/b": "", "val/c": line})
    source = read(read_yolo, tmp_path)
    assert source.class_names == NAMES
    assert [image.split for image in source.images] == ["train", "val", "val"]
    assert names(source) == [NAMES[1]] * 2
    np.testing.assert_array_equal(masks(source)[0], [square()])
    assert source.images[0].objects[0].box == [2, 2, 4, 4]
    # The six decimals of the file are not enough for exact coordinates.
    assert source.images[0].objects[0].segmentation == [np.ravel(SQUARE).tolist()]
    assert not source.issues


def test_yolo_traced_polygons_are_filled_with_their_outline(tmp_path):
    corners = [[2, 2], [5, 2], [5, 5], [2, 5]]  # centers of the outermost pixels
    write_yolo(tmp_path, {"train/a": yolo_line(corners)})
    np.testing.assert_array_equal(masks(read(read_yolo, tmp_path, traced=True))[0], [square()])
    # 25 of them are 100 points.
    many = "".join(
        yolo_line([[x, 2], [x + 1, 2], [x, y], [2, 7]]) for x in range(5) for y in range(3, 8)
    )
    write_yolo(tmp_path, {"train/a": many})
    assert "--traced" in read(read_yolo, tmp_path).notes[0]
    write_yolo(tmp_path, {"train/a": many + yolo_line([[2, 2], [5.4, 2], [5, 5]])})
    assert read(read_yolo, tmp_path).notes == []


@pytest.mark.parametrize("layout", ["roboflow", "list", "absolute", "classes.txt", "names only"])
def test_where_yolo_has_its_files(tmp_path, layout):
    line = yolo_line(SQUARE)
    yaml_file = write_yolo(tmp_path, {"train/a": line}, path="elsewhere")
    if layout == "roboflow":
        (tmp_path / "train").mkdir()
        for kind in ("images", "labels"):
            (tmp_path / kind / "train").rename(tmp_path / "train" / kind)
        write_yolo_names(yaml_file, "train: ../train/images")
    elif layout == "list":
        (tmp_path / "train.txt").write_text("./images/train/a.png\n\n")
        write_yolo_names(yaml_file, "train: [train.txt]")
    elif layout == "absolute":
        write_yolo_names(yaml_file, f"train: {tmp_path / 'images' / 'train'}\nnc: 2")
    elif layout == "classes.txt":
        yaml_file.unlink()
        (tmp_path / "classes.txt").write_text("\n".join(NAMES), encoding="utf-8")
    else:
        write_yolo_names(yaml_file, "nc: 2")
    source = read(read_yolo, tmp_path)
    assert source.class_names == NAMES
    assert [image.split for image in source.images] == ["train"]
    np.testing.assert_array_equal(masks(source)[0], [square()])


def write_yolo_names(yaml_file, text):
    yaml_file.write_text(f"{text}\nnames: {{0: {NAMES[0]}, 1: {NAMES[1]}}}\n", encoding="utf-8")


@pytest.mark.parametrize(
    "line, kind, reason",
    [
        ("7 0.1 0.1 0.5 0.1 0.5 0.5", "class_unknown", "7"),
        ("-1 0.1 0.1 0.5 0.1 0.5 0.5", "class_unknown", "-1"),
        ("0.5 0.1 0.1 0.5 0.1 0.5 0.5", "class_unknown", "0.5"),
        ("inf 0.1 0.1 0.5 0.1 0.5 0.5", "class_unknown", "inf"),
        ("0", "shape_malformed", "fewer than three"),
        ("0 0.1 0.1 0.5 0.1 0.5", "shape_malformed", "x without a y"),
        ("0 0.1 0.1 nan 0.1 0.5 0.5", "shape_malformed", "not normalized"),
        ("0 1 1 50 1 50 50", "shape_malformed", "not normalized"),
        ("0 0,1 0,1 0,5 0,1 0,5 0,5", "shape_malformed", "decimal commas"),
        ("{truncated", "shape_malformed", "not numbers"),
        ("0 1.2 0.1 1.5 0.1 1.5 0.5", "shape_outside", ""),
        ("0 0.5 0.1 1.5 0.1 1.5 0.5", "shape_beyond", ""),
        ("0 0.1 0.1 0.1 0.1 0.1 0.1", "shape_empty", ""),
        ("0 0.5 0.5 0.2 0.2", "box_only", ""),
        ("0 0.5 0.5 -0.2 0.2", "shape_malformed", "not a box"),
        ("0 0.5 0.5 0 0.2", "shape_empty", ""),
        (yolo_line(SQUARE) + yolo_line(SQUARE), "shape_duplicate", ""),
    ],
)
def test_yolo_lines_that_are_wrong(tmp_path, line, kind, reason):
    write_yolo(tmp_path, {"train/a": f"\n{line}\n"})
    source = read(read_yolo, tmp_path)
    assert source.issues.counts == {kind: 1}
    assert reason in source.issues.table()
    assert f"a.txt:{3 if kind == 'shape_duplicate' else 2}" in source.issues.table()
    kept = kind in ("shape_beyond", "box_only", "shape_duplicate")
    assert len(source.images[0].objects) == kept


@pytest.mark.parametrize(
    "text, message",
    [
        ("names: [a", "not YAML"),
        ("!!python/object/apply:os.system [ls]", "not YAML"),
        ("[" * 400, "not YAML"),
        ("- a", "no keys"),
        ("train: images\nnames: []", "no `names`"),
        ("train: images\nnames: [yes, no]", "quotes"),
        ("train: images\nnames: {-1: a}", "number: name"),
        ("train: nowhere\nnames: [a]", "nowhere does not exist"),
        ("train: {a: 1}\nnames: [a]", "neither a path"),
        ("train: images\nkpt_shape: [17, 3]\nnames: [a]", "keypoints"),
        # Nine levels of ten: a billion names, if they were written out.
        (
            "a: &a [x]\n"
            + "".join(
                f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n"
                for a, b in zip("abcdefgh", "bcdefghi", strict=True)
            )
            + "train: images\nnames: *i",
            "number: name",
        ),
    ],
    ids=range(11),
)
def test_data_yaml_that_is_wrong(tmp_path, text, message):
    write_image(tmp_path / "images" / "a.png")
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read(read_yolo, tmp_path / "data.yaml")


def test_yolo_files_that_are_wrong(tmp_path):
    write_yolo(tmp_path, {"train/a": "", "train/b": "", "train/c": "", "val/e": ""})
    (tmp_path / "images/train/a.png").write_bytes(b"\x89PNG broken")
    (tmp_path / "labels/train/b.txt").write_bytes(b"\xff\xfe0")
    (tmp_path / "labels/train/c.txt").unlink()
    (tmp_path / "val.txt").write_text("images/train/c.png\nimages/none.png\n")
    write_yolo_names(tmp_path / "data.yaml", "train: images/train\nval: val.txt")
    source = read(read_yolo, tmp_path)
    found = ("image_broken", "file_malformed", "image_duplicate", "image_missing")
    assert source.issues.counts == dict.fromkeys(found, 1)
    assert source.notes == ["1 images have no label file, thus no objects."]
    assert [image.path.name for image in source.images] == ["b.png", "c.png"]
