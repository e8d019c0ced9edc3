"""What all readers share: run lengths, and the order of files."""

import os

import numpy as np
import pytest
from written import (
    SQUARE,
    read,
    write_yolo,
    yolo_line,
)

from tensormask.data.checks.segmentation import segmentation_to_rle
from tensormask.data.formats import source as sources
from tensormask.data.formats.regions import mask_utils, number_image_to_rles
from tensormask.data.formats.yolo import read_yolo


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


def test_links_to_folders_are_followed_once(tmp_path):
    folder, outside = tmp_path / "set", tmp_path / "outside"
    for path in (folder / "z" / "a.png", outside / "b.png", folder / ".hidden" / "c.png"):
        path.parent.mkdir(parents=True)
        path.touch()
    try:
        for name, target in {"a": "z", "images": outside, "again": outside, "z/up": folder}.items():
            (folder / name).symlink_to(target, target_is_directory=True)
    except OSError:
        pytest.skip("this system or user cannot make symbolic links")
    found = sources.images_below(folder)
    assert [path.relative_to(folder).as_posix() for path in found] == ["again/b.png", "z/a.png"]
