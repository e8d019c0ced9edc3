"""Label images: hand-computed examples, and files that are wrong."""

import numpy as np
import pytest
from PIL import Image
from written import (
    NAMES,
    SIZE,
    masks,
    names,
    read,
    square,
    write_image,
)

from tensormask.data.formats.label_images import read_label_images
from tensormask.utils.errors import UserError


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
