"""Classes are matched by their names: the functions, and the labels of data sets."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tensormask.config import get_cfg
from tensormask.data import CocoDataset, build_train_loader
from tensormask.data.classes import (
    UNKNOWN,
    Classes,
    log_match,
    match_dataset,
    present_classes,
    shared_labels,
)

NAMES = st.lists(st.text("abcAé _", min_size=1, max_size=3), unique=True, min_size=1, max_size=8)


def make_set(folder, names, name="val"):
    """Write a file with an object of each class in an image of its own, and read it."""
    path = folder / f"{name}.json"
    box = {"bbox": [2, 2, 9, 9], "area": 81, "iscrowd": 0}
    numbered = list(enumerate(names, 1))
    path.write_text(json.dumps({
        "images": [{"id": i, "file_name": "1.png", "width": 20, "height": 20} for i, _ in numbered],
        "categories": [{"id": 3 * i, "name": name} for i, name in numbered],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 3 * i, **box} for i, _ in numbered
        ],
    }))  # fmt: skip
    return CocoDataset(name, path, folder)


def config(num_classes=80, how="name"):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.TENSOR_MASK.NUM_CLASSES", num_classes])
    cfg.DATASETS.MATCH_CLASSES = how
    return cfg


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sets")


@settings(max_examples=60, deadline=None)
@given(names=NAMES, data=st.data())
def test_labels_are_those_of_the_model(folder, names, data):
    """For every order and every part of its names, each annotation keeps its class."""
    part = data.draw(st.permutations(names))[: data.draw(st.integers(1, len(names)))]
    original = make_set(folder, part)
    matched = match_dataset(config(), original, Classes(names))
    assert matched.class_names == names
    labels = [matched.label_of(matched.annotations(i)[0]) for i in matched.image_ids]
    assert [names[label] for label in labels] == part
    assert [matched.category_ids[label] for label in labels] == original.category_ids
    assert matched.category_ids.count(None) == len(names) - len(part)
    assert sorted(present_classes(matched)[0]) == sorted(part)
    assert {c["id"]: c["name"] for c in matched.to_coco().dataset["categories"]} == dict(
        zip(original.category_ids, part, strict=True)
    )
    assert (matched is original) == (part == names)
    assert original.class_names == part
    if len(part) < len(names):
        with pytest.raises(ValueError, match="have different classes"):
            match_dataset(config(), original, Classes(names), complete=True)
    else:
        match_dataset(config(), original, Classes(names), complete=True)


@settings(max_examples=60, deadline=None)
@given(names=NAMES, others=NAMES)
def test_a_class_that_the_model_lacks_is_an_error(folder, names, others):
    dataset, classes = make_set(folder, others), Classes(names, source="m.pth")
    if set(others) <= set(names):
        match_dataset(config(), dataset, classes)
        return
    with pytest.raises(ValueError, match=r"DATASETS\.MATCH_CLASSES position") as caught:
        match_dataset(config(), dataset, classes)
    for name in [*names, *others]:
        assert repr(name) in str(caught.value)
    by_position = config(how="position")
    if len(names) == len(others):
        assert match_dataset(by_position, dataset, classes) is dataset
        assert match_dataset(config(len(others)), dataset, UNKNOWN) is dataset
    else:
        with pytest.raises(ValueError, match="needs equal numbers"):
            match_dataset(by_position, dataset, classes)
        with pytest.raises(ValueError, match=r"no class names.*needs equal numbers"):
            match_dataset(config(len(names)), dataset, UNKNOWN)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcd")), st.lists(st.sampled_from("abcd")))
def test_shared_labels(names, others):
    pairs = shared_labels(names, others)
    assert all(names[ours] == others[theirs] for ours, theirs in pairs.items())
    assert len(set(pairs.values())) == len(pairs)
    if names != others:
        expected = [n for n in names if names.count(n) == others.count(n) == 1]
        assert [names[ours] for ours in pairs] == expected
    else:
        assert pairs == {label: label for label in range(len(names))}


@pytest.mark.parametrize(
    "names, others, message",
    [
        (["cup", "cup"], ["cup", "tea"], "Several classes of m.pth have the name 'cup'"),
        (["cup", "tea", "tea"], ["tea", "cup", "tea"], "of val have the name 'tea'.*or, if the"),
        (["traffic light"], ["Traffic_Light"], "'traffic light' and 'Traffic_Light' differ only"),
        (["caf\u00e9"], ["cafe\u0301"], r"'caf\\xe9' and 'cafe\\u0301' differ only"),
        (["n" * 60], ["x"], "'n{37}\\.\\.\\.'"),
        (["a\nb"], ["x"], r"'a\\nb'"),
        (
            [*map(str, range(80))],
            [*map(str, range(70)), "x"],
            "only there: '70', .*'79'. Classes",
        ),
    ],
)
def test_messages(folder, names, others, message):
    with pytest.raises(ValueError, match=message) as caught:
        match_dataset(config(), make_set(folder, others), Classes(names, source="m.pth"))
    assert len(str(caught.value)) < 800
    assert "\n" not in str(caught.value)


def test_names_that_occur_twice_are_the_same_in_the_same_order(folder):
    dataset = make_set(folder, ["cup", "tea", "cup"])
    assert match_dataset(config(), dataset, Classes(["cup", "tea", "cup"])) is dataset
    some = make_set(folder, ["tea"])
    matched = match_dataset(config(), some, Classes(["cup", "tea", "cup"]))
    assert matched.category_ids == [None, 3, None]


def test_the_log_says_how_classes_are_matched(folder, caplog):
    caplog.set_level("INFO", logger="tensormask")
    classes = Classes(["a", "b", "c"], source="m.pth")
    for names, how, levels in [
        (["a", "b", "c"], "name", []),
        (["a", "c", "b"], "name", ["INFO"]),
        (["a", "c"], "name", ["WARNING"]),
        (["c", "a"], "name", ["INFO", "WARNING"]),
        (["c", "b", "a"], "position", ["WARNING"]),
        (["x", "y", "z"], "position", ["INFO"]),
    ]:
        caplog.clear()
        dataset = make_set(folder, names)
        log_match(dataset, match_dataset(config(how=how), dataset, classes), classes)
        assert [record.levelname for record in caplog.records] == levels
        assert all("m.pth" in line and "val" in line for line in caplog.messages)
    assert "'x', 'y', 'z' and 'a', 'b', 'c': they are matched by position" in caplog.text


@pytest.mark.parametrize("how", ["name", "position"])
def test_training_sets_get_the_labels_of_the_first_one(folder, how):
    """A sample of each of two files, whose classes are in different orders."""
    Image.new("RGB", (20, 20)).save(folder / "1.png")
    cfg = config(2, how)
    for name, names in (("first", ["cup", "tea"]), ("second", ["tea", "cup"])):
        path = folder / f"{name}.json"
        make_set(folder, names, name)
        content = json.loads(path.read_text())
        square = [[2, 2, 11, 2, 11, 11, 2, 11]]
        for annotation in content["annotations"]:
            annotation["segmentation"] = square
        path.write_text(json.dumps(content))
        cfg.DATASETS.TRAIN = (*cfg.DATASETS.TRAIN, f"{path}@{folder}")
    cfg.merge_from_list(["SEED", 1, "SOLVER.IMS_PER_BATCH", 4, "DATALOADER.NUM_WORKERS", 0])
    cfg.INPUT.MIN_SIZE_TRAIN = (20,)
    labels: dict[str, dict[int, list[int]]] = {"first": {}, "second": {}}
    for sample in next(build_train_loader(cfg)):
        stem = Path(sample["dataset"].partition("@")[0]).stem
        labels[stem][sample["image_id"]] = sample["target"]["labels"].tolist()
    swapped = {1: [1], 2: [0]}
    in_order = {1: [0], 2: [1]}
    assert labels == {"first": in_order, "second": swapped if how == "name" else in_order}
