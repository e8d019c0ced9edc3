"""Pascal VOC's masks: hand-computed examples, and files that are wrong."""

import numpy as np
import pytest
from written import (
    SIZE,
    masks,
    names,
    read,
    square,
    write_voc,
)

from tensormask.data.formats.voc import read_voc, voc_color
from tensormask.utils.errors import UserError

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
    (tmp_path / "labelmap.txt").write_text(":1,2,3::")
    with pytest.raises(UserError, match="'' is not a name"):
        read(read_voc, tmp_path)
    with pytest.raises(UserError, match="SegmentationObject"):
        read(read_voc, tmp_path / "JPEGImages")
