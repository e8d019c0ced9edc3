"""Ids that name several images or categories: what refers to them is left out."""

import json
from itertools import chain

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensormask.data import CocoDataset
from tensormask.utils.errors import UserError

BOX = {"bbox": [2, 2, 4, 4], "segmentation": [[2, 2, 6, 2, 6, 6, 2, 6]]}


def write(folder, images, categories, annotations):
    content = {
        "images": [{"height": 8, "width": 12, **image} for image in images],
        "categories": categories,
        "annotations": [{"id": i, **BOX, **a} for i, a in enumerate(annotations)],
    }
    (folder / "a.json").write_text(json.dumps(content))
    return CocoDataset("a", folder / "a.json", folder)


def export(folder, num_images, num_categories, first=1):
    """A file as a tool writes it: ids from `first`, one object of each category an image."""
    ids, labels = range(first, first + num_images), range(first, first + num_categories)
    return (
        [{"id": i, "file_name": f"{folder}/{i}.png"} for i in ids],
        [{"id": c, "name": f"{folder}{c}"} for c in labels],
        [{"image_id": i, "category_id": c} for i in ids for c in labels],
    )


def join(*parts):
    return [list(chain(*lists)) for lists in zip(*parts, strict=True)]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(*[st.integers(1, 6)] * 2, st.integers(1, 3), st.integers(0, 12), st.booleans())
def test_files_that_were_joined_without_new_ids(
    tmp_path, num_first, num_second, num_classes, offset, as_text
):
    """Whatever overlaps is left out, and the rest keeps its own image, whatever the overlap."""
    images, categories, annotations = export("a", num_first, num_classes)
    more_images, _, more = export("b", num_second, num_classes, 1 + offset)
    for annotation in more:
        annotation["category_id"] -= offset
    if as_text:  # ids of another type are other ids
        more_images = [image | {"id": str(image["id"])} for image in more_images]
        more = [a | {"image_id": str(a["image_id"])} for a in more]
    file_of = {}
    for image in images + more_images:
        file_of.setdefault(image["id"], []).append(image["file_name"])
    shared = {identity for identity, files in file_of.items() if len(files) > 1}
    joined = (images + more_images, categories, annotations + more)
    num_ambiguous = sum(a["image_id"] in shared for a in annotations + more)
    if 2 * num_ambiguous > len(annotations + more):
        with pytest.raises(UserError, match="joined without new ids"):
            write(tmp_path, *joined)
        return
    dataset = write(tmp_path, *joined)
    assert dataset.issues.counts["annotation_ambiguous"] == num_ambiguous
    assert dataset.issues.counts["image_ambiguous_id"] == len(shared)
    assert set(dataset.image_ids) == file_of.keys() - shared
    for identity in dataset.image_ids:
        assert dataset.image(identity)["file_name"] == file_of[identity][0]
        assert len(dataset.annotations(identity)) == num_classes
    assert dataset.num_annotations == len(annotations + more) - num_ambiguous


@pytest.mark.parametrize(
    "changes, counts, ids",
    [
        ([{}], {"image_duplicate_id": 1}, [1, 2, 3]),
        ([{}, {}], {"image_duplicate_id": 2}, [1, 2, 3]),
        ([{"license": 4}], {"image_duplicate_id": 1}, [1, 2, 3]),
        ([{"file_name": "./a/1.png"}], {"image_duplicate_id": 1}, [1, 2, 3]),
        ([{"id": 1.0}], {"image_duplicate_id": 1}, [1, 2, 3]),
        ([{"file_name": "b/1.png"}], {"image_ambiguous_id": 1}, [2, 3]),
        (
            [{"file_name": "b/1.png", "width": None}],
            {"image_malformed": 1, "image_ambiguous_id": 1},
            [2, 3],
        ),
        ([{"width": None}], {"image_malformed": 1}, [1, 2, 3]),
        ([{"width": 13}], {"image_ambiguous_id": 1}, [2, 3]),  # images of one name in two folders
        ([{"file_name": "b/1.png"}, {}], {"image_ambiguous_id": 1}, [2, 3]),
        (
            [{}, {"file_name": "b/1.png"}],
            {"image_duplicate_id": 1, "image_ambiguous_id": 1},
            [2, 3],
        ),
    ],
)
def test_copies_of_an_entry_are_not_ambiguous(tmp_path, changes, counts, ids):
    images, categories, annotations = export("a", 3, 2)
    images += [images[0] | change for change in changes]
    dataset = write(tmp_path, images, categories, annotations)
    expected = counts | {"image_missing": len(ids)}
    if "image_ambiguous_id" in counts:
        expected |= {"annotation_ambiguous": 2}
    assert dataset.issues.counts == expected
    assert dataset.image_ids == ids


def test_categories_of_one_id(tmp_path):
    images, categories, annotations = export("a", 3, 3)
    dataset = write(tmp_path, images, [*categories, {"id": 2, "name": "a2"}], annotations)
    assert dataset.class_names == ["a1", "a2", "a3"]
    assert dataset.num_annotations == 9
    dataset = write(tmp_path, images, [*categories, {"id": 2, "name": "b"}], annotations)
    assert dataset.class_names == ["a1", "a3"]
    assert dataset.issues.counts["annotation_ambiguous"] == 3
    assert dataset.issues.counts["category_ambiguous_id"] == 1
    _, other, _ = export("b", 3, 3)
    with pytest.raises(
        UserError, match=r"(?s)no categories with an id of their own.*joined without new ids"
    ):
        write(tmp_path, images, categories + other, annotations)
    with pytest.raises(UserError, match=r"6 of 9 annotations name an id.*(?s:.*)joined without"):
        write(tmp_path, images, categories + other[:2], annotations)


def test_images_without_annotations_that_share_an_id_are_left_out(tmp_path):
    images, categories, _ = join(export("a", 2, 1), export("b", 1, 0))
    assert write(tmp_path, images, categories, []).image_ids == [2]
