"""A model run over a data set: files, images, memory, and images that are skipped."""

import json
import logging
import math
import tracemalloc
import zipfile

import numpy as np
import pytest
from grey import (
    CATEGORY_IDS,
    FakeModel,
    GreyDataset,
    annotation,
    coco_json,
    detections,
    evaluate_found,
    noisy_case,
    rectangle,
)
from pycocotools import mask as rle_tools
from tiny import build, make_image
from torch import nn

from tensormask.evaluation import coco_results, evaluate, predictions, results_table
from tensormask.evaluation.submission import server_name


def test_no_detections_score_0(tmp_path):
    truth = [annotation(1, 1, 4, rectangle(10, 10, 30, 30))]
    dataset, out = GreyDataset(coco_json(truth), tmp_path), tmp_path / "out"
    results = evaluate_found({1: detections([], [], [])}, dataset, out, num_visualized=1)
    assert results["bbox"]["AP"] == results["segm"]["AP"] == 0
    assert results["segm"]["AP-disc"] == 0
    assert math.isnan(results["segm"]["AP-bar"])
    assert json.loads((out / "coco_instances_results.json").read_text()) == []


def test_set_without_annotations_is_written_but_not_scored(tmp_path, caplog):
    """The server's zip contains one file of the same name, with all results and COCO's ids."""
    images = coco_json([])
    del images["annotations"]
    dataset = GreyDataset(images, tmp_path, name="coco_2017_test-dev")
    found, out = {1: detections([rectangle(3, 4, 10, 12)], [1], [0.5])}, tmp_path / "out"
    with caplog.at_level(logging.WARNING, logger="tensormask"):
        assert evaluate_found(found, dataset, out, submission_name="R-50 6x/ours") == {}
    assert "no annotations" in caplog.text
    (result,) = json.loads((out / "coco_instances_results.json").read_text())
    code = rle_tools.encode(np.asfortranarray(rectangle(3, 4, 10, 12).astype(np.uint8)))
    assert result == {
        "image_id": 1,
        "category_id": 17,
        "bbox": [3, 4, 7, 8],
        "score": 0.5,
        "segmentation": {"size": [128, 160], "counts": code["counts"].decode()},
    }
    stem = "detections_test-dev2017_R-50-6x-ours_results"
    assert json.loads((out / f"{stem}.json").read_text()) == [result]
    with zipfile.ZipFile(out / f"{stem}.zip") as archive:
        assert archive.namelist() == [f"{stem}.json"]
        assert archive.read(f"{stem}.json") == (out / f"{stem}.json").read_bytes()
    assert evaluate_found(found, dataset) == {}


def test_names_of_test_sets():
    assert server_name("coco_2017_test-dev") == "test-dev2017"
    assert server_name("a/image_info_test-dev2017.json@b/test2017") == "test-dev2017"
    assert server_name("my set") == "my-set"


def test_model_without_masks_has_box_ap_only(tmp_path):
    mask, model = rectangle(10, 10, 30, 30), nn.Module()
    dataset = GreyDataset(coco_json([annotation(1, 1, 4, mask)]), tmp_path)
    found = detections([mask], [0], [0.5])
    del found["masks"]
    model.forward = lambda images, output_sizes: [found]
    results = evaluate(model, dataset.loader(), dataset, tmp_path / "out", num_visualized=1)
    assert list(results) == ["bbox"]
    assert results["bbox"]["AP"] == pytest.approx(100)


def test_modes_are_restored_even_after_an_error(tmp_path):
    dataset, found = noisy_case(tmp_path)
    model = FakeModel(found).train()
    model.frozen.eval()
    evaluate(model, dataset.loader(), dataset)
    modes = [module.training for module in model.modules()]  # of the model, frozen and tower
    assert modes == [True, False, True]
    model.detections = {}
    with pytest.raises(KeyError):
        evaluate(model, dataset.loader(), dataset)
    assert [module.training for module in model.modules()] == modes


def test_coco_results_round_trip_through_json():
    masks = [rectangle(3, 4, 10, 12) | rectangle(20, 4, 22, 6), rectangle(0, 0, 160, 128)]
    found = detections(masks, [2, 0], [0.875, 0.1])
    results = json.loads(json.dumps(coco_results(found, 7, CATEGORY_IDS)))
    assert [result["category_id"] for result in results] == [90, 4]
    assert [result["bbox"] for result in results] == [[3, 4, 19, 8], [0, 0, 160, 128]]
    assert results[0]["score"] == 0.875
    assert results[1]["score"] == float(np.float32(0.1))
    for result, mask in zip(results, masks, strict=True):
        assert result["image_id"] == 7
        assert np.array_equal(rle_tools.decode(result["segmentation"]), mask)


def test_images_are_written_for_evenly_spread_images(tmp_path):
    dataset, found = noisy_case(tmp_path)
    content = json.loads(dataset.json_file.read_text())
    content["images"][15]["file_name"] = "below/1.png"  # the name of another one, elsewhere
    dataset, out = GreyDataset(content, tmp_path), tmp_path / "out"
    evaluate_found(found, dataset, out, num_visualized=3)
    names = sorted(path.name for path in (out / "images").iterdir())
    assert names == ["1.png", "1_2.png", "9.png"]
    assert (out / "montage.png").stat().st_size > 1000


@pytest.mark.parametrize("annotated, threshold", [(True, 0.65), (False, 0.3)])
def test_images_show_the_scores_above_the_best_threshold(
    tmp_path, monkeypatch, annotated, threshold
):
    right, wrong = rectangle(10, 10, 30, 30), rectangle(60, 60, 90, 90)
    dataset = GreyDataset(coco_json([annotation(1, 1, 4, right)] if annotated else []), tmp_path)
    drawn = []
    monkeypatch.setattr(
        predictions, "draw_beside", lambda rgb, *args: drawn.append(args[2:]) or rgb.copy()
    )
    found = detections([right, wrong, wrong], [0, 0, 0], [0.7, 0.6, 0.2])
    evaluate_found({1: found}, dataset, tmp_path / "out", num_visualized=1)
    ((shown, title),) = drawn
    assert shown["scores"].tolist() == pytest.approx([s for s in (0.7, 0.6, 0.2) if s > threshold])
    assert title == pytest.approx(threshold)


def test_no_images_by_default_and_no_output_of_pycocotools(tmp_path, capsys):
    dataset, found = noisy_case(tmp_path)
    capsys.readouterr()
    evaluate_found(found, dataset, tmp_path / "out")
    assert capsys.readouterr().out == ""
    names = {path.name for path in (tmp_path / "out").iterdir()}
    results = {"coco_instances_results.json", "precision_recall.json", "evaluation.json"}
    assert names == results


def test_images_that_cannot_be_read_count_as_missed(tmp_path, caplog):
    truth = [annotation(i, i, 4, rectangle(10, 10, 30, 30)) for i in (1, 2)]
    dataset = GreyDataset(coco_json(truth, 2), tmp_path)
    found = {2: detections([rectangle(10, 10, 30, 30)], [0], [0.5])}
    (first,), (second,) = dataset.loader()
    broken = first | {"image": None}
    for samples in ([[broken], [second]], [[broken, second]]):
        results = evaluate(FakeModel(found), samples, dataset, tmp_path / "out", num_visualized=2)
        assert results["segm"]["AP"] == pytest.approx(100 * 51 / 101)  # recall 1/2
        assert "1 of 2 images of grey cannot be read" in caplog.text
        assert len(list((tmp_path / "out" / "images").iterdir())) == 1


def test_images_come_once(tmp_path, caplog):
    dataset = GreyDataset(coco_json([annotation(1, 1, 4, rectangle(1, 1, 9, 9))], 3), tmp_path)
    model = FakeModel({i: detections([], [], []) for i in (1, 2, 3)})
    samples = list(dataset.loader())
    evaluate(model, samples[:2], dataset)
    assert "1 of 3 images of grey did not come from the loader" in caplog.text
    assert "the first ids: 3" in caplog.text
    with pytest.raises(ValueError, match="image 2 twice"):
        evaluate(model, [*samples, samples[1]], dataset)
    with pytest.raises(ValueError, match="image 7"):
        evaluate(model, [[samples[0][0] | {"image_id": 7}]], dataset)


def test_a_tensormask_pastes_no_masks(tmp_path, monkeypatch):
    """Files, images and scores are as from `forward`; masks are pasted only to be drawn."""
    model = build("bipyramid", ["TEST.DETECTIONS_PER_IMAGE", 30])
    nn.init.normal_(model.head.cls_score.bias, -1.0, 0.5)
    pasting = nn.Module()
    pasting.model, pasting.forward = model, lambda *inputs, **options: model(*inputs, **options)
    truth = [annotation(i, i, 4, rectangle(10, 10, 60, 70)) for i in (1, 2, 3)]
    dataset = GreyDataset(coco_json(truth, 3), tmp_path)
    samples = [[s | {"image": make_image(64, 80, seed=s["image_id"])} for (s,) in dataset.loader()]]
    expected = evaluate(pasting, samples, dataset, tmp_path / "pasted", num_visualized=1)
    monkeypatch.setattr("tensormask.modeling.tensormask.paste_detection", None)
    results = evaluate(model, samples, dataset, tmp_path / "windows", num_visualized=1)
    assert results_table(results) == results_table(expected)
    for name in ("coco_instances_results.json", "images/1.png"):
        pasted, windows = (tmp_path / folder / name for folder in ("pasted", "windows"))
        assert windows.read_bytes() == pasted.read_bytes()
    written = json.loads((tmp_path / "windows" / "coco_instances_results.json").read_text())
    assert len(written) == 90
    assert any(rle_tools.area(result["segmentation"]) > 0 for result in written)


@pytest.mark.parametrize("with_folder", [True, False])
def test_memory_does_not_grow_with_the_images(tmp_path, with_folder):
    """8 images of 100 detections take more than 800 kB as dicts, which are not kept."""
    images = coco_json([], 12)
    del images["annotations"]  # scoring is slow here, and not measured
    dataset = GreyDataset(images, tmp_path)
    found = detections([rectangle(i, 0, i + 40, 128) for i in range(100)], [0] * 100, [0.5] * 100)
    held = []

    def forward(images, output_sizes):
        held.append(tracemalloc.get_traced_memory()[0])
        return [found]

    model = nn.Module()
    model.forward = forward
    tracemalloc.start()
    try:
        evaluate(model, dataset.loader(), dataset, tmp_path / "out" if with_folder else None)
    finally:
        tracemalloc.stop()
    assert len(held) == 12
    assert held[-1] - held[3] < 100_000
