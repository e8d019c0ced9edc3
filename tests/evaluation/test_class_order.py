"""A file with the classes of a model in another order, or without some of them."""

import json
import math

import numpy as np
import pytest
from grey import CATEGORY_IDS, CLASS_NAMES, FakeModel, GreyDataset, noisy_case
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny import build

from tensormask.config import get_cfg
from tensormask.data.augmentation import Augmentation
from tensormask.data.classes import Classes, match_dataset
from tensormask.evaluation import evaluate, evaluate_oracle

CLASSES = Classes(CLASS_NAMES, source="model_final.pth")
STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A file with objects of three classes, detections of a model, and their metrics."""
    folder = tmp_path_factory.mktemp("case")
    dataset, found = noisy_case(folder, 6)
    content = json.loads(dataset.json_file.read_text())
    for annotation in content["annotations"]:
        annotation["category_id"] = CATEGORY_IDS[annotation["id"] % 3]
    rng = np.random.default_rng(1)
    dataset = GreyDataset(content, folder)
    for image_id, detections in found.items():
        labels = [dataset.label_of(a) for a in dataset.annotations(image_id)] or [0]
        for row in range(len(detections["labels"])):
            detections["labels"][row] = int(rng.choice(labels))
    return folder, content, found, evaluate(FakeModel(found), dataset.loader(), dataset)


def renumbered(content, id_of):
    """Content with other category ids by name; other classes and their objects are left out."""
    names = {c["id"]: c["name"] for c in content["categories"]}
    annotations = [
        {**a, "category_id": id_of[names[a["category_id"]]]}
        for a in content["annotations"]
        if names[a["category_id"]] in id_of
    ]
    categories = [{"id": i, "name": name} for name, i in id_of.items()]
    return {**content, "annotations": annotations, "categories": categories}


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_metrics_do_not_depend_on_the_numbers_of_classes(case, data):
    folder, content, found, expected = case
    ids = data.draw(st.permutations([0, 1, 5, 90, "x"]))[:3]
    part = data.draw(st.permutations(CLASS_NAMES))[: data.draw(st.integers(1, 3))]
    dataset = GreyDataset(renumbered(content, dict(zip(part, ids, strict=False))), folder)
    dataset = match_dataset(get_cfg(), dataset, CLASSES)
    metrics = evaluate(FakeModel(found), dataset.loader(), dataset)
    if len(part) == 3:
        assert metrics == expected  # to the last bit
    for task in ("bbox", "segm"):
        by_class = {name: expected[task][f"AP-{name}"] for name in CLASS_NAMES if name in part}
        assert {n: metrics[task][f"AP-{n}"] for n in by_class} == by_class
        assert metrics[task]["AP"] == pytest.approx(np.mean([*by_class.values()]))
        assert sum(key.startswith("AP-") for key in metrics[task]) == len(part)
        assert not any(map(math.isnan, by_class.values()))


@pytest.mark.parametrize("names", [["never", "disc", "bar"], ["bar", "disc"]])
def test_numbers_are_those_of_pycocotools_for_the_file_itself(case, names, tmp_path):
    _, content, found, _ = case
    id_of = {name: number for number, name in enumerate(names, 3)}
    dataset = GreyDataset(renumbered(content, id_of), tmp_path)
    json_file = dataset.json_file
    dataset = match_dataset(get_cfg(), dataset, CLASSES)
    metrics = evaluate(FakeModel(found), dataset.loader(), dataset, tmp_path, num_visualized=2)
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert {result["category_id"] for result in results} == set(id_of.values())
    for task in ("bbox", "segm"):
        left_out = "bbox" if task == "segm" else ""
        reduced = [{k: v for k, v in result.items() if k != left_out} for result in results]
        coco = COCO(str(json_file))
        theirs = COCOeval(coco, coco.loadRes(reduced), task)
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
        assert [metrics[task][name] for name in STATS] == pytest.approx(100 * theirs.stats[:6])
        assert 5 < metrics[task]["AP"] < 95


def test_the_oracle_does_not_depend_on_the_numbers_of_classes(case, tmp_path):
    _, content, _, _ = case
    model, transform = build(), Augmentation((96,), 128)
    original = evaluate_oracle(model, GreyDataset(content, tmp_path), transform)
    id_of = {"never": 1, "disc": 2, "bar": 3}
    dataset = match_dataset(get_cfg(), GreyDataset(renumbered(content, id_of), tmp_path), CLASSES)
    assert evaluate_oracle(model, dataset, transform) == original
    del id_of["bar"]
    dataset = match_dataset(get_cfg(), GreyDataset(renumbered(content, id_of), tmp_path), CLASSES)
    fewer = evaluate_oracle(model, dataset, transform)
    assert fewer["segm"]["AP-never"] == original["segm"]["AP-never"]
    assert "AP-bar" not in fewer["segm"]
