"""Conversions to COCO's format, as files, by the command, and of a data.yaml in a config."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils
from written import (
    NAMES,
    SQUARE,
    shape,
    write_cvat,
    write_image,
    write_labelme,
    write_voc,
    write_yolo,
    yolo_line,
)

from tensormask.commands import convert_data, train
from tensormask.commands.common import read_config
from tensormask.data import catalog, get_dataset
from tensormask.data.checks.segmentation import segmentation_to_rle
from tensormask.data.formats import convert as conversion
from tensormask.data.formats.convert import convert, guess_format
from tensormask.data.formats.source import KINDS
from tensormask.utils.errors import UserError

NUM_IMAGES, NUM_TRAIN = 8, 6


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    monkeypatch.setattr(catalog, "_loaded", {})


@pytest.fixture(scope="module")
def nuclei():
    """Images of real nuclei: the file and the masks, bool (K, H, W), of each."""
    dataset = get_dataset("nuclei_val")
    found = []
    for image_id in dataset.image_ids[:NUM_IMAGES]:
        image, size = dataset.image(image_id), dataset.image_size(image_id)
        codes = [
            segmentation_to_rle(a["segmentation"], size)
            for a in dataset.training_annotations(image_id)
        ]
        found.append((Path(dataset.path(image)), mask_utils.decode(codes).transpose(2, 0, 1) > 0))
    return found


def write_nuclei(folder, format_name, nuclei):
    folder.mkdir()
    entries = []
    for path, masks in nuclei:
        (folder / path.name).write_bytes(path.read_bytes())
        height, width = masks.shape[1:]
        outlines = [
            cv2.findContours(m.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
            for m in masks
        ]
        if format_name == "yolo":
            lines = [
                yolo_line(part[:, 0], size=(height, width)) for parts in outlines for part in parts
            ]
            (folder / f"{path.stem}.txt").write_text("".join(lines))
            (folder / "classes.txt").write_text("核\n", encoding="utf-8")
        elif format_name == "labelme":
            shapes = [
                shape(points=part[:, 0].tolist(), label="核", group_id=number)
                for number, parts in enumerate(outlines)
                for part in parts
                if len(part) > 2
            ]
            content = {"imagePath": path.name, "shapes": shapes}
            (folder / f"{path.stem}.json").write_text(json.dumps(content))
        elif format_name == "cvat":
            shapes = ""
            for mask in masks:
                flat = mask.ravel()
                borders = np.flatnonzero(np.diff(flat)) + 1
                runs = np.diff(borders, prepend=0, append=len(flat)).tolist()
                runs = [0] * bool(mask[0, 0]) + runs
                shapes += f'<mask label="核" rle="{", ".join(map(str, runs))}" left="0" top="0" '
                shapes += f'width="{width}" height="{height}"></mask>'
            entries.append(
                f'<image name="{path.name}" width="{width}" height="{height}">{shapes}</image>'
            )
            text = f"<annotations>{''.join(entries)}</annotations>"
            (folder / "annotations.xml").write_text(text, encoding="utf-8")
        else:
            numbers = np.zeros((height, width), np.uint16)
            for number, mask in enumerate(masks, 500):
                numbers[mask] = number
            cv2.imwrite(str(folder / f"{path.stem}_masks.png"), numbers)


@pytest.mark.parametrize("format_name", ["yolo", "labelme", "cvat", "label-images"])
def test_real_masks_survive(tmp_path, nuclei, format_name):
    folder = tmp_path / "set"
    write_nuclei(folder, format_name, nuclei)
    classes = ["核"] if format_name == "label-images" else []
    traced = format_name in ("yolo", "labelme")
    converted = convert(folder, split=0.8, class_names=classes, traced=traced)
    assert converted.num_images == {"train": NUM_TRAIN, "val": NUM_IMAGES - NUM_TRAIN}
    found = {}
    for name in converted.names.values():
        dataset = get_dataset(name)
        assert dataset.class_names == ["核"]
        assert not dataset.issues
        for image_id in dataset.image_ids:
            found[dataset.image(image_id)["file_name"]] = [
                segmentation_to_rle(a["segmentation"], dataset.image_size(image_id))
                for a in dataset.annotations(image_id)
            ]
    assert len(found) == NUM_IMAGES
    for path, masks in nuclei:
        expected = mask_utils.encode(np.asfortranarray(masks.transpose(1, 2, 0), np.uint8))
        # Of a mask in several parts, YOLO makes several objects.
        several = [len(cv2.findContours(m.astype(np.uint8), 0, 1)[0]) > 1 for m in masks]
        ious = mask_utils.iou(found[path.name], expected, [0] * len(expected)).max(axis=0)
        assert (ious[~np.array(several) | (format_name != "yolo")] >= 0.99).all()
        assert several.count(True) <= 1


def write_any(folder, format_name):
    if format_name == "yolo":
        write_yolo(folder, {"train/a": yolo_line(SQUARE)})
    elif format_name == "labelme":
        write_labelme(folder, [shape()])
    elif format_name == "cvat":
        write_cvat(folder, "")
    elif format_name == "voc":
        write_voc(folder, np.eye(8, dtype=int), np.eye(8, dtype=int))
    else:
        cv2.imwrite(str(write_image(folder / "a.png").with_name("a_masks.png")), np.eye(8, 12))


@pytest.mark.parametrize("format_name", conversion.READERS)
def test_the_format_is_what_the_files_show(tmp_path, format_name):
    write_any(tmp_path / "a", format_name)
    assert guess_format(tmp_path / "a") == format_name
    write_any(tmp_path / "a", "voc" if format_name == "cvat" else "cvat")
    with pytest.raises(UserError, match=rf"several formats: .*{format_name} \("):
        guess_format(tmp_path / "a")


def test_formats_that_are_not_known(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match=r"its files: 1 \.json, 1 \.png"):
        guess_format(tmp_path)
    with pytest.raises(FileNotFoundError):
        guess_format(tmp_path / "none")
    with pytest.raises(UserError, match="nearest"):
        convert(tmp_path, "coko")
    with pytest.raises(UserError, match="file_malformed"):
        convert(tmp_path, "labelme")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_yolo(Path("set"), {"train/a": yolo_line(SQUARE) + "9 1", "val/b": ""})
    assert convert_data.main(["set"]) == 0
    printed = capsys.readouterr().out
    assert "1 images, 1 objects: set/annotations_train.json@set" in printed
    assert "class_unknown" in printed
    assert (
        "DATASETS.TEST \"['set/annotations_val.json@set']\" MODEL.TENSOR_MASK.NUM_CLASSES 2"
        in printed
    )
    dataset = get_dataset("set/annotations_train.json@set")
    assert dataset.class_names == NAMES
    assert dataset.image(1)["file_name"] == "images/train/a.png"
    (annotation,) = dataset.annotations(1)
    assert annotation["bbox"] == [2, 2, 4, 4]
    assert annotation["area"] == 16
    assert not dataset.issues
    assert convert_data.main(["set", "--output", "out", "--split", "0.5"]) == 0  # and again
    assert "--split replaces the set's own splits: train, val." in capsys.readouterr().out
    assert sorted(os.listdir("out")) == ["annotations_train.json", "annotations_val.json"]
    assert convert_data.main(["set", "--split", "1.5"]) == 2
    Path("out/annotations_val.json").write_text('{"images": []}')
    assert convert_data.main(["set", "--output", "out"]) == 2
    assert "not from tensormask convert-data" in capsys.readouterr().err


def test_a_set_without_splits(tmp_path, capsys):
    write_labelme(tmp_path, [shape()])
    assert convert_data.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "--split 0.8" in printed
    assert "DATASETS.TEST" not in printed
    assert (tmp_path / "annotations.json").exists()


def test_images_outside_of_the_folder_of_a_data_yaml(tmp_path):
    write_image(tmp_path / "far" / "images" / "a.png")
    (tmp_path / "far" / "labels").mkdir()
    (tmp_path / "far" / "labels" / "a.txt").write_text(yolo_line(SQUARE))
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "data.yaml").write_text("names: [a, a]\ntrain: ../far/images")
    converted = convert(tmp_path / "near")
    (name,) = converted.names.values()
    assert name.endswith(f"@{tmp_path / 'far' / 'images'}")
    assert get_dataset(name).has_file.all()
    assert converted.source.class_names == ["a"]
    assert "one name" in converted.source.notes[0]


def test_a_data_yaml_in_a_config(tmp_path):
    yaml_file = write_yolo(tmp_path, {"train/a": yolo_line(SQUARE), "val/b": ""})
    sets = [f"DATASETS.{key}" for key in ("TRAIN", "TEST")]
    words = [sets[0], f"['{yaml_file}']", sets[1], f"['{yaml_file}', 'shapes_val']"]
    args = train.build_parser().parse_args(words)
    for cfg in (train.setup_config(args), read_config("quickstart", words)):
        assert cfg.DATASETS.TRAIN == (f"{yaml_file}@train",)
        assert cfg.DATASETS.TEST == (f"{yaml_file}@val", "shapes_val")
    assert get_dataset(cfg.DATASETS.TRAIN[0]).num_annotations == 1
    assert len(get_dataset(cfg.DATASETS.TEST[0])) == 1
    assert catalog.is_dataset_name(f"{yaml_file}@val")
    with pytest.raises(UserError, match="which split"):
        get_dataset(str(yaml_file))
    with pytest.raises(UserError, match="no images for the split 'test'"):
        get_dataset(f"{yaml_file}@test")
    with pytest.raises(FileNotFoundError):
        get_dataset(f"{tmp_path}/none.yaml@val")


def test_a_data_yaml_is_converted_again_when_its_labels_change(tmp_path, monkeypatch, caplog):
    yaml_file = write_yolo(tmp_path, {"train/a": yolo_line(SQUARE)})
    name = f"{yaml_file}@train"
    first = get_dataset(name)
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_coco", None)  # is not called
        monkeypatch.chdir(tmp_path)
        assert get_dataset(name) is first
        assert get_dataset("data.yaml@train").num_annotations == 1
    label_file = tmp_path / "labels" / "train" / "a.txt"
    with catalog.fixed_datasets():
        get_dataset(name)
        label_file.write_text(yolo_line(SQUARE) + yolo_line(SQUARE, 1) + "7 7")
        assert get_dataset(name) is first  # as a run has begun
    assert get_dataset(name).num_annotations == 2
    assert "class_unknown" in caplog.text
    write_image(tmp_path / "images" / "train" / "b.png")
    assert len(get_dataset(name)) == 2
    (tmp_path / "data_train.coco.json").write_text("{}")
    with pytest.raises(UserError, match="not from TensorMask"):
        get_dataset(name)


def test_the_docs_have_all_kinds():
    text = (Path(__file__).parents[3] / "docs" / "data_issues.md").read_text(encoding="utf-8")
    rows = text.partition("## In a conversion")[2].splitlines()
    assert [row for row in rows if row.startswith("| `")] == [
        f"| `{kind}` | {issue.meaning} | {issue.outcome} |" for kind, issue in KINDS.items()
    ]
