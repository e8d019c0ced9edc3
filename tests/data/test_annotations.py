"""Checks of the entries of a COCO file: the valid part, and the issues."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils

from tensormask.data.checks.annotations import (
    as_id,
    check_annotation,
    check_box,
    check_categories,
    check_images,
    check_segmentation,
    find_id,
    is_trainable,
)
from tensormask.data.checks.issues import ISSUES, IssueLog

SIZE = (8, 12)
IMAGES = {5: {"id": 5, "file_name": "a.png", "height": 8, "width": 12}}
SQUARE = [2, 2, 6, 2, 6, 6, 2, 6]
VALID = {"id": 1, "image_id": 5, "category_id": 2, "bbox": [2, 2, 4, 4], "segmentation": [SQUARE]}


def check(annotation, number=0):
    """Return the valid part of an annotation, and the counts of its issues."""
    issues = IssueLog()
    checked = check_annotation(annotation, number, IMAGES, {2: "cup"}, issues)
    return checked, dict(issues.counts)


def test_valid_annotation():
    checked, issues = check({**VALID, "area": 16, "attributes": {"color": "red"}})
    assert issues == {}
    assert checked == {**VALID, "area": 16, "iscrowd": 0}
    assert is_trainable(checked, IMAGES[5])
    for value in (1, True, 1.0):
        crowd, issues = check({**VALID, "iscrowd": value})
        assert (crowd["iscrowd"], issues) == (1, {})
        assert not is_trainable(crowd, IMAGES[5])


def test_invalid_ids():
    for value in (None, True, "", 1.5, math.nan, math.inf, [1], {}, "\ud800"):
        assert as_id(value) is None


def test_an_annotation_without_id_is_named_by_its_index():
    annotation = {key: value for key, value in VALID.items() if key != "id"}
    assert check(annotation, number=3)[0]["id"] == "annotations[3]"


@pytest.mark.parametrize(
    "annotation, identity, reason",
    [
        (7, "annotations[0]", "not a JSON object"),
        ({**VALID, "image_id": 6}, 1, "unknown image_id 6"),
        ({**VALID, "image_id": [5]}, 1, "unknown image_id None"),
        ({**VALID, "category_id": "mug"}, 1, "unknown category_id 'mug'"),
    ],
)
def test_annotations_that_are_left_out(annotation, identity, reason):
    issues = IssueLog()
    assert check_annotation(annotation, 0, IMAGES, {2: "cup"}, issues) is None
    assert issues.line("annotation_malformed").endswith(f"Ids: {identity!r} ({reason})")


@pytest.mark.parametrize(
    "box, kind, reason",
    [
        ([2, 2, 4, 4], "", ""),
        ([-1, -1, 14, 10], "", ""),  # rounding
        ([-1.1, 0, 5, 5], "box_beyond", ""),
        ([0, 0, 12, 9.1], "box_beyond", ""),
        ([12, 0, 5, 5], "box_empty", "outside of the image"),
        ([-5, 0, 5, 5], "box_empty", "outside of the image"),
        ([2, 2, 0, 4], "box_empty", "width or height is 0"),
        ([2, 2, 4, -1], "box_malformed", "negative width or height"),
        ([2, 2, math.nan, 4], "box_malformed", "NaN or infinity"),
        ([2, 2, math.inf, 4], "box_malformed", "NaN or infinity"),
        ([2, 2, 4], "box_malformed", "not four numbers"),
        ([2, 2, 4, "4"], "box_malformed", "not four numbers"),
        ([2, 2, 4, 10**400], "box_malformed", "not four numbers"),
        ([2, 2, 4, 1e39], "box_malformed", "not four numbers"),  # infinite in 32 bits
        ([2, 2, 4, True], "box_malformed", "not four numbers"),
        ({"x": 2}, "box_malformed", "not four numbers"),
        (None, "box_malformed", "missing"),
    ],
)
def test_boxes(box, kind, reason):
    checked, issues = check_box(box, SIZE)
    assert issues == ([(kind, reason)] if kind else [])
    assert (checked is None) == (kind == "box_malformed")
    trainable = is_trainable(check({**VALID, "bbox": box})[0], IMAGES[5])
    assert trainable == (kind in ("", "box_beyond"))


@pytest.mark.parametrize(
    "segmentation, valid, kind, reason",
    [
        ([SQUARE, [1, 1, 2, 2], [3, 3]], [SQUARE], "polygon_malformed", "fewer than three points"),
        ([[1] * 4, [1] * 7], None, "polygon_malformed", "an x without a y, fewer than three"),
        # The brackets around a polygon are missing.
        (SQUARE, None, "polygon_malformed", "not a list of numbers"),
        ({"size": [8, 12], "counts": [0, 95]}, None, "mask_malformed", "add up to 95 pixels"),
        ({"size": [12, 8], "counts": [0, 96]}, None, "mask_malformed", "its image is [8, 12]"),
        ({}, None, "mask_malformed", "size and counts"),
        ("polygon", None, "mask_malformed", "a str"),
        ([], None, "mask_missing", ""),
        (None, None, "mask_missing", ""),
    ],
)
def test_invalid_segmentations(segmentation, valid, kind, reason):
    checked, issues = check_segmentation(segmentation, SIZE)
    assert checked == valid
    assert [name for name, _ in issues] == [kind]
    assert reason in issues[0][1]


def test_an_rle_is_compressed():
    expected = mask_utils.frPyObjects({"size": [8, 12], "counts": [10, 4, 82]}, 8, 12)
    checked = check_segmentation({"size": [8.0, 12], "counts": [10, 4, 82]}, SIZE)
    assert checked == (expected, [])
    assert check_segmentation(expected, SIZE) == (expected, [])


@pytest.mark.parametrize("value", ["0", "false", math.nan, [0], 2, -1, None])
def test_an_invalid_iscrowd_is_an_issue_and_read_as_0(value):
    checked, issues = check({**VALID, "iscrowd": value})
    assert (checked["iscrowd"], issues) == (0, {"iscrowd_malformed": 1})
    assert is_trainable(checked, IMAGES[5])


@pytest.mark.parametrize("area", ["16", math.nan, math.inf, -1, 1e11, 10**400, [16], True])
def test_an_invalid_area_is_an_issue_and_left_out(area):
    checked, issues = check({**VALID, "area": area})
    assert issues == {"area_malformed": 1}
    assert "area" not in checked
    assert is_trainable(checked, IMAGES[5])


def test_an_empty_rle_is_scored_and_not_trained_on():
    checked, issues = check({**VALID, "segmentation": {"size": [8, 12], "counts": [96]}})
    assert issues == {"mask_empty": 1}
    assert mask_utils.decode(checked["segmentation"]).sum() == 0
    assert not is_trainable(checked, IMAGES[5])


@pytest.mark.parametrize(
    "box, agrees",
    [
        ([2, 2, 4, 4], True),
        ([0, 0, 8, 8], True),  # 2 px on every side
        ([0, 0, 8.1, 8], False),
        ([2, 2, 9, 4], False),
        ([-20, 2, 26, 4], True),  # compared inside the image only; box_beyond is another issue
    ],
)
def test_agreement_of_box_and_mask(box, agrees):
    for segmentation in ([SQUARE], {"size": [8, 12], "counts": [18, 4, 4, 4, 4, 4, 4, 4, 50]}):
        checked, issues = check({**VALID, "bbox": box, "segmentation": segmentation})
        assert ("box_mask_disagree" not in issues) == agrees
        assert is_trainable(checked, IMAGES[5])


def test_the_spike_of_a_polygon_is_not_compared_with_the_box():
    spiked = [2, 2, 6, 2, 11.5, 2.05, 6, 2.1, 6, 6, 2, 6]
    for box in ([2, 2, 4, 4], [2, 2, 9.5, 4]):
        assert check({**VALID, "bbox": box, "segmentation": [spiked]})[1] == {}


def test_images():
    entry = IMAGES[5]
    issues = IssueLog()
    changes = [
        *({"license": 3}, {"file_name": "b.png"}, {"id": None}, {"id": 6, "width": 0}),
        *({"id": 7, "height": "8"}, {"id": 8, "width": 12.5}, {"id": 9, "file_name": ""}),
        *({"id": 10, "file_name": "a\0.png"}, {"id": 11, "file_name": ".."}),
        *({"id": 12, "width": 10**30}, {"id": 13, "width": 2**17 + 1}),
        *({"id": 14, "width": 2**17, "height": 2**12}, {"id": 15, "file_name": "\ud800.png"}),
    ]
    entries = [None, *(entry | change for change in changes)]
    assert check_images(entries, issues) == {5: None}  # a.png and b.png
    assert issues.counts == {"image_malformed": 12, "image_ambiguous_id": 1}
    assert issues.first_ids["image_malformed"] == ["images[0]", "images[3]", 6, 7, 8]


def test_categories():
    issues = IssueLog()
    entries = [{"id": 3, "name": "a"}, {"id": 3, "name": "b"}, {"id": 4}, {"name": "c"}, 5]
    entries += [{"id": 6, "name": "\ud800"}, {"id": 7, "name": "d"}, {"id": 7.0, "name": "d"}]
    assert check_categories(entries, issues) == {3: None, 7: "d"}
    assert issues.counts == {
        "category_malformed": 4,
        "category_ambiguous_id": 1,
        "category_duplicate_id": 1,
    }


@pytest.mark.parametrize(
    "value, known, expected",
    [
        ("12", {12}, (12, True)),
        (12, {"12"}, ("12", True)),
        ("12.0", {12}, (12, True)),
        ("0012", {12}, (12, True)),
        (12.0, {12}, (12, False)),
        ("12", {12, "12"}, ("12", False)),  # both types occur: they are different ids
        (12, {12, "12"}, (12, False)),
        (" 12", {12}, (12, True)),
        ("012", {12, "12"}, (None, False)),
        ("-3", {-3}, (-3, True)),
        ("12", {"012"}, (None, False)),
        ("1e1", {10}, (None, False)),
        ("\u0663", {3}, (None, False)),
        (True, {1}, (None, False)),
        (None, {0}, (None, False)),
    ],
)
def test_references_are_found_by_value(value, known, expected):
    assert find_id(value, known) == expected


# ---- arbitrary content ----

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)
NUMBERS = st.floats(-30, 30) | st.floats() | st.integers(-30, 30) | st.integers()
BOXES = st.lists(NUMBERS, min_size=4, max_size=4) | JSON
POLYGONS = st.lists(st.lists(NUMBERS, max_size=12), max_size=3)
RLES = st.fixed_dictionaries(
    {
        "size": st.sampled_from([[8, 12], [12, 8]]) | JSON,
        "counts": st.lists(st.integers(-3, 97), max_size=4) | st.text(max_size=9) | JSON,
    }
)


@settings(deadline=None, max_examples=120)
@given(
    st.fixed_dictionaries(
        {"image_id": st.just(5), "category_id": st.just(2)},
        optional={
            **{"id": JSON, "iscrowd": JSON, "area": JSON},
            **{"bbox": BOXES, "segmentation": POLYGONS | RLES | JSON},
        },
    )
)
def test_any_annotation_is_checked(annotation):
    checked, issues = check(annotation)
    assert set(issues) <= set(ISSUES)
    assert set(checked) - {"area"} == {*VALID, "iscrowd"}
    box, segmentation = checked["bbox"], checked["segmentation"]
    assert box is None or (len(box) == 4 and all(map(math.isfinite, box)))
    if isinstance(segmentation, list):
        segmentation = mask_utils.merge(mask_utils.frPyObjects(segmentation, *SIZE))
    if segmentation is not None:
        assert mask_utils.decode(segmentation).shape == SIZE
    # An object that cannot be trained on has an issue.
    if not checked["iscrowd"] and not is_trainable(checked, IMAGES[5]):
        assert issues


@settings(deadline=None, max_examples=50)
@given(JSON)
def test_any_entry_is_checked(entry):
    issues = IssueLog()
    assert check_images([entry], issues) == {}
    assert check_categories([entry], issues) == {}
    assert check_annotation(entry, 0, IMAGES, {2: "cup"}, issues) is None
    assert len(issues) == 3
