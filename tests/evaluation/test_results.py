"""Results from tensors to files: codes of regions, the writer, and invalid results."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO

from tensormask.evaluation import coco_results, evaluate_results
from tensormask.evaluation.results import ResultsWriter, encode_mask, encode_region, read_results
from tensormask.layers import paste_masks


@st.composite
def regions(draw):
    """A region anywhere in an image: at the border, as high as the image, or empty."""
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    region_height = draw(st.one_of(st.just(height), st.integers(0, height)))
    region_width = draw(st.integers(0, width))
    x0 = draw(st.integers(0, width - region_width))
    y0 = draw(st.integers(0, height - region_height))
    fill = st.one_of(st.booleans(), st.just(draw(st.booleans())))
    region = draw(arrays(bool, (region_height, region_width), elements=fill))
    return torch.from_numpy(region), x0, y0, (height, width)


@given(regions())
def test_codes_of_regions_are_those_of_the_whole_mask(case) -> None:
    region, x0, y0, size = case
    mask = torch.zeros(size, dtype=torch.bool)
    mask[y0 : y0 + region.shape[0], x0 : x0 + region.shape[1]] = region
    expected = rle_tools.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    found = encode_region(region, x0, y0, size)
    assert found == {"size": expected["size"], "counts": expected["counts"].decode()}
    assert found == encode_mask(mask)


@pytest.mark.parametrize(
    "region, x0, y0, counts",
    [
        ([[1, 1], [1, 0]], 1, 1, [5, 2, 2, 1, 6]),
        ([[1], [1], [1], [1]], 0, 0, [0, 4, 12]),
        ([[1, 1], [1, 1], [1, 1], [1, 1]], 2, 0, [8, 8]),  # one run over two columns, to the end
        ([[0, 0]], 2, 3, [16]),
    ],
)
def test_codes_by_hand(region, x0, y0, counts) -> None:
    found = encode_region(torch.tensor(region).bool(), x0, y0, (4, 4))
    expected = rle_tools.frPyObjects({"size": [4, 4], "counts": counts}, 4, 4)
    assert found["counts"] == expected["counts"].decode()


def in_windows():
    """Random detections with 12 masks of several sizes in windows that may leave the image."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(12, 2, generator=generator) * 80 - 20
    return {
        "boxes": torch.rand(12, 4, generator=generator).cumsum(1),
        "scores": torch.rand(12, generator=generator),
        "labels": torch.zeros(12, dtype=torch.int64),
        "windows": torch.cat([corner, corner + torch.rand(12, 2, generator=generator) * 90], 1),
        "window_masks": [torch.rand(3 + i, 3 + i, generator=generator) for i in range(12)],
    }


def test_masks_in_windows_have_the_code_of_pasted_masks() -> None:
    size, found = (48, 64), in_windows()
    masks = paste_masks(found["window_masks"], found["windows"], size)
    assert 0 < masks.float().mean() < 1
    pasted = {key: found[key] for key in ("boxes", "scores", "labels")} | {"masks": masks}
    assert coco_results(found, 3, [7], size) == coco_results(pasted, 3, [7], size)
    with pytest.raises(ValueError, match="size"):
        coco_results(found, 3, [7])


@pytest.mark.parametrize(
    "key, value, message",
    [
        # pycocotools sets their IoU to -1: all objects would count as missed.
        ("masks", torch.zeros(12, 64, 48, dtype=torch.bool), "masks of shape"),
        ("boxes", torch.full((12, 4), torch.nan), r"image 3.*NaN or infinity"),
        ("scores", torch.tensor([0.5] * 11 + [torch.inf]), r"image 3.*NaN or infinity"),
        ("labels", torch.tensor([0] * 11 + [1]), r"image 3.*1 categories.*NUM_CLASSES"),
        ("labels", torch.tensor([0] * 11 + [-1]), r"image 3.*1 categories.*NUM_CLASSES"),
    ],
)
def test_invalid_detections_are_refused(key, value, message) -> None:
    with pytest.raises(ValueError, match=message):
        coco_results(in_windows() | {key: value}, 3, [7], (48, 64))


def test_results_go_through_a_file(tmp_path) -> None:
    path = tmp_path / "results.json"
    results = [{"image_id": "ä\n{", "score": 0.1}, {"image_id": 2}, {"image_id": 3}]
    with ResultsWriter(path) as writer:
        writer.add(results[:1])
        writer.add([])
        writer.add(results[1:])
        assert not path.exists()
    assert writer.num_results == 3
    assert json.loads(path.read_text()) == results
    assert list(read_results(path)) == results
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_an_error_does_not_change_an_older_file(tmp_path) -> None:
    path = tmp_path / "results.json"
    path.write_text("before")
    with pytest.raises(TypeError), ResultsWriter(path) as writer:
        writer.add([{"score": 0.5}, {"score": object()}])
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def ground_truth(**changes) -> COCO:
    """One image of 4 x 5 pixels (height x width) with one object."""
    coco = COCO()
    annotation = {"id": 1, "image_id": 1, "category_id": 0, "bbox": [0, 0, 5, 4], "area": 20}
    annotation |= {"iscrowd": 0, "segmentation": {"size": [4, 5], "counts": [0, 20]}}
    coco.dataset = {
        "images": [{"id": 1, "height": 4, "width": 5}],
        "categories": [{"id": 0, "name": "zero"}],
        "annotations": [annotation | changes],
    }
    coco.createIndex()
    return coco


RESULT = {"image_id": 1, "category_id": 0, "bbox": [0, 0, 5, 4], "score": 0.5}
RESULT["segmentation"] = {"size": [4, 5], "counts": "0d0"}
INVALID_CODES = [
    {"size": [4, 5], "counts": "0d1"},
    {"size": [4, 5], "counts": b"XX"},
    {"size": [5, 4], "counts": "0d0"},
    {"size": [4, 5], "counts": [0, 21]},
    {"size": [4, 5], "counts": [30, -10]},
    {"size": [4, 5]},
    "0d0",
]


def test_results_of_a_hand_made_file() -> None:
    """Codes of all formats, in results and annotations, and the category 0."""
    for counts in ("0d0", b"0d0", [0, 20]):
        code = {"size": [4, 5], "counts": counts}
        result = RESULT | {"segmentation": dict(code)}
        before = copy.deepcopy(result)
        metrics = evaluate_results(ground_truth(segmentation=code), [result], ["zero"])
        assert metrics["bbox"]["AP"] == metrics["segm"]["AP"] == pytest.approx(100)
        assert result == before


@pytest.mark.parametrize("code", INVALID_CODES)
def test_invalid_codes_of_results_do_not_reach_pycocotools(code) -> None:
    with pytest.raises(ValueError, match="result 1, of image 1"):
        evaluate_results(ground_truth(), [RESULT, RESULT | {"segmentation": code}], ["zero"])


@pytest.mark.parametrize("code", INVALID_CODES[:5])
def test_invalid_codes_of_annotations_do_not_reach_pycocotools(code) -> None:
    with pytest.raises(ValueError, match="annotation 1 of the ground truth"):
        evaluate_results(ground_truth(segmentation=code), [RESULT], ["zero"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"score": float("nan")}, "score must be a finite number"),
        ({"score": "0.5"}, "score must be a finite number"),
        ({"bbox": [0, 0, float("nan"), 4]}, "four finite numbers"),
        ({"bbox": [0, 0, 5]}, "four finite numbers"),
        ({"bbox": None}, "four finite numbers"),
    ],
)
def test_results_that_cannot_be_scored_are_refused(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_results(ground_truth(), [RESULT | change], ["zero"])


def test_results_of_unknown_categories_are_counted(caplog) -> None:
    results = [RESULT, RESULT | {"category_id": 5}, RESULT | {"category_id": "0"}]
    with caplog.at_level(logging.WARNING, logger="tensormask"):
        metrics = evaluate_results(ground_truth(), results, ["zero"])
    assert "2 of 3 results do not count" in caplog.text
    assert metrics["segm"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_ids": [2]}, "no images with the ids"),
        ({"category_ids": [1]}, "no categories with the ids"),
        ({"max_dets": 0}, "must be 1 or more"),
        ({"iou_types": ["keypoints"]}, r"not \['keypoints'\]"),
        ({"class_names": ["zero", "one"]}, "2 class names for 1"),
        ({"results": [RESULT | {"image_id": "1"}]}, r"ids \['1'\]"),
        ({"results": [{k: RESULT[k] for k in RESULT if k != "segmentation"}]}, "needs a 'segm"),
    ],
)
def test_other_arguments_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_results(ground_truth(), **{"results": [], "class_names": ["zero"]} | options)


def test_incomplete_results_are_refused() -> None:
    with pytest.raises(ValueError, match="result 0 has no category_id, score"):
        evaluate_results(ground_truth(), [{"image_id": 1}], ["zero"])


def test_annotations_with_invalid_values() -> None:
    """Invalid boxes and areas, and a flag that is not a number."""
    for changes in (
        {"bbox": None},
        {"area": None},
        {"area": float("nan")},
        {"area": 10**400},
        {"iscrowd": None},
    ):
        metrics = evaluate_results(ground_truth(**changes), [RESULT], ["zero"])
        assert metrics["bbox"]["AP"] == metrics["segm"]["AP"] == pytest.approx(100), changes
