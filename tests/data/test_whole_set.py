"""Sets whose files are elsewhere, unreadable, of another size or not turned; unusable sets."""

import json
import logging
import shutil

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as mask_utils

from tensormask.commands import check, evaluate, train
from tensormask.data import CocoDataset
from tensormask.data.whole_set import check_sets, diagnose_set, unusable_reason
from tensormask.utils.errors import UserError

NUM_IMAGES = 12
ORIENTATION = 0x0112


@pytest.fixture
def export(tmp_path):
    """`export/images/*.png`, and a function that writes `export/set.json` with changes."""
    folder = tmp_path / "export"
    (folder / "images").mkdir(parents=True)
    for number in range(NUM_IMAGES):
        Image.new("RGB", (40, 30)).save(folder / "images" / f"{number:03d}.png")

    def write(file_name=lambda number: f"images/{number:03d}.png", root=folder, **fields):
        images = [
            {"id": i, "file_name": file_name(i), "width": 40, "height": 30, **fields}
            for i in range(NUM_IMAGES)
        ]
        polygon = [5, 5, 25, 5, 25, 20, 5, 20]
        annotations = [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [5, 5, 20, 15]}
            | {"segmentation": [polygon], "area": 300, "iscrowd": 0}
            for i in range(NUM_IMAGES)
        ]
        content = {"images": images, "categories": [{"id": 1, "name": "a"}]}
        path = folder / "set.json"
        path.write_text(json.dumps(content | {"annotations": annotations}))
        return CocoDataset("set", path, root)

    return write


def names_of(dataset, **options):
    return [diagnosis.name for diagnosis in diagnose_set(dataset, **options)]


@pytest.mark.parametrize(
    "file_name, texts",
    [
        (lambda i: f"images\\{i:03d}.png", ["backslashes", "write 'images/000.png'"]),
        (lambda i: f"..\\..\\upload\\4\\{i:03d}.png", ["backslashes", "images as the folder"]),
        (lambda i: f"C:\\data\\{i:03d}.png", ["backslashes", "last part of file_name"]),
        (lambda i: f"/home/me/data/{i:03d}.png", ["an absolute path", "last part of file_name"]),
        (lambda i: f"https://x.org/a/{i:03d}.png", ["a URL", "images as the folder"]),
        (lambda i: f"s3://bucket/{i:03d}.png?v=2", ["a URL"]),
        (lambda i: f"/data/local-files/?d=images/{i:03d}.png", ["an absolute path", "images as"]),
        (lambda i: f"../other/images/{i:03d}.png", ["'..'", "images as the folder"]),
        (lambda i: f"{i:03d}.png", ["images as the folder of images. Correct"]),
        (lambda i: f"train/{i:03d}.png", ["images as the folder", "last part of file_name"]),
        (lambda i: f"export/images/{i:03d}.png", ["give ", " as the folder of images. Correct"]),
        (lambda i: f"images/%30{i:02d}.png", ["without %-codes", "write 'images/000.png'"]),
        (lambda i: f"images/{i:03d}.jpg", ["similar names", "images: '000.png' for '000.jpg'"]),
        (lambda i: f"images/{i:03d}.PNG", ["similar names", "images: '000.png' for '000.PNG'"]),
        (lambda i: f"images/{i:03d}", ["similar names", "images: '000.png' for '000'"]),
        (lambda i: f"file:///C:/data/{i:03d}.png", ["a URL", "images as the folder"]),
        (lambda i: f"1a2b3c4d-{i:03d}.png", ["similar names", "images: '000.png' for '1a2b"]),
        (lambda i: f"{i:03d}_png.rf.{i:032x}.jpg", ["similar names", "images: '000.png' for "]),
        (lambda i: f"images/ _{i}.png", ["similar names", "images: '000.png' for ' _0.png'"]),
        (lambda i: f"https://x.org/{i:03d}.png?Key=a/b&Date=2", ["a URL", "images as the folder"]),
        (lambda i: f"data:image/png;base64,{i:099d}", ["content of an image", "no files of these"]),
        (lambda i: f"images/none_{i}.png", ["no files of these names"]),
    ],
)
def test_missing_images_are_explained(export, file_name, texts):
    dataset = export(file_name)
    (found,) = diagnose_set(dataset)
    assert found.name == "images_missing"
    for text in texts:
        assert text in str(found)
    assert "no image has a file" in unusable_reason(dataset, [found])
    with pytest.raises(UserError, match="images_missing"):
        check_sets([dataset])


def test_missing_images_in_several_folders(export, tmp_path):
    for number in range(NUM_IMAGES):
        folder = tmp_path / "export" / f"class{number % 3}"
        folder.mkdir(exist_ok=True)
        (tmp_path / "export" / "images" / f"{number:03d}.png").rename(folder / f"{number:03d}.png")
    (found,) = diagnose_set(export(lambda i: f"{i:03d}.png"))
    assert "they are in several folders: write 'class0/000.png' for '000.png'" in found.detail


def test_the_folder_that_is_given_makes_the_names_lead_to_their_files(export, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (found,) = diagnose_set(export(root=wrong))
    assert f"give {tmp_path / 'export'} as the folder of images." in found.detail + "."


@pytest.mark.parametrize("num_missing, expected", [(1, []), (2, []), (6, ["images_missing"])])
def test_some_missing_images(export, num_missing, expected, caplog):
    dataset = export(lambda i: ("images\\" if i < num_missing else "images/") + f"{i:03d}.png")
    assert names_of(dataset) == expected
    with caplog.at_level(logging.WARNING):
        check_sets([dataset])
    assert ("backslashes" in caplog.text) == bool(expected)
    if expected:
        with pytest.raises(UserError, match="STRICT"):
            check_sets([dataset], strict=True)


def test_a_set_without_a_cause(export):
    dataset = export()
    assert diagnose_set(dataset) == []
    assert unusable_reason(dataset, []) == ""


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", None])
def test_a_set_of_which_no_image_can_be_read(export, tmp_path, content, capsys):
    for path in (tmp_path / "export" / "images").iterdir():
        path.write_bytes(path.read_bytes()[:60] if content is None else content)
    dataset = export()
    assert names_of(dataset) == ["images_unreadable"]
    assert names_of(dataset, open_images=False) == []
    name = f"{tmp_path}/export/set.json@{tmp_path}/export"
    assert check.main([name, "--num-workers", "0", "--json", str(tmp_path / "found.json")]) == 2
    assert "no image can be read" in capsys.readouterr().err
    (record,) = json.loads((tmp_path / "found.json").read_text()).values()
    assert record["issues"]["image_broken"]["count"] == NUM_IMAGES
    assert [found["name"] for found in record["diagnoses"]] == ["images_unreadable"]
    Image.new("RGB", (40, 30)).save(tmp_path / "export" / "images" / "007.png")
    assert names_of(export()) == []  # one can be read; the others are issues


def turn(folder, orientation):
    """Store the images as a camera does that is held upright: turned, with a tag."""
    for path in folder.iterdir():
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        Image.open(path).save(path, exif=exif)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_annotations_of_images_that_were_not_turned(export, tmp_path, orientation):
    turn(tmp_path / "export" / "images", orientation)
    dataset = export()
    found = names_of(dataset)
    assert found == ["images_not_turned", "images_unreadable"]
    assert "images_not_turned" in unusable_reason(dataset, diagnose_set(dataset))
    assert names_of(export(width=30, height=40)) == []


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 9])
def test_tags_that_do_not_exchange_the_sides(export, tmp_path, orientation):
    turn(tmp_path / "export" / "images", orientation)
    assert names_of(export()) == []


def write_shapes(folder, rng, orientation, in_stored_frame, *, square, rle):
    """Images with an EXIF orientation, and masks of the upright or of the stored image."""
    images, annotations = [], []
    for number in range(5):
        height = int(rng.integers(60, 90))
        width = height if square else height + 30
        pixels = rng.integers(90, 120, (height, width, 3)).astype(np.uint8)
        left, top = rng.integers(2, 12), rng.integers(2, 25)
        right, bottom = left + rng.integers(15, 40), top + rng.integers(10, 30)
        pixels[top:bottom, left:right] = (200, 60, 60)  # as bright as the background, in the mean
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        Image.fromarray(pixels).save(folder / f"{number}.png", exif=exif)
        mask = np.zeros((height, width), np.uint8)
        mask[top:bottom, left:right] = 1
        if not in_stored_frame:
            path = folder / "mask.png"
            Image.fromarray(mask * 255).save(path, exif=exif)
            mask = np.asarray(ImageOps.exif_transpose(Image.open(path))) // 255
        if not rle:
            rows, columns = np.nonzero(mask)
            x0, y0, x1, y1 = columns.min() - 2, rows.min() - 2, columns.max() + 3, rows.max() + 3
            segmentation = [np.array([x0, y0, x1, y0, x1, y1, x0, y1]).tolist()]
        else:
            code = mask_utils.encode(np.asfortranarray(mask))
            segmentation = {"size": code["size"], "counts": code["counts"].decode()}
        upright = (width, height) if orientation >= 5 else (height, width)
        images.append({"id": number, "file_name": f"{number}.png"})
        images[-1] |= dict(zip(("height", "width"), upright, strict=True))
        box = mask_utils.toBbox(mask_utils.encode(np.asfortranarray(mask))).tolist()
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": box})
        annotations[-1]["segmentation"] = segmentation
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "a"}]
    (folder / "set.json").write_text(json.dumps(content))
    return CocoDataset("set", folder / "set.json", folder)


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("square", [True, False])
def test_the_outlines_of_masks_show_whether_images_were_turned(tmp_path, orientation, square):
    """Where sizes agree, which is so for squares and half turns, only the pixels tell."""
    rng = np.random.default_rng(orientation)
    for rle in (False, True):
        dataset = write_shapes(tmp_path, rng, orientation, False, square=square, rle=rle)
        assert names_of(dataset) == []
        if rle and orientation >= 5 and not square:
            continue  # its size is that of the other frame: masks_malformed
        dataset = write_shapes(tmp_path, rng, orientation, True, square=square, rle=rle)
        assert "images_not_turned" in names_of(dataset) or orientation == 1


@pytest.mark.parametrize(
    "size, text",
    [
        ((30, 40), "exchanged"),
        ((80, 60), "2 times"),
        ((20, 15), "0.5 times"),
        ((41, 30), "such as 41 x 30 for a file of 40 x 30"),
    ],
)
def test_annotations_of_another_size(export, size, text):
    dataset = export(width=size[0], height=size[1])
    found = diagnose_set(dataset)
    assert "images_of_another_size" in [diagnosis.name for diagnosis in found]
    assert text in unusable_reason(dataset, found)


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"iscrowd": 1}, "crowds"),
        ({"category_id": 9}, "ids_unknown"),
        ({"image_id": "a"}, "ids_unknown"),
        ({"segmentation": [5, 5, 25, 5, 25, 20], "bbox": None}, "masks_malformed"),
        ({"segmentation": [[0.1, 0.1, 0.6, 0.1, 0.6, 0.5]]}, "coordinates_normalized"),
        ({"bbox": [0.1, 0.1, 0.5, 0.4]}, "coordinates_normalized"),
    ],
)
def test_nothing_usable_is_an_error_of_check(export, tmp_path, capsys, fields, reason):
    export()
    path = tmp_path / "export" / "set.json"
    content = json.loads(path.read_text())
    content["annotations"] = [annotation | fields for annotation in content["annotations"]]
    path.write_text(json.dumps(content))
    name = f"{path}@{tmp_path}/export"
    for fast in ([], ["--fast"]):
        assert check.main([name, "--num-workers", "0", *fast]) == 2
        captured = capsys.readouterr()
        assert "no annotation of an image that has a file can be" in captured.err
        assert reason in captured.err
        assert "The set as a whole" in captured.out
    content["annotations"][3] |= {"segmentation": [[5, 5, 25, 5, 25, 20]], "bbox": [5, 5, 20, 15]}
    content["annotations"][3] |= {"iscrowd": 0, "category_id": 1, "image_id": 3}
    path.write_text(json.dumps(content))
    assert check.main([name, "--num-workers", "0"]) == 1  # one object can be used


def test_a_set_without_annotations_is_usable(export, tmp_path):
    dataset = export()
    path = tmp_path / "export" / "set.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "annotations": []}))
    dataset = CocoDataset("set", path, tmp_path / "export")
    assert unusable_reason(dataset, diagnose_set(dataset)) == ""
    shutil.rmtree(tmp_path / "export" / "images")
    dataset = CocoDataset("set", path, tmp_path / "export")
    assert "no image has a file" in unusable_reason(dataset, diagnose_set(dataset))


def test_boxes_only_can_be_evaluated(export, tmp_path):
    export()
    path = tmp_path / "export" / "set.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    path.write_text(json.dumps(content))
    dataset = CocoDataset("set", path, tmp_path / "export")
    assert names_of(dataset) == ["masks_missing"]
    assert unusable_reason(dataset, diagnose_set(dataset)) == ""
    assert np.count_nonzero(dataset.num_trainable) == 0


@pytest.mark.parametrize("main", [train.main, evaluate.main])
def test_an_unusable_test_set_ends_training_and_evaluation_at_the_start(
    export, tmp_path, main, capsys, nothing_left_behind
):
    export(lambda i: f"images\\{i:03d}.png")
    name = f"{tmp_path}/export/set.json@{tmp_path}/export"
    arguments = ["--config-file", "quickstart", "MODEL.TENSOR_MASK.NUM_CLASSES", "1"]
    arguments += ["DATASETS.TRAIN", "()", "DATASETS.TEST", f"('{name}',)", "MODEL.WEIGHTS", ""]
    assert main([*arguments, "OUTPUT_DIR", str(tmp_path / "out"), "MODEL.DEVICE", "cpu"]) == 2
    assert "write 'images/000.png'" in capsys.readouterr().err
