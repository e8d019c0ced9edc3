"""CVAT's XML: hand-computed examples, and files that are wrong."""

import numpy as np
import pytest
from written import (
    NAMES,
    masks,
    read,
    square,
    write_cvat,
    write_image,
)

from tensormask.data.formats.cvat import read_cvat
from tensormask.utils.errors import UserError


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
        f'<mask {first} group_id="3" rle="0, 1" left="0" top="0" width="1" height="1"></mask>'
        f'<ellipse {first} cx="6" cy="4" rx="2" ry="5" rotation="90"></ellipse>'
        f'<box {second} xtl="1.0" ytl="2.0" xbr="20.0" ybr="4.0"></box>'
    )
    write_cvat(tmp_path, shapes, subset="Validation")
    source = read(read_cvat, tmp_path)
    objects = source.images[0].objects
    assert [found.name for found in objects] == [NAMES[i] for i in (1, 0, 1, 1, 0)]
    assert (objects[0].segmentation, objects[0].box) == (None, [1, 2, 11, 2])
    assert source.issues.counts == {"box_only": 1, "shape_beyond": 1}
    del objects[0]
    parts, other, mask, ellipse = masks(source)[0]
    np.testing.assert_array_equal(mask, square(11, 6, 12, 7) | square(10, 7, 11, 8))
    assert ellipse[4, [2, 10]].all()
    assert not ellipse[1, 6]
    np.testing.assert_array_equal(parts, square() | square(8, 2, 10, 6) | square(0, 0, 1, 1))
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
