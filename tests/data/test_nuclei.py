"""The embedded data set of nuclei: its contents, its size, and the script that made it."""

import json
from collections import Counter
from pathlib import Path

import make_nuclei
import numpy as np
import pytest
from pycocotools import mask as mask_utils

from tensormask.commands import check
from tensormask.data import catalog, get_dataset
from tensormask.data.images import read_image

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tensormask" / "data" / "nuclei"
SPLITS = ("train", "val")
EACH_SPLIT = pytest.mark.parametrize("split", SPLITS)


def read(split, folder=FOLDER):
    return json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))


@EACH_SPLIT
def test_crops_of_three_kinds_of_microscopy(split):
    images = read(split)["images"]
    pixels = {
        image["file_name"]: read_image(FOLDER / split / image["file_name"]) for image in images
    }
    assert {p.name for p in (FOLDER / split).iterdir()} == set(pixels)
    assert {image.shape for image in pixels.values()} == {(256, 256, 3)}
    kinds = [make_nuclei.kind_of(pixels[image["file_name"]]) for image in images]
    assert kinds == [image["modality"] for image in images]
    assert Counter(kinds) == make_nuclei.NUM_CROPS[split]
    assert len(kinds) == {"train": 160, "val": 40}[split]


@EACH_SPLIT
def test_the_annotations_describe_their_masks(split):
    annotations = read(split)["annotations"]
    assert [annotation["id"] for annotation in annotations] == list(range(1, len(annotations) + 1))
    for annotation in annotations:
        rle = annotation["segmentation"]
        assert annotation["area"] == mask_utils.area(rle) >= make_nuclei.MIN_AREA
        assert annotation["bbox"] == mask_utils.toBbox(rle).tolist()
    per_image = Counter(annotation["image_id"] for annotation in annotations)
    assert min(per_image.values()) >= 7


def test_the_check_finds_no_issues_and_windows_for_nearly_all(capsys):
    catalog._loaded.clear()  # a check adds issues to the cached data set
    config = ["--config-file", str(ROOT / "configs" / "nuclei.yaml"), "--fast"]
    assert check.main(["nuclei_train", "nuclei_val", *config]) == 0
    printed = capsys.readouterr().out
    for matched in ("3514 of 3524 (99.72%)", "848 of 848 (100.00%)"):
        assert f"{matched} of the objects match a window" in printed


def test_no_source_image_is_in_both_splits():
    train, val = ({image["dsb_image_id"] for image in read(split)["images"]} for split in SPLITS)
    assert not train & val


def test_the_folder_is_small_and_says_whose_it_is():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 2_000_000
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for part in ("CC0 1.0", "Carpenter lab, Broad Institute", "kaggle-dsbowl-2018-dataset-fixes"):
        assert part in text


def test_the_set_needs_no_data_root(monkeypatch, tmp_path):
    monkeypatch.setenv("TENSORMASK_DATASETS", str(tmp_path / "missing"))
    assert get_dataset("nuclei_val").class_names == ["nucleus"]
    assert not (tmp_path / "missing").exists()


@pytest.mark.slow
@pytest.mark.skipif(not make_nuclei.SOURCE.exists(), reason="needs nuclei_dsb2018 of ../shared")
def test_the_script_makes_the_same_set(tmp_path):
    make_nuclei.main(["--output", str(tmp_path)])
    for split in SPLITS:
        content = read(split, tmp_path)
        assert content == read(split)
        for image in content["images"]:  # encoders and decoders of JPEG differ slightly
            made, shipped = (
                read_image(folder / split / image["file_name"]).astype(float)
                for folder in (tmp_path, FOLDER)
            )
            assert np.abs(made - shipped).mean() < 1
