"""Transforms against detectron2's mapper: a slow reimplementation, and results on photographs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_utils

from tensormask.data import CocoDataset
from tensormask.data.augmentation import resized_size
from tensormask.data.geometry import Geometry, transform_image
from tensormask.data.transforms import transform_annotations

SHARED = Path(__file__).resolve().parents[3] / "shared"
CASE = SHARED / "parity" / "cases" / "mapper.json"
PHOTOGRAPHS = SHARED / "data" / "coco_cc"

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
geometries = st.builds(Geometry, sizes, sizes, st.sampled_from(["horizontal", "vertical", "none"]))


def detectron2s_mapper(image, annotations, geometry):
    """Return pixels, boxes, masks and indices of the objects that are not empty.

    The steps are those of detectron2's DatasetMapper with bitmask masks: ResizeTransform,
    HFlipTransform or VFlipTransform, transform_instance_annotations, annotations_to_instances,
    filter_empty_instances.
    """
    (old_height, old_width), (height, width) = geometry.old_size, geometry.new_size

    def resized(array, method):
        return np.asarray(Image.fromarray(array).resize((width, height), method))

    def flipped(array):
        if geometry.flip == "none":
            return array
        return np.flip(array, axis=1 if geometry.flip == "horizontal" else 0)

    def coordinates(points):
        points = np.asarray(points).reshape(-1, 2).copy()
        points[:, 0] = points[:, 0] * (width * 1.0 / old_width)
        points[:, 1] = points[:, 1] * (height * 1.0 / old_height)
        if geometry.flip == "horizontal":
            points[:, 0] = width - points[:, 0]
        if geometry.flip == "vertical":
            points[:, 1] = height - points[:, 1]
        return points

    boxes, masks = [], []
    for one in annotations:
        box = torch.tensor(one["bbox"], dtype=torch.float32)
        box[2:] += box[:2]
        x0, y0, x1, y1 = box.tolist()
        corners = coordinates([x0, y0, x1, y0, x0, y1, x1, y1])
        box = np.concatenate([corners.min(axis=0), corners.max(axis=0)]).clip(min=0)
        boxes.append(np.minimum(box, [width, height, width, height]))
        if isinstance(one["segmentation"], dict):
            masks.append(flipped(resized(mask_utils.decode(one["segmentation"]), Image.NEAREST)))
        else:
            parts = [coordinates(polygon).reshape(-1) for polygon in one["segmentation"]]
            rle = mask_utils.merge(mask_utils.frPyObjects(parts, height, width))
            masks.append(mask_utils.decode(rle))
    boxes = torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32)
    masks = torch.tensor(np.array(masks).reshape(-1, height, width)).bool()
    nonempty = (boxes[:, 2:] - boxes[:, :2] > 1e-5).all(dim=1) & masks.flatten(1).any(dim=1)
    indices = nonempty.nonzero().flatten()
    return flipped(resized(image, Image.BILINEAR)), boxes[indices], masks[indices], indices


@st.composite
def scenes(draw):
    """An image, annotations in all forms, inside and outside of the image, and a geometry."""
    geometry = draw(geometries)
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    height, width = geometry.old_size
    annotations = []
    for form in draw(st.lists(st.sampled_from(["polygons", "bytes", "runs"]), max_size=4)):
        low = rng.uniform(-0.5, 1, 2) * (width, height)
        box = [*low, *rng.uniform(0, 1, 2) * (width, height)]
        if form == "polygons":
            # Up to one side outside of the image, on whole and half pixels.
            points = rng.uniform(-max(height, width), 2 * max(height, width), (3, 2, 4))
            segmentation = [np.round(part * 2).ravel() / 2 for part in points[: rng.integers(1, 4)]]
            if rng.random() < 0.3:
                segmentation = [part.astype(int) for part in segmentation]
            segmentation = [part.tolist() for part in segmentation]
        else:
            mask = rng.random((height, width)) < rng.choice([0.0, 0.02, 0.5, 1.0])
            segmentation = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
            if form == "runs":
                flat = np.concatenate([[0], mask.ravel(order="F").astype(int)])
                changes = np.flatnonzero(np.diff(flat))
                counts = np.diff(np.concatenate([[0], changes, [height * width]])).tolist()
                # Empty runs at the end are valid.
                counts += [0] * int(rng.integers(3))
                segmentation = {"size": [height, width], "counts": counts}
        annotations.append({"bbox": box, "segmentation": segmentation})
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, annotations, geometry


def decodable(one):
    """Return the annotation with a segmentation that `mask.decode` takes."""
    segmentation = one["segmentation"]
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
        segmentation = mask_utils.frPyObjects(segmentation, *segmentation["size"])
    return {**one, "segmentation": segmentation}


@settings(max_examples=80, deadline=None)
@given(scenes())
def test_bit_identical_to_the_slow_reimplementation(scene):
    image, annotations, geometry = scene
    decoded = [decodable(one) for one in annotations]
    pixels, boxes, masks, indices = detectron2s_mapper(image, decoded, geometry)
    target, _ = transform_annotations(annotations, range(len(annotations)), geometry)
    np.testing.assert_array_equal(transform_image(image, geometry), pixels)
    for key, expected in (("labels", indices), ("boxes", boxes), ("masks", masks)):
        torch.testing.assert_close(target[key], expected, rtol=0, atol=0)


@pytest.mark.skipif(
    not (CASE.exists() and PHOTOGRAPHS.exists()), reason="needs the parity cases of ../shared"
)
def test_equals_detectron2_on_photographs():
    dataset = CocoDataset("cc", PHOTOGRAPHS / "instances_train.json", PHOTOGRAPHS / "train")
    pixels = np.load(CASE.with_suffix(".npz"))
    cases = json.loads(CASE.read_text())
    assert len(cases) > 0
    for i, case in enumerate(cases):
        image, _ = dataset.load(case["image_id"])
        annotations = dataset.training_annotations(case["image_id"])
        size = resized_size(image.shape[:2], case["short"], case["long"])
        assert size == (case["height"], case["width"])
        geometry = Geometry(image.shape[:2], size, "horizontal" if case["flip"] else "none")
        resized = transform_image(image, geometry)[::8, ::8].astype(int)
        assert np.abs(resized - pixels[f"rgb{i}"]).max() <= 1
        labels = [dataset.label_of(a) for a in annotations]
        target, _ = transform_annotations(annotations, labels, geometry)
        assert target["labels"].tolist() == case["labels"]
        np.testing.assert_allclose(target["boxes"], case["boxes"], atol=1e-3)
        areas = target["masks"].flatten(1).sum(dim=1).numpy()
        expected = np.array(case["mask_areas"])
        assert (np.abs(areas - expected) <= np.maximum(3, 0.01 * expected)).all()
