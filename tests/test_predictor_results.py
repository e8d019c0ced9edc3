"""`Predictor` with a real, tiny model: the numbers of evaluation, threads, tensors, 16 bits."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import tiny
import torch
from bright import same
from PIL import Image

from tensormask.data import IssueReporter
from tensormask.data.coco import CocoDataset
from tensormask.data.samples import TestSet
from tensormask.engine.evaluator import evaluate_all
from tensormask.evaluation.coco import RESULTS_FILE, evaluate
from tensormask.predictor import Predictor

OPTIONS = ["INPUT.MIN_SIZE_TEST", 64, "TEST.DETECTIONS_PER_IMAGE", 5]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A predictor with a tiny model."""
    path = tmp_path_factory.mktemp("real") / "model.pth"
    cfg = tiny.get_cfg(opts=OPTIONS)
    model = tiny.with_detections(tiny.build())
    torch.save({"model": model.state_dict(), "config": cfg.dump()}, path)
    return Predictor(path, device="cpu")


@pytest.fixture(scope="module")
def images():
    return [
        tiny.make_image(*size, seed).permute(1, 2, 0).numpy()
        for seed, size in enumerate([(40, 50), (41, 50), (50, 40), (40, 50)])
    ]


def test_numbers_of_evaluation(tmp_path, real, images):
    entries = {"images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 50}]}
    entries |= {"categories": [{"id": 4 + n, "name": str(n)} for n in range(3)], "annotations": []}
    (tmp_path / "a.json").write_text(json.dumps(entries))
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    dataset = CocoDataset("a", tmp_path / "a.json", tmp_path)
    loader = [[TestSet(dataset, real.transform)[0]]]
    dataset.has_annotations = False
    evaluate(real.model, loader, dataset, tmp_path / "out")
    expected = json.loads((tmp_path / "out" / RESULTS_FILE).read_text())
    found = real(tmp_path / "a.png")
    found.category_ids = dataset.category_ids
    assert found.num_detections == 5
    assert found.to_coco(1) == expected


def test_numbers_of_evaluation_with_test_time_augmentation(tmp_path, real, images):
    """Both detect in all sizes."""
    names = ["0", "1", "2"]
    entries = {"images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 50}]}
    entries |= {"categories": [{"id": n, "name": name} for n, name in enumerate(names, start=1)]}
    entries["annotations"] = []
    (tmp_path / "a.json").write_text(json.dumps(entries))
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    options = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (48, 64)]
    options += ["DATALOADER.NUM_WORKERS", 0]
    options += ["DATASETS.TEST", (f"{tmp_path / 'a.json'}@{tmp_path}",), *OPTIONS]
    model, cfg = tiny.with_detections(tiny.build()), tiny.get_cfg(opts=options)
    model.num_detections = 5
    torch.save({"model": model.state_dict(), "config": cfg.dump()}, tmp_path / "model.pth")
    evaluate_all(cfg, model, tmp_path, IssueReporter({}, strict=False))
    expected = json.loads((tmp_path / "inference" / RESULTS_FILE).read_text())
    found = Predictor(tmp_path / "model.pth", device="cpu")(tmp_path / "a.png")
    assert found.num_detections == 5
    assert found.to_coco(1) == expected
    assert not torch.equal(found["boxes"], real(images[0])["boxes"])


def test_results_of_a_list_and_of_threads(real, images):
    single = [real(image) for image in images]
    with ThreadPoolExecutor(3) as pool:
        kept = list(pool.map(lambda n: real(images[0], max_detections=n), (1, 3, 2)))
    assert [found.num_detections for found in kept] == [1, 3, 2]
    for found, expected in zip(real(images), single, strict=True):
        assert torch.equal(found["labels"], expected["labels"])
        for key in ("boxes", "scores"):
            torch.testing.assert_close(found[key], expected[key])
        assert (found["masks"] != expected["masks"]).float().mean() < 0.001


def test_results_are_ordinary_tensors(real, images):
    """They can be changed in place and take part in training; of one image and of several."""
    found = real(images[0], threshold=0.1)
    nothing = real(images[0], threshold=0.999)
    assert nothing.num_detections == 0
    for result in (found, nothing, *real(images[:2]), *real(iter(images[:1])), found.select(0)):
        for key in ("boxes", "scores", "labels", "masks"):
            assert not result[key].is_inference()
            assert not result[key].requires_grad
            result[key][:1] = 0
        result["boxes"][:, 2:] -= result["boxes"][:, :2]
        (result["scores"] * torch.ones(1, requires_grad=True)).sum().backward()
    assert repr(pickle.loads(pickle.dumps(found))) == repr(found)


def test_a_file_of_16_bits_is_detected_as_its_pil_image_and_its_array(tmp_path, real, images):
    """In an evaluation too."""
    values = images[0].astype(np.uint16) * 16
    path = tmp_path / "a.png"
    assert cv2.imwrite(str(path), values[..., ::-1])
    entries = {"images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 50}]}
    entries |= {"categories": [{"id": 1, "name": "a"}], "annotations": []}
    (tmp_path / "a.json").write_text(json.dumps(entries))
    dataset = CocoDataset("a", tmp_path / "a.json", tmp_path)
    expected = real(path)
    assert expected.num_detections == 5
    np.testing.assert_array_equal(dataset.load(1)[0], expected.image)
    with Image.open(path) as image:
        for given in (image, values, torch.from_numpy(values).permute(2, 0, 1)):
            assert same(real(given), expected)


# ---- docs/predict.md ----
