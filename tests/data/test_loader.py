"""Loaders: batches as a function of (seed, iteration), resuming, grouping, filtering, errors."""

import itertools
import json
import logging
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from tensormask.config import get_cfg
from tensormask.data import build_test_loader, build_train_loader, get_dataset
from tensormask.data.catalog import fixed_datasets

# (height, width) of the images; the fourth has no objects, the fifth has only a crowd.
SIZES = [(20, 30), (30, 20), (24, 24), (20, 30), (20, 30), (18, 36), (36, 18), (20, 32)]


def square(image_id, annotation_id, **fields):
    corners = [4, 4, 12, 4, 12, 12, 4, 12]
    given = {"bbox": [4, 4, 8, 8], "segmentation": [corners], "area": 64, "iscrowd": 0}
    return {"id": annotation_id, "image_id": image_id, "category_id": 2, **given, **fields}


@pytest.fixture
def small_set(tmp_path):
    """The name of a data set of eight images and two classes."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for image_id, (height, width) in enumerate(SIZES, start=1):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{image_id}.png")
        size = {"height": height, "width": width}
        images.append({"id": image_id, "file_name": f"{image_id}.png", **size})
        if image_id != 4:
            annotations.append(square(image_id, image_id, iscrowd=int(image_id == 5)))
    categories = [{"id": 1, "name": "disc"}, {"id": 2, "name": "square"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "set.json").write_text(json.dumps(data))
    return f"{tmp_path}/set.json@{tmp_path}"


def make_cfg(*names, **overrides):
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            *("DATASETS.TRAIN", names, "SEED", 3, "SOLVER.IMS_PER_BATCH", 2),
            *("DATALOADER.NUM_WORKERS", 0, "MODEL.TENSOR_MASK.NUM_CLASSES", 2),
            *("INPUT.MIN_SIZE_TRAIN", (16, 32), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"),
        ]
    )
    cfg.merge_from_list([part for item in overrides.items() for part in item])
    return cfg


def take(cfg, count, start=0):
    return list(itertools.islice(build_train_loader(cfg, start), count))


def samples_of(batches):
    return list(itertools.chain.from_iterable(batches))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for sample, other in zip(samples_of(batches), samples_of(others), strict=True):
        assert sample.keys() == other.keys()
        assert torch.equal(sample["image"], other["image"])
        assert sample["file_name"] == other["file_name"]
        for key, value in sample["target"].items():
            assert torch.equal(value, other["target"][key])


def test_content_of_a_sample(small_set):
    sample = take(make_cfg(small_set), 1)[0][0]
    keys = {"image", "target", "dataset", "image_id", "file_name", "height", "width", "issues"}
    assert set(sample) == keys
    assert sample["issues"] == []
    assert sample["image"].dtype == torch.uint8
    height, width = sample["image"].shape[1:]
    assert 16 <= min(height, width) <= 32
    assert (sample["height"], sample["width"]) == SIZES[sample["image_id"] - 1]
    assert sample["file_name"].endswith(f"/{sample['image_id']}.png")
    target = sample["target"]
    assert target["labels"].tolist() == [1]  # the second category id
    assert target["masks"].shape == (1, height, width)
    x0, y0, x1, y1 = target["boxes"][0].round().int().tolist()
    assert target["masks"][0, y0:y1, x0:x1].float().mean() > 0.8


@pytest.mark.parametrize("grouping", [False, True])
def test_batches_are_independent_of_workers_and_resuming(small_set, grouping):
    overrides = {"DATALOADER.ASPECT_RATIO_GROUPING": grouping}
    batches = take(make_cfg(small_set, **overrides), 12)
    assert_same(batches, take(make_cfg(small_set, **overrides), 12))
    overrides["DATALOADER.NUM_WORKERS"] = 2
    assert_same(batches[5:], take(make_cfg(small_set, **overrides), 7, start=5))


AUGMENTATIONS = {
    "flips and rotations": {"INPUT.RANDOM_FLIP": "both", "INPUT.ROTATE_90": True},
    "jitter": {"INPUT.SCALE_JITTER": (0.5, 2.0), "INPUT.SCALE_JITTER_SIZE": (24, 32)},
    "crop": {"INPUT.CROP.ENABLED": True, "INPUT.CROP.SIZE": [0.5, 0.5]},
    "zoom-out": {"INPUT.ZOOM_OUT": 0.5},
    "colors": {"INPUT.PHOTOMETRIC": 0.5},
    "copy-paste": {"INPUT.COPY_PASTE": 0.7},
}
AUGMENTATIONS["all"] = {key: value for one in AUGMENTATIONS.values() for key, value in one.items()}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_depend_on_seed_and_position_only(small_set, name):
    overrides = AUGMENTATIONS[name]
    batches = take(make_cfg(small_set, **overrides), 12)
    plain = take(make_cfg(small_set), 12)
    with pytest.raises(AssertionError):
        assert_same(batches, plain)
    num_workers = {"DATALOADER.NUM_WORKERS": 1}
    assert_same(batches[5:], take(make_cfg(small_set, **overrides, **num_workers), 7, start=5))
    for sample, other in zip(samples_of(batches), samples_of(plain), strict=True):
        assert sample["image_id"] == other["image_id"]
        height, width = sample["image"].shape[1:]
        target = sample["target"]
        assert target["masks"].shape == (len(target["labels"]), height, width)
        assert target["masks"].any(dim=2).any(dim=1).all()
        assert (target["boxes"] >= 0).all()
        assert (target["boxes"][:, 2:] <= torch.tensor([width, height])).all()
        assert len(target["boxes"]) == len(target["labels"])
        if "INPUT.SCALE_JITTER" in overrides:
            assert (height, width) == (24, 32)


def test_objects_that_a_crop_hides_are_no_issues(small_set):
    crop = {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "absolute", "INPUT.CROP.SIZE": [4, 4]}
    samples = samples_of(take(make_cfg(small_set, **crop), 20))
    assert any(len(sample["target"]["labels"]) == 0 for sample in samples)
    assert not any(sample["issues"] for sample in samples)


def test_copy_paste_adds_objects_and_survives_a_broken_image(small_set, tmp_path):
    cfg = make_cfg(small_set, **{"INPUT.COPY_PASTE": 1.0})
    counts = Counter(len(sample["target"]["labels"]) for sample in samples_of(take(cfg, 30)))
    assert set(counts) == {1, 2}  # or 1 if the pasted object covers the other one
    for image_id in (1, 2, 6, 7, 8):
        (tmp_path / f"{image_id}.png").write_text("no image")
    samples = samples_of(take(cfg, 10))
    assert {sample["image_id"] for sample in samples} == {3}
    assert any(("image_broken" in issue) for sample in samples for issue in sample["issues"])


def test_images_of_a_rare_class_are_repeated(small_set, tmp_path, caplog):
    data = json.loads((tmp_path / "set.json").read_text())
    data["annotations"][0]["category_id"] = 1  # in 1 of the 6 images with objects
    (tmp_path / "rare.json").write_text(json.dumps(data))
    rare = {
        "DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler",
        "DATALOADER.REPEAT_THRESHOLD": 2 / 3,  # 4 times its share
    }
    cfg = make_cfg(f"{tmp_path}/rare.json@{tmp_path}", **rare)
    with caplog.at_level(logging.INFO, logger="tensormask"):
        samples = samples_of(take(cfg, 70))
    assert "1 of 6 images are repeated for their rare classes, up to 2.0 times" in caplog.text
    assert Counter(s["image_id"] for s in samples) == {1: 40, 2: 20, 3: 20, 6: 20, 7: 20, 8: 20}
    assert_same(take(cfg, 5, start=40), take(cfg, 45)[40:])
    cfg.merge_from_list(["DATALOADER.REPEAT_SQRT", False])
    shown = Counter(sample["image_id"] for sample in samples_of(take(cfg, 45)))
    assert shown == {1: 40, 2: 10, 3: 10, 6: 10, 7: 10, 8: 10}


@pytest.mark.parametrize(
    "key, value", [("SAMPLER_TRAIN", "RandomSubset"), ("REPEAT_THRESHOLD", -1.0)]
)
def test_invalid_samplers_are_refused(small_set, key, value):
    with pytest.raises(ValueError, match=f"DATALOADER.{key} is "):
        take(make_cfg(small_set, **{f"DATALOADER.{key}": value}), 1)


def test_the_global_random_state_is_neither_read_nor_changed(small_set):
    batches = take(make_cfg(small_set), 3)
    torch.manual_seed(123)
    np.random.seed(5)  # noqa: NPY002 - the legacy state is tested
    before = torch.get_rng_state()
    assert_same(batches, take(make_cfg(small_set), 3))
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_give_different_orders(small_set):
    first = [s["image_id"] for batch in take(make_cfg(small_set), 8) for s in batch]
    other = [s["image_id"] for batch in take(make_cfg(small_set, SEED=4), 8) for s in batch]
    assert first != other


def test_augmentation_differs_between_epochs(small_set):
    samples = samples_of(take(make_cfg(small_set), 30))
    shapes = {tuple(s["image"].shape) for s in samples if s["image_id"] == 3}
    assert len(shapes) > 3


@pytest.mark.parametrize("filter_empty", [True, False])
def test_images_without_objects(small_set, filter_empty, caplog):
    overrides = {"DATALOADER.FILTER_EMPTY_ANNOTATIONS": filter_empty}
    with caplog.at_level(logging.INFO, logger="tensormask"):
        samples = samples_of(take(make_cfg(small_set, **overrides), 12))
    shown = {sample["image_id"] for sample in samples}
    assert shown == ({1, 2, 3, 6, 7, 8} if filter_empty else set(range(1, 9)))
    assert f"{6 if filter_empty else 8} of 8 images" in caplog.text
    assert "crowds: 1" in caplog.text
    for sample in samples:
        expected = 0 if sample["image_id"] in (4, 5) else 1
        assert len(sample["target"]["labels"]) == expected


def test_objects_that_are_too_small_are_reported(small_set):
    cfg = make_cfg(small_set, **{"INPUT.MIN_SIZE_TRAIN": (1, 1)})
    samples = samples_of(take(cfg, 6))
    assert any(len(sample["target"]["labels"]) == 0 for sample in samples)
    for sample in samples:
        lost = len(sample["target"]["labels"]) == 0
        issue = (small_set, "object_too_small", sample["image_id"])  # image id = annotation id
        assert sample["issues"] == ([issue] if lost else [])


@pytest.mark.parametrize("num_workers", [0, 2])
@fixed_datasets()
def test_an_image_that_cannot_be_read_is_replaced(small_set, tmp_path, num_workers):
    originals = samples_of(take(make_cfg(small_set), 40))
    (tmp_path / "2.png").write_text("no image")
    (tmp_path / "3.png").unlink()  # after the set was read, as if deleted during training
    cfg = make_cfg(small_set, **{"DATALOADER.NUM_WORKERS": num_workers})
    samples = samples_of(take(cfg, 40))
    replacements = Counter()
    for sample, before in zip(samples, originals, strict=True):
        kinds = {2: "image_broken", 3: "image_missing"}
        if before["image_id"] in kinds:
            assert sample["issues"][0] == (small_set, kinds[before["image_id"]], before["image_id"])
            replacements[sample["image_id"]] += 1
        else:
            assert sample["issues"] == []
            assert sample["image_id"] == before["image_id"]
            assert torch.equal(sample["image"], before["image"])
    assert set(replacements) == {1, 6, 7, 8}  # all others
    assert_same([samples[20:]], [samples_of(take(cfg, 30, start=10))])


def test_the_sample_is_given_up_if_no_image_can_be_read(small_set, tmp_path):
    loader = build_train_loader(make_cfg(small_set))
    for path in tmp_path.glob("*.png"):
        path.write_text("no image")
    sample = next(loader)[0]
    assert sample["image"] is None
    assert len(sample["issues"]) == 101


def test_a_test_image_that_cannot_be_read(small_set, tmp_path):
    (tmp_path / "2.png").write_text("no image")
    dataset = get_dataset(small_set)
    samples = samples_of(build_test_loader(make_cfg(), dataset))
    assert [s["image_id"] for s in samples if s["image"] is None] == [2]
    assert samples[1]["issues"] == [(small_set, "image_broken", 2)]
    assert [s["issues"] for s in samples if s["image_id"] != 2] == [[]] * 7


def test_a_missing_image_is_never_loaded(small_set, tmp_path):
    (tmp_path / "2.png").unlink()
    samples = samples_of(take(make_cfg(small_set), 20))
    assert {sample["image_id"] for sample in samples} == {1, 3, 6, 7, 8}
    assert all(sample["issues"] == [] for sample in samples)


def test_a_set_without_a_valid_annotation_is_refused(small_set, tmp_path):
    data = json.loads((tmp_path / "set.json").read_text())
    for annotation in data["annotations"]:
        annotation["image_id"] = 99
    (tmp_path / "set.json").write_text(json.dumps(data))
    message = r"(?s)no annotation is valid.*annotation_malformed.*unknown image_id 99"
    with pytest.raises(ValueError, match=message):
        build_test_loader(make_cfg(), get_dataset(small_set))
    (tmp_path / "info.json").write_text(json.dumps({**data, "annotations": []}))
    assert len(build_test_loader(make_cfg(), get_dataset(f"{tmp_path}/info.json@{tmp_path}"))) == 8


def test_strict_refuses_known_issues(small_set, tmp_path):
    (tmp_path / "2.png").unlink()
    strict = make_cfg(small_set, **{"DATASETS.STRICT": True})
    for build in (build_train_loader, lambda cfg: build_test_loader(cfg, get_dataset(small_set))):
        with pytest.raises(ValueError, match=r"(?s)has issues.*image_missing.*Ids: 2"):
            build(strict)


def test_several_sets_are_joined(small_set, tmp_path):
    data = json.loads((tmp_path / "set.json").read_text())
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.json").write_text(json.dumps(data))
    other = f"{tmp_path}/sub/other.json@{tmp_path}"
    samples = samples_of(take(make_cfg(small_set, other), 6))
    assert Counter(s["image_id"] for s in samples) == dict.fromkeys([1, 2, 3, 6, 7, 8], 2)

    data["categories"][0]["name"] = "ring"
    (tmp_path / "sub" / "third.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="different classes"):
        build_train_loader(make_cfg(small_set, f"{tmp_path}/sub/third.json@{tmp_path}"))


def test_batches_hold_one_orientation(small_set):
    cfg = make_cfg(small_set, **{"DATALOADER.ASPECT_RATIO_GROUPING": True})
    for batch in take(cfg, 12):
        assert len({sample["width"] > sample["height"] for sample in batch}) == 1


def test_test_loader(small_set):
    sizes = {"INPUT.MIN_SIZE_TEST": 40, "INPUT.MAX_SIZE_TEST": 60}
    cfg = make_cfg(**sizes, **{"DATALOADER.NUM_WORKERS": 2})
    loader = build_test_loader(cfg, get_dataset(small_set))
    batches = list(loader)
    assert len(loader) == len(batches) == 8
    assert [batch[0]["image_id"] for batch in batches] == list(range(1, 9))
    for (sample,), size in zip(batches, SIZES, strict=True):
        assert "target" not in sample
        assert (sample["height"], sample["width"]) == size
    assert batches[0][0]["image"].shape == (3, 40, 60)
    assert batches[5][0]["image"].shape == (3, 30, 60)


def test_the_number_of_classes_is_checked(small_set):
    cfg = make_cfg(small_set, **{"MODEL.TENSOR_MASK.NUM_CLASSES": 80})
    for build in (build_train_loader, lambda cfg: build_test_loader(cfg, get_dataset(small_set))):
        with pytest.raises(ValueError, match=r"override: MODEL\.TENSOR_MASK\.NUM_CLASSES 2"):
            build(cfg)


def test_invalid_configs_are_refused(small_set, tmp_path):
    for key in ("SOLVER.IMS_PER_BATCH", "SOLVER.ACCUMULATE_STEPS"):
        with pytest.raises(ValueError, match=rf"{key} is 0; it must be 1 or more"):
            build_train_loader(make_cfg(small_set, **{key: 0}))
    for key in ("DATALOADER.NUM_WORKERS", "DATALOADER.TIMEOUT"):
        with pytest.raises(ValueError, match=rf"{key} is -1; it must be 0 or more"):
            build_train_loader(make_cfg(small_set, **{key: -1}))
    with pytest.raises(ValueError, match="SEED is -1"):
        build_train_loader(make_cfg(small_set, SEED=-1))
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN is empty"):
        build_train_loader(make_cfg())
    data = json.loads((tmp_path / "set.json").read_text())
    (tmp_path / "empty.json").write_text(json.dumps({**data, "annotations": []}))
    with pytest.raises(ValueError, match="can be trained on: none has"):
        build_train_loader(make_cfg(f"{tmp_path}/empty.json@{tmp_path}"))
