"""The synthetic data set: statistics, masks, determinism, complete files only."""

import json

import numpy as np
import pytest
from PIL import Image

from tensormask.data import CocoDataset, shapes

NUM_IMAGES = 100


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write_split("train", NUM_IMAGES, folder)
    return CocoDataset("shapes", folder / "annotations.json", folder / "images")


def test_it_is_a_valid_coco_data_set(dataset):
    assert len(dataset) == NUM_IMAGES
    assert dataset.class_names == list(shapes.CLASS_NAMES)
    for image_id in dataset.image_ids[:20]:
        image, annotations = dataset.load(image_id)
        assert image.shape == (128, 128, 3)
        assert image.dtype == np.uint8
        assert image.std() > 2
        assert 1 <= len(annotations) <= 5
    assert not dataset.issues


def test_masks_agree_with_boxes_and_areas_and_do_not_overlap(dataset):
    coco = dataset.to_coco()
    for image_id in dataset.image_ids:
        num_masks = np.zeros((128, 128), dtype=int)
        for annotation in dataset.annotations(image_id):
            mask = coco.annToMask(annotation)
            x0, y0, width, height = map(int, annotation["bbox"])
            assert mask.sum() == annotation["area"] >= shapes.MIN_VISIBLE_PIXELS
            assert mask[y0 : y0 + height, x0 : x0 + width].sum() == annotation["area"]
            assert mask[[y0, y0 + height - 1]].any(axis=1).all()
            assert mask[:, [x0, x0 + width - 1]].any(axis=0).all()
            num_masks += mask
        assert num_masks.max() == 1


def test_distribution_of_sizes_counts_and_classes(dataset):
    annotations = dataset.to_coco().dataset["annotations"]
    counts = [len(dataset.annotations(image_id)) for image_id in dataset.image_ids]
    assert 2.6 < np.mean(counts) < 3.2
    assert set(counts) == {1, 2, 3, 4, 5}
    per_class = np.bincount([annotation["category_id"] for annotation in annotations])[1:]
    assert per_class.min() > 0.6 * per_class.max()
    sides = np.array([max(annotation["bbox"][2:]) for annotation in annotations])
    assert sides.max() <= 111
    # Log-uniform in 8..110 has its quartiles at 15.4, 29.7 and 57.1; overlaps make objects smaller.
    np.testing.assert_allclose(np.quantile(sides, [0.25, 0.5, 0.75]), [15.4, 29.7, 57.1], rtol=0.15)
    forms = [type(annotation["segmentation"]) for annotation in annotations]
    assert min(forms.count(list), forms.count(dict)) > 0.2 * len(forms)


@pytest.mark.parametrize("name", shapes.CLASS_NAMES)
def test_outlines_fill_a_unit_box_around_the_origin(name):
    rng = np.random.default_rng(0)
    for _ in range(20):
        outline = shapes.unit_outlines(rng, name)[0]
        low, high = outline.min(axis=0), outline.max(axis=0)
        np.testing.assert_allclose(low, -high, atol=1e-12)
        assert (high - low).max() == pytest.approx(1)


@pytest.mark.parametrize("name", shapes.CLASS_NAMES)
def test_star_and_crescent_are_concave_and_the_ring_has_a_hole(name):
    outlines = shapes.unit_outlines(np.random.default_rng(1), name)
    edges = np.roll(outlines[0], -1, axis=0) - outlines[0]
    following = np.roll(edges, -1, axis=0)
    turns = np.sign(edges[:, 0] * following[:, 1] - edges[:, 1] * following[:, 0])
    assert (len(set(turns)) > 1) == (name in ("star", "crescent"))
    assert len(outlines) == (2 if name == "ring" else 1)


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="unknown shape 'blob'"):
        shapes.unit_outlines(np.random.default_rng(0), "blob")


def test_an_image_depends_only_on_split_and_index():
    first, objects = shapes.generate_image("val", 7)
    shapes.generate_image("val", 3)
    again, same_objects = shapes.generate_image("val", 7)
    np.testing.assert_array_equal(first, again)
    assert objects == same_objects
    assert not np.array_equal(first, shapes.generate_image("train", 7)[0])
    assert not np.array_equal(first, shapes.generate_image("val", 8)[0])


def test_images_have_not_changed():
    """The expected results of the quickstart were measured on images with these masks."""
    assert (shapes.NUM_IMAGES["train"], shapes.NUM_IMAGES["val"]) == (3000, 200)
    areas = [[a["area"] for a in shapes.generate_image("val", i)[1]] for i in range(4)]
    assert areas == [[865], [283, 1565, 731, 235, 503], [1323, 533, 680, 50], [446]]


@pytest.fixture
def small_split(monkeypatch):
    monkeypatch.setitem(shapes.NUM_IMAGES, "val", 2)


def test_only_the_complete_set_remains(tmp_path, small_split):
    json_file, image_root = shapes.ensure_shapes("val", tmp_path)
    assert json_file == tmp_path / "shapes" / "val" / "annotations.json"
    assert [path.name for path in (tmp_path / "shapes").iterdir()] == ["val"]
    assert sorted(path.name for path in image_root.iterdir()) == ["000001.png", "000002.png"]
    with Image.open(image_root / "000001.png") as image:
        np.testing.assert_array_equal(np.asarray(image), shapes.generate_image("val", 0)[0])
    assert len(json.loads(json_file.read_text())["images"]) == 2


def test_an_interrupted_generation_leaves_no_files(tmp_path, small_split, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(shapes.json, "dumps", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shapes.ensure_shapes("val", tmp_path)
    assert list((tmp_path / "shapes").iterdir()) == []
    shapes.ensure_shapes("val", tmp_path)


def test_the_set_of_a_faster_process_is_used(tmp_path, small_split, monkeypatch):
    write_split = shapes.write_split

    def slow(split, num_images, folder):
        write_split(split, num_images, folder)
        (tmp_path / "shapes" / "val").mkdir()
        (tmp_path / "shapes" / "val" / "mark").touch()

    monkeypatch.setattr(shapes, "write_split", slow)
    shapes.ensure_shapes("val", tmp_path)
    assert [path.name for path in (tmp_path / "shapes").iterdir()] == ["val"]
    assert (tmp_path / "shapes" / "val" / "mark").exists()
    shapes.ensure_shapes("val", tmp_path)  # exists: not generated again


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train"):
        shapes.ensure_shapes("test", tmp_path)


def test_rasterized_holes_are_holes():
    square = np.array([[2, 2], [12, 2], [12, 12], [2, 12]], dtype=float)
    hole = np.array([[5, 5], [9, 5], [9, 9], [5, 9]], dtype=float)
    mask = shapes._rasterize([square, hole], 128)
    assert mask.sum() == 10 * 10 - 4 * 4
    assert not mask[5:9, 5:9].any()


def test_larger_images_have_more_objects_of_the_same_sizes():
    """Each with its own seed; `train` and `val` are as before (the example of `generate_image`)."""
    images = [shapes.generate_image("512_train", index) for index in range(4)]
    assert {image.shape for image, _ in images} == {(512, 512, 3)}
    sides = [max(a["bbox"][2:]) for _, annotations in images for a in annotations]
    assert len(sides) > 12
    assert max(sides) <= 111
    np.testing.assert_array_equal(images[1][0], shapes.generate_image("512_train", 1)[0])
    assert (images[1][0] != shapes.generate_image("512_val", 1)[0]).mean() > 0.5
