"""The classifier's rows are loaded by the names of the classes, for all window sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build

from tensormask.checkpoint.loading import check_complete, load_weights

LEAVES = ("weight", "bias")
TRAINED = build(seed=1)  # of 3 classes and 2 window sizes
NAMES = ["star", "ring", "disc"]


def rows(model, num_classes):
    """The rows of the classifier by window size and class."""
    state = model.head.cls_score.state_dict()
    return {leaf: state[leaf].unflatten(0, (2, num_classes)) for leaf in LEAVES}


MODELS = {n: build(opts=["MODEL.TENSOR_MASK.NUM_CLASSES", n], seed=2) for n in range(1, 6)}


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_rows_of_the_classes_that_both_have(data):
    names = data.draw(st.permutations([*NAMES, "cube", "cone"]))[: data.draw(st.integers(1, 5))]
    model = MODELS[len(names)]
    torch.nn.init.normal_(model.head.cls_score.bias)
    fresh = {leaf: value.clone() for leaf, value in rows(model, len(names)).items()}
    content = {"model": TRAINED.state_dict(), "class_names": NAMES}
    result = load_weights(model, content, class_names=names)
    assert not any(result)
    theirs, ours = rows(TRAINED, 3), rows(model, len(names))
    for leaf in LEAVES:
        for label, name in enumerate(names):
            source = theirs[leaf][:, NAMES.index(name)] if name in NAMES else fresh[leaf][:, label]
            assert torch.equal(ours[leaf][:, label], source), (leaf, name)
    others = {n: v for n, v in model.state_dict().items() if not n.startswith("head.cls_score.")}
    assert all(torch.equal(TRAINED.state_dict()[name], value) for name, value in others.items())


def test_the_log_names_the_classes(caplog):
    caplog.set_level("INFO", logger="tensormask")
    content = {"model": TRAINED.state_dict(), "class_names": NAMES}
    for names, expected in [
        (NAMES, []),
        (["disc", "cube"], ["keeps 1 of the 3 classes of the file, by name: 'disc'", "'cube'"]),
        (["cube"], ["1 of the model's 1 classes keep the initial weights of their classifier"]),
        (["Star"], [": 'Star'. 'Star' and 'star' differ only in their spelling"]),
    ]:
        caplog.clear()
        load_weights(MODELS[len(names)], content, class_names=names)
        lines = [line for line in caplog.messages if "loaded" not in line]
        assert len(lines) == len(expected)
        assert all(text in line for text, line in zip(expected, lines, strict=True))


@pytest.mark.parametrize(
    "stored, given, said",
    [
        (None, NAMES[::-1], "has no class names: they are matched by position"),
        (["star", "ring"], NAMES[::-1], "has no class names"),  # not of this classifier
        (NAMES, [], ""),  # DATASETS.MATCH_CLASSES position
    ],
)
def test_without_names_on_both_sides_rows_are_matched_by_position(caplog, stored, given, said):
    caplog.set_level("INFO", logger="tensormask")
    content = {"model": TRAINED.state_dict(), **({"class_names": stored} if stored else {})}
    assert not any(load_weights(MODELS[3], content, class_names=given))
    for leaf in LEAVES:
        assert torch.equal(rows(MODELS[3], 3)[leaf], rows(TRAINED, 3)[leaf])
    assert said in caplog.text
    assert ("position" in caplog.text) == bool(said)


def test_other_window_sizes_are_no_other_classes(caplog):
    """6 rows of the file are 3 classes at 2 sizes; a model with one size has 3 rows."""
    model = build(opts=["MODEL.ANCHOR_GENERATOR.SIZES", [[60 * 2**k] for k in range(6)]])
    content = {"model": TRAINED.state_dict(), "class_names": NAMES}
    result = load_weights(model, content, class_names=NAMES)
    assert "head.cls_score.bias: (6,) in the file, (3,) in the model" in result.misshapen
    assert "trained with" not in caplog.text
    assert "misshapen: head.cls_score" in caplog.text


def test_a_file_without_names_and_with_another_number_of_classes(caplog):
    result = load_weights(MODELS[2], {"model": TRAINED.state_dict()}, class_names=["star", "ring"])
    assert len(result.misshapen) == 2
    assert "trained with 3 classes, the model has 2" in caplog.text
    with pytest.raises(ValueError, match=r"such as head\.cls_score"):
        check_complete(result, "model.pth")
