"""Names of data sets, the paths of their files, and errors."""

import json
import os
import time

import pytest
from fakes import make_cfg
from PIL import Image

from tensormask.data import catalog, get_dataset, register_coco_instances, shapes
from tensormask.engine import trainer
from tensormask.engine.evaluator import evaluate_only


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
    monkeypatch.setattr(catalog, "_loaded", {})


def test_registered_names(tmp_path):
    write_set(tmp_path / "a.json", tmp_path / "images")
    register_coco_instances("mine", {}, tmp_path / "a.json", tmp_path / "images")
    register_coco_instances("mine", {}, tmp_path / "a.json", tmp_path / "images")  # the same
    dataset = get_dataset("mine")
    assert dataset.name == "mine"
    assert dataset.class_names == ["cup"]
    assert dataset.load(1)[0].shape == (4, 4, 3)
    assert get_dataset("mine") is dataset


@pytest.mark.parametrize("name", ["coco_2017_val", "shapes_train", "nuclei_val"])
def test_a_name_of_the_library_cannot_be_registered(name):
    with pytest.raises(ValueError, match="taken"):
        register_coco_instances(name, {}, "b.json", "images")


def test_registering_again_replaces(tmp_path, caplog):
    caplog.set_level("INFO", "tensormask")
    write_set(tmp_path / "a.json", tmp_path / "images")
    write_set(tmp_path / "b.json", tmp_path / "others", name="mug")
    register_coco_instances("mine", {}, "a.json", "none")
    with pytest.raises(FileNotFoundError):
        get_dataset("mine")
    register_coco_instances("mine", {"thing_classes": ["mug"]}, "a.json", "images")
    with pytest.raises(ValueError, match="mug"):
        get_dataset("mine")
    for json_file, classes in (("a.json", ["cup"]), ("b.json", ["mug"]), ("a.json", ["cup"])):
        register_coco_instances("mine", {}, json_file, "images")
        assert get_dataset("mine").class_names == classes
    assert "mine is replaced: b.json" in caplog.text


def rename_class(tmp_path):
    write_set(tmp_path / "a.json", tmp_path / "images", name="mug")  # of the same length


def replace_file(tmp_path):
    write_set(tmp_path / "b.json", tmp_path / "images", name="mug")
    os.utime(tmp_path / "b.json", (1, 1))  # older
    (tmp_path / "b.json").replace(tmp_path / "a.json")


def restore_a_backup(tmp_path):
    """With the time of the first file."""
    status = os.stat(tmp_path / "a.json")
    rename_class(tmp_path)
    os.utime(tmp_path / "a.json", ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [rename_class, replace_file, restore_a_backup])
@pytest.mark.parametrize("how", ["by name", "by path"])
def test_a_changed_file_is_read_again(tmp_path, change, how):
    write_set(tmp_path / "a.json", tmp_path / "images")
    register_coco_instances("mine", {}, "a.json", "images")
    name = "mine" if how == "by name" else "a.json@images"
    before = get_dataset(name)
    assert get_dataset(name) is before
    change(tmp_path)
    after = get_dataset(name)
    assert (before.class_names, after.class_names) == (["cup"], ["mug"])
    assert get_dataset(name) is after


def test_a_large_file_is_recognized_by_time_size_and_inode(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "_SMALL_FILE", 0)
    monkeypatch.setattr(catalog, "_SMALL_FOLDER", 0)
    write_set(tmp_path / "a.json", tmp_path / "images")
    before = get_dataset("a.json@images")
    assert get_dataset("a.json@images") is before
    for change in (
        lambda: os.utime(tmp_path / "a.json", (5, 5)),
        lambda: os.utime(tmp_path / "images", (5, 5)),
        lambda: restore_a_backup(tmp_path),
        lambda: replace_file(tmp_path),
    ):
        time.sleep(0.02)  # the steps of a file system's clock
        change()
        assert get_dataset("a.json@images") is not before
        before = get_dataset("a.json@images")


@pytest.mark.parametrize("file_name", ["a.png", "sub/a.png"])
def test_images_that_come_and_go(tmp_path, file_name):
    write_set(tmp_path / "a.json", tmp_path / "images")
    data = json.loads((tmp_path / "a.json").read_text())
    data["images"][0]["file_name"] = file_name
    (tmp_path / "a.json").write_text(json.dumps(data))
    image = (tmp_path / "images" / "a.png").rename(tmp_path / "a.png")
    dataset = get_dataset("a.json@images")
    assert (dataset.has_file.tolist(), dataset.issues.counts) == ([False], {"image_missing": 1})
    target = tmp_path / "images" / file_name
    target.parent.mkdir(exist_ok=True)
    image.rename(target)
    dataset = get_dataset("a.json@images")
    assert (dataset.has_file.tolist(), dataset.issues.counts) == ([True], {})
    target.unlink()
    assert get_dataset("a.json@images").has_file.tolist() == [False]


def test_a_run_keeps_its_data_sets(tmp_path):
    """Also while the file is saved, and not there for a moment."""
    write_set(tmp_path / "a.json", tmp_path / "images")
    before = get_dataset("a.json@images")
    rename_class(tmp_path)
    with catalog.fixed_datasets():
        latest = get_dataset("a.json@images")
        assert latest.class_names == ["mug"]
        write_set(tmp_path / "a.json", tmp_path / "images", name="jug")
        with catalog.fixed_datasets():
            assert get_dataset("a.json@images") is latest
        (tmp_path / "a.json").write_text("[")
        assert get_dataset("a.json@images") is latest
    with pytest.raises(ValueError, match="not JSON"):
        get_dataset("a.json@images")
    assert before.class_names == ["cup"]


def test_not_too_many_sets_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "_MAX_LOADED", 2)
    for name in "abc":
        write_set(tmp_path / f"{name}.json", tmp_path)
        get_dataset(f"{name}.json@.")
    first = get_dataset("b.json@.")
    get_dataset("a.json@.")
    assert get_dataset("b.json@.") is first
    assert [key[0] for key in catalog._loaded] == ["a.json@.", "b.json@."]


@pytest.mark.parametrize(
    "registered, names, ids",
    [
        (["cup", "mug", "tea"], ["cup", "mug", "tea"], [1, 2, 5]),
        (("tea", "cup", "mug"), ["tea", "cup", "mug"], [5, 1, 2]),
        (["pot", "tea", "jug", "mug", "cup"], ["tea", "mug", "cup"], [5, 2, 1]),
        ([], ["cup", "mug", "tea"], [1, 2, 5]),
        (["cup", "tea"], None, None),
        (["cup", "mug", "Tea"], None, None),
        (["cup", "mug", "tea", "tea"], None, None),
    ],
)
def test_registered_classes_give_the_order_of_the_labels(tmp_path, registered, names, ids):
    write_set(tmp_path / "a.json", tmp_path)
    content = json.loads((tmp_path / "a.json").read_text())
    content["categories"] = [
        {"id": i, "name": name} for i, name in ((5, "tea"), (1, "cup"), (2, "mug"))
    ]
    (tmp_path / "a.json").write_text(json.dumps(content))
    register_coco_instances("mine", {"thing_classes": registered}, "a.json", ".")
    if names is None:
        with pytest.raises(ValueError, match=r"was registered with.*'mug', 'tea'"):
            get_dataset("mine")
        return
    dataset = get_dataset("mine")
    assert (dataset.class_names, dataset.category_ids) == (names, ids)
    for name, category in zip(names, ids, strict=True):
        assert names[dataset.label_of({"category_id": category})] == name


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


@pytest.mark.usefixtures("nothing_left_behind")
def test_training_and_evaluation_keep_their_data_sets(tmp_path, fakes):
    """The annotations may be saved anew during a run."""
    kept = []

    def evaluator(model, dataset, folder):
        kept.append(catalog._fixed.get() is not None)
        return {"F": 1.0}

    cfg = make_cfg(tmp_path, "SOLVER.MAX_ITER", 1)
    trainer.train(cfg, evaluators=[evaluator])
    evaluate_only(cfg, resume=True, evaluators=[evaluator])
    assert kept == [True, True]
    assert catalog._fixed.get() is None
