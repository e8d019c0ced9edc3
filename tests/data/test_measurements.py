"""Measurements of any annotations: a random sample, the forms of segmentations, no errors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_sets import diagnosed, random_set

from tensormask.data.checks.diagnosis import diagnose
from tensormask.data.checks.measurements import SAMPLE_SIZE, measure, segmentation_form


def test_alternating_entries_of_a_large_set_are_sampled(tmp_path):
    """A sample of every n-th annotation would see one of two alternating kinds only."""
    content = random_set(np.random.default_rng(0), 12, with_rle=False)
    entries = content["annotations"]
    content["annotations"] = [
        {**entries[i % 12], "id": i, "iscrowd": i % 2} for i in range(2 * SAMPLE_SIZE)
    ]
    (crowds,) = diagnosed(content, tmp_path).diagnoses
    assert 0.45 < int(crowds.detail.split()[0]) / SAMPLE_SIZE < 0.55


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
NUMBERS = st.floats(-30, 30) | st.integers(-9, 30) | st.floats() | st.integers()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"image_id": st.sampled_from([1, "1", 2]) | JSON},
            optional={
                "category_id": st.sampled_from([0, 1, 2, "a", "2"]) | JSON,
                "bbox": st.lists(NUMBERS, min_size=4, max_size=4) | JSON,
                "segmentation": st.lists(st.lists(NUMBERS, max_size=8), max_size=2) | JSON,
                **{"area": NUMBERS | JSON, "iscrowd": st.sampled_from([0, 1]) | JSON},
            },
        )
        | JSON,
        max_size=6,
    )
)
def test_any_annotations_are_diagnosed(entries):
    images = {1: {"id": 1, "file_name": "a.png", "height": 8, "width": 12}, 5: None}
    for diagnosis in diagnose(measure(entries, images, {1: "a", 2: None, 3: "c"})):
        assert len(str(diagnosis)) < 600


@pytest.mark.parametrize(
    "segmentation, form",
    [
        (None, "missing"),
        ([], "missing"),
        ({}, "missing"),
        ([[]], "other"),
        ([None], "other"),
        (7, "other"),
        ([[1, 2, 3, 4]], "polygons"),
        ([[1, 2], [3, 4]], "polygons"),  # too short for points, too
        ([[1, 2], [3, 4], [5, 6]], "points"),
        ([[[1, 2], [3, 4], [5, 6]]], "nested"),
        ([{"x": 1}], "objects"),
        ({"size": [1, 1]}, "objects"),
        ({"size": [1, 1], "counts": []}, "rle"),
        ("[[1, 2]]", "text"),
        (["1"], "text"),
        ([True], "other"),
    ],
)
def test_forms(segmentation, form):
    assert segmentation_form(segmentation) == form
