"""Each format by hand-computed examples, and by files that are wrong."""

import base64
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from written import (
    NAMES,
    SIZE,
    SQUARE,
    shape,
    write_cvat,
    write_image,
    write_labelme,
    write_voc,
    write_yolo,
    yolo_line,
)

from tensormask.data.checks.segmentation import segmentation_to_rle
from tensormask.data.formats import source as sources
from tensormask.data.formats.cvat import read_cvat
from tensormask.data.formats.label_images import read_label_images
from tensormask.data.formats.labelme import read_labelme
from tensormask.data.formats.source import Source, mask_utils, number_image_to_rles
from tensormask.data.formats.voc import read_voc, voc_color
from tensormask.data.formats.yolo import read_yolo
from tensormask.utils.errors import UserError


def read(reader, path, *, class_names=(), traced=False):
    path = Path(path)
    source = Source(path if path.is_dir() else path.parent, class_names, traced=traced)
    reader(path, source)
    source.finish()
    return source


def masks(source):
    """The mask of each object, bool (H, W), by image."""
    return [
        [
            mask_utils.decode(segmentation_to_rle(o.segmentation, image.size)).astype(bool)
            for o in image.objects
        ]
        for image in source.images
    ]


def names(source):
    return [found.name for image in source.images for found in image.objects]


def square(x0=2, y0=2, x1=6, y1=6):
    mask = np.zeros(SIZE, bool)
    mask[y0:y1, x0:x1] = True
    return mask


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
        ("[" * 1500, "not YAML"),
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
    rectangle, circle, png_mask, ungrouped, parts, other = masks(source)[0]
    np.testing.assert_array_equal(rectangle, square())
    assert abs(circle.sum() - np.pi * 9) < 5
    assert circle[4, [3, 6]].all()
    assert not circle[1, 3]
    np.testing.assert_array_equal(png_mask, square(10, 7, 12, 8))
    np.testing.assert_array_equal(ungrouped, square())
    np.testing.assert_array_equal(parts, square() | square(8, 2, 10, 6))
    np.testing.assert_array_equal(other, square(8, 2, 10, 6))
    assert source.class_names == sorted(NAMES)
    assert names(source) == [NAMES[i] for i in (1, 0, 0, 0, 0, 1)]
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


def test_cvat_shapes(tmp_path):
    def points(x0, y0, x1, y1):
        return f'points="{x0}.00,{y0}.00;{x1}.00,{y0}.00;{x1}.00,{y1}.00;{x0}.00,{y1}.00"'

    first, second = f'label="{NAMES[0]}"', f'label="{NAMES[1]}"'
    shapes = (
        f'<polygon {first} group_id="3" {points(2, 2, 6, 6)}></polygon>'
        f'<polygon {first} group_id="3" {points(8, 2, 10, 6)}></polygon>'
        f'<polygon {second} group_id="3" {points(2, 2, 6, 6)}><attribute name="x"/></polygon>'
        # Rows of 3: 0 1 1 / 1 0 1, from (10, 6): the third column is beyond.
        f'<mask {second} rle="1, 3, 1, 1" left="10" top="6" width="3" height="2"></mask>'
        f'<ellipse {first} cx="6" cy="4" rx="2" ry="5" rotation="90"></ellipse>'
        f'<box {second} xtl="1.0" ytl="2.0" xbr="20.0" ybr="4.0"></box>'
    )
    write_cvat(tmp_path, shapes, subset="Validation")
    source = read(read_cvat, tmp_path)
    objects = source.images[0].objects
    assert [found.name for found in objects] == [NAMES[i] for i in (1, 0, 1, 0, 1)]
    assert (objects[2].segmentation, objects[2].box) == (None, [1, 2, 11, 2])
    assert source.issues.counts == {"box_only": 1, "shape_beyond": 1}
    del objects[2]
    mask, ellipse, parts, other = masks(source)[0]
    np.testing.assert_array_equal(mask, square(11, 6, 12, 7) | square(10, 7, 11, 8))
    assert ellipse[4, [2, 10]].all()
    assert not ellipse[1, 6]
    np.testing.assert_array_equal(parts, square() | square(8, 2, 10, 6))
    np.testing.assert_array_equal(other, square())
    assert source.class_names == NAMES
    assert source.images[0].split == "val"


MASK = '<mask label="a" left="{}" top="{}" width="{}" height="{}" rle="{}"></mask>'


@pytest.mark.parametrize(
    "wrong, kind",
    [
        ('<points label="a" points="1,2"></points>', "shape_unsupported"),
        (
            '<box label="a" xtl="1" ytl="2" xbr="3" ybr="4" rotation="30"></box>',
            "shape_unsupported",
        ),
        ('<box label="a" xtl="1,5" ytl="2" xbr="3" ybr="4"></box>', "shape_malformed"),
        ('<box label="a" xtl="inf" ytl="2" xbr="3" ybr="4"></box>', "shape_malformed"),
        ('<polygon label="a" points="1,5,2,0;3,0,4,0;5,0,6,0"></polygon>', "shape_malformed"),
        ('<polygon label="a" points=""></polygon>', "shape_malformed"),
        ('<polygon points="1,1;5,1;5,5"></polygon>', "class_unknown"),
        (MASK.format(0, 0, 3, 2, "1, 3"), "shape_malformed"),
        (MASK.format(0, 0, 3, 2, "1, -3, 8"), "shape_malformed"),
        (MASK.format(0, 0, 3, 2, f"{2**62}, {2**62}, {2**62}, {2**62}, 6"), "shape_malformed"),
        (MASK.format(0, 0, 10**9, 10**9, f"{10**18}"), "shape_malformed"),
        (MASK.format(0, 0, 3, 2, ""), "shape_malformed"),
        (MASK.format(90, 0, 3, 2, "0, 6"), "shape_empty"),
        (MASK.format(-9, -9, 3, 2, "0, 6"), "shape_empty"),
    ],
)
def test_cvat_shapes_that_are_wrong(tmp_path, wrong, kind):
    write_cvat(tmp_path, wrong)
    source = read(read_cvat, tmp_path)
    assert source.issues.counts == {kind: 1}
    assert f"a.png:{wrong[1 : wrong.index(' ')]}[0]" in source.issues.table()
    assert source.images[0].objects == []


BOMB = "<!DOCTYPE b [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;&a;&a;'>]>"
EXTERNAL = "<!DOCTYPE b [<!ENTITY a SYSTEM 'file:///etc/passwd'>]>"


@pytest.mark.parametrize(
    "head, attributes, kind",
    [
        (BOMB, {}, "file_malformed"),
        (EXTERNAL, {}, "file_malformed"),
        ("<annotations/>", {}, "file_malformed"),
        ("", {"name": "../../outside.png"}, "image_missing"),
        ("", {"name": ""}, "image_missing"),
        ("", {"width": "12,0"}, "image_size"),
        ("", {"width": 13}, "image_size"),
        ("", {"id": "0'\"<"}, "file_malformed"),
    ],
)
def test_cvat_files_that_are_wrong(tmp_path, head, attributes, kind):
    write_image(tmp_path / "outside.png")
    xml_file = write_cvat(tmp_path / "x" / "set", "", head, **attributes)
    source = read(read_cvat, xml_file)
    assert source.issues.counts == {kind: 1}
    assert source.images == []


def test_cvat_that_is_cut_off_or_of_a_video(tmp_path):
    xml_file = write_cvat(tmp_path, "")
    text = xml_file.read_text(encoding="utf-8")
    for broken in (text[:-30], text.replace("<image", "<track/><image")):
        xml_file.write_text(broken, encoding="utf-8")
        assert read(read_cvat, tmp_path).issues.counts == {"file_malformed": 1}
    xml_file.write_text("<html/>")
    with pytest.raises(UserError, match="no XML file of CVAT"):
        read(read_cvat, tmp_path)


OBJECTS = np.zeros(SIZE, np.uint8)
OBJECTS[2:6, 2:6], OBJECTS[1, 1:7], OBJECTS[2:6, 8:10] = 1, 255, 2  # 255: a border
CLASSES = np.where(OBJECTS == 1, 15, OBJECTS)
CLASSES[2, 2] = 2  # one pixel of another class


def colored(values):
    table = np.array([voc_color(n) for n in range(256)])[values]
    return np.stack([table >> 16, table >> 8 & 255, table & 255], axis=-1)


@pytest.mark.parametrize("form", ["palette", "gray", "color"])
def test_voc(tmp_path, form):
    table = colored(np.arange(256)).ravel().tolist() if form == "palette" else None
    convert = colored if form == "color" else np.asarray
    root = write_voc(tmp_path / "VOCdevkit/VOC2012", convert(OBJECTS), convert(CLASSES), table)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("a\r\n")
    source = read(read_voc, tmp_path)
    # The order of the objects is that of the colors: 2 is green, 1 is red.
    order = [1, 0] if form == "color" else [0, 1]
    found = [(["person", "bicycle"][i], [square(), square(8, 2, 10, 6)][i]) for i in order]
    assert names(source) == [name for name, _ in found]
    np.testing.assert_array_equal(masks(source)[0], [mask for _, mask in found])
    assert len(source.class_names) == 20
    assert source.images[0].split == "val"
    assert not source.issues


@pytest.mark.parametrize("label_map", ["x:9,9,9::\n核:1,2,3::", "background:::\nx:::\n核:::"])
def test_voc_classes_of_a_label_map(tmp_path, label_map):
    """With its colors, and with none as datumaro writes it."""
    classes = np.zeros((*SIZE, 3), np.uint8)
    classes[OBJECTS == 1] = [1, 2, 3] if "1,2,3" in label_map else colored(np.array(2))
    objects = np.where(OBJECTS == 1, 1, 0)
    source = read(read_voc, write_voc(tmp_path, objects, classes, label_map="# x\n" + label_map))
    assert names(source) == ["核"]
    assert source.class_names == ["x", "核"]


def test_voc_that_is_wrong(tmp_path):
    write_voc(tmp_path, OBJECTS, np.where(OBJECTS == 1, 21, 0))
    source = read(read_voc, tmp_path)
    assert source.issues.counts == {"class_unknown": 2}  # 21, and none
    (tmp_path / "JPEGImages" / "a.jpg").unlink()
    assert read(read_voc, tmp_path).issues.counts == {"image_missing": 1}
    (tmp_path / "SegmentationClass" / "a.png").write_bytes(b"")
    assert read(read_voc, tmp_path).issues.counts == {"file_malformed": 1}
    (tmp_path / "labelmap.txt").write_text("a:1;2;3")
    with pytest.raises(UserError, match="labelmap"):
        read(read_voc, tmp_path)
    with pytest.raises(UserError, match="SegmentationObject"):
        read(read_voc, tmp_path / "JPEGImages")


def write_labels(path, values, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)


@pytest.mark.parametrize(
    "image, labels, dtype",
    [
        ("a.png", "a_cp_masks.png", np.uint16),
        ("a.tif", "a_masks.tif", np.uint16),
        ("a.jpg", "a_label.png", np.uint16),
        ("a.png", "a_seg.tiff", np.int32),
        ("a_img.png", "a_masks.png", np.uint16),
        ("images/a.jpg", "masks/a.tif", np.float32),
        ("images/a.jpg", "labels/a_label.png", np.uint16),
        ("a.jpg", "masks/a.png", np.uint16),
        ("val/images/a.jpg", "val/masks/a.png", np.uint16),
    ],
)
def test_label_images(tmp_path, image, labels, dtype):
    write_image(tmp_path / image)
    values = np.zeros(SIZE, dtype)
    values[square()], values[2:6, 8:10], values[7, 0] = (
        300,
        40000 if dtype != np.int32 else 70000,
        300,
    )
    write_labels(tmp_path / labels, values)
    source = read(read_label_images, tmp_path, class_names=["核"])
    np.testing.assert_array_equal(
        masks(source)[0], [square() | square(0, 7, 1, 8), square(8, 2, 10, 6)]
    )
    assert names(source) == ["核"] * 2
    assert source.images[0].split == ("val" if image.startswith("val") else "")
    assert not source.issues


def test_label_images_that_are_wrong(tmp_path):
    good = np.ones(SIZE, np.uint16)
    for name, values in {
        "a": good,
        "b": np.zeros((*SIZE, 3), np.uint8),
        "c": np.ones((9, 9), np.uint16),
        "d": np.full(SIZE, 0.5, np.float32),
        "e": np.full(SIZE, -1, np.int32),
    }.items():
        write_image(tmp_path / f"{name}.png")
        write_labels(tmp_path / f"{name}_masks.tif", values)
    write_image(tmp_path / "f.png")
    pages = [Image.fromarray(good)] * 2
    pages[0].save(tmp_path / "f_masks.tif", save_all=True, append_images=pages[1:])
    write_labels(tmp_path / "alone_masks.png", good)
    write_image(tmp_path / "unlabeled.png")
    source = read(read_label_images, tmp_path)
    expected = {"file_malformed": 3, "image_size": 1, "shape_malformed": 1}
    assert source.issues.counts == expected | {"image_missing": 1, "image_unlabeled": 1}
    assert names(source) == ["object"]
    with pytest.raises(UserError, match="one class"):
        read(read_label_images, tmp_path, class_names=NAMES)
    with pytest.raises(UserError, match="no pairs"):
        read(read_label_images, write_image(tmp_path / "x" / "a.png").parent)


def test_run_lengths_are_those_of_the_masks():
    numbers = np.random.default_rng(0).integers(0, 4, (7, 5)) * 1000
    found = dict(number_image_to_rles(numbers))
    assert list(found) == [1000, 2000, 3000]
    for number, rle in found.items():
        expected = mask_utils.encode(np.asfortranarray((numbers == number).astype(np.uint8)))
        assert segmentation_to_rle(rle, (7, 5)) == expected
    assert list(number_image_to_rles(np.zeros((2, 2), int))) == []


@pytest.mark.skipif(os.name != "posix", reason="other file systems list in another order")
def test_the_result_does_not_depend_on_the_order_of_the_files(tmp_path, monkeypatch):
    write_yolo(tmp_path, {f"train/{name}": yolo_line(SQUARE) for name in "bca"})
    walk = os.walk
    monkeypatch.setattr(sources.os, "walk", lambda p: ((a, b, c[::-1]) for a, b, c in walk(p)))
    assert [i.path.stem for i in read(read_yolo, tmp_path).images] == ["a", "b", "c"]
