"""Names of data sets, the paths of their files, and errors."""

import json

import pytest
from PIL import Image

from tensormask.data import catalog, get_dataset, register_coco_instances, shapes


def write_set(json_file, image_root, name="cup"):
    json_file.parent.mkdir(parents=True, exist_ok=True)
    image_root.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(image_root / "a.png")
    images = [{"id": 1, "file_name": "a.png", "height": 4, "width": 4}]
    data = {"images": images, "annotations": [], "categories": [{"id": 1, "name": name}]}
    json_file.write_text(json.dumps(data))


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(catalog, "_registered", {})
    monkeypatch.delenv("TENSORMASK_DATASETS", raising=False)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.chdir(tmp_path)
    catalog._load.cache_clear()


def test_registered_names(tmp_path):
    write_set(tmp_path / "a.json", tmp_path / "images")
    register_coco_instances("mine", {}, tmp_path / "a.json", tmp_path / "images")
    register_coco_instances("mine", {}, tmp_path / "a.json", tmp_path / "images")  # the same
    dataset = get_dataset("mine")
    assert dataset.name == "mine"
    assert dataset.class_names == ["cup"]
    assert dataset.load(1)[0].shape == (4, 4, 3)
    assert get_dataset("mine") is dataset


@pytest.mark.parametrize("name", ["mine", "coco_2017_val", "shapes_train", "nuclei_val"])
def test_a_name_cannot_be_registered_twice(name):
    register_coco_instances("mine", {}, "a.json", "images")
    with pytest.raises(ValueError, match="taken"):
        register_coco_instances(name, {}, "b.json", "images")


def test_expected_classes_are_checked(tmp_path):
    write_set(tmp_path / "a.json", tmp_path)
    register_coco_instances("right", {"thing_classes": ["cup"]}, "a.json", ".")
    register_coco_instances("wrong", {"thing_classes": ["mug"]}, "a.json", ".")
    get_dataset("right")
    with pytest.raises(ValueError, match=r"mug.*cup"):
        get_dataset("wrong")


def test_paths(tmp_path):
    write_set(tmp_path / "with space" / "a@b.json", tmp_path / "images@home")
    dataset = get_dataset("with space/a@b.json@images@home")
    assert dataset.load(1)[0].shape == (4, 4, 3)


@pytest.mark.parametrize("missing", ["annotations", "images"])
def test_missing_files_of_a_path(tmp_path, missing):
    write_set(tmp_path / "a.json", tmp_path / "images")
    name = {"annotations": "b.json@images", "images": "a.json@photos"}[missing]
    with pytest.raises(FileNotFoundError, match=f"the {missing} of .*{tmp_path}"):
        get_dataset(name)


@pytest.mark.parametrize(
    "name, json_name, folder",
    [
        ("coco_2017_train", "instances_train2017.json", "train2017"),
        ("coco_2017_val_100", "instances_val2017_100.json", "val2017"),
        ("coco_2017_test-dev", "image_info_test-dev2017.json", "test2017"),
        ("coco_2014_minival", "instances_minival2014.json", "val2014"),
    ],
)
def test_coco_names(tmp_path, name, json_name, folder):
    coco = tmp_path / "data" / "coco"
    write_set(coco / "annotations" / json_name, coco / folder)
    assert get_dataset(name, root=tmp_path / "data").name == name


def test_precedence_of_the_data_roots(tmp_path, monkeypatch):
    def classes():
        return get_dataset("coco_2017_val").class_names

    for folder in ("datasets", "detectron", "ours"):
        coco = tmp_path / folder / "coco"
        write_set(coco / "annotations" / "instances_val2017.json", coco / "val2017", name=folder)
    assert classes() == ["datasets"]
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "detectron"))
    assert classes() == ["detectron"]
    monkeypatch.setenv("TENSORMASK_DATASETS", str(tmp_path / "ours"))
    assert classes() == ["ours"]
    assert get_dataset("coco_2017_val", root=tmp_path / "datasets").class_names == ["datasets"]


def test_missing_coco_names_the_path_and_the_variable(tmp_path):
    path = tmp_path / "datasets" / "coco" / "annotations" / "instances_val2017.json"
    with pytest.raises(FileNotFoundError, match=rf"(?s){path}.*TENSORMASK_DATASETS"):
        get_dataset("coco_2017_val")


def test_unknown_names():
    choices = r"annotations\.json@path/to/images.*register_coco_instances"
    for written, nearest in (
        ("coco_2017_vel", "coco_2017_val"),
        ("shape_train", "shapes_train"),
        ("nucleus_train", "nuclei_train"),
    ):
        with pytest.raises(ValueError, match=rf"nearest known name is '{nearest}'.*{choices}"):
            get_dataset(written)


def test_shapes_are_generated_at_first_use(tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.NUM_IMAGES, "val", 3)
    dataset = get_dataset("shapes_val")
    assert (tmp_path / "datasets" / "shapes" / "val" / "annotations.json").is_file()
    assert len(dataset) == 3
    assert dataset.class_names == list(shapes.CLASS_NAMES)
