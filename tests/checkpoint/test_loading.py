"""Load weights into a model: names, shapes and dtypes, and reports of what does not fit."""

import ast
import builtins
import copy
import logging
import pickle
from collections.abc import Sequence
from functools import cache
from unittest.mock import patch

import numpy as np
import pytest
import torch
from foreign import torch_bytes
from tiny import MODELS, get_cfg
from tiny import build as build_from_scratch

import tensormask
from tensormask.checkpoint import loading
from tensormask.checkpoint.loading import LoadResult, check_complete, load_weights
from tensormask.checkpoint.names import find_kind, to_detectron2_names, to_our_names


@cache
def _built(head: str, opts: str, seed: int) -> tensormask.TensorMask:
    return build_from_scratch(head, ast.literal_eval(opts), seed)


def build(head: str = "bipyramid", opts: Sequence[object] = (), seed: int = 0):
    """Return a copy of a model that is built once: random numbers take most of the time."""
    return copy.deepcopy(_built(head, repr(list(opts)), seed))


def save(path, state: dict, **beside: object):
    path.write_bytes(torch_bytes({"model": state, **beside}))
    return path


def load(model: tensormask.TensorMask, state: dict) -> LoadResult:
    """Load weights as if from a file: writing one takes longer than all the rest."""
    return load_weights(model, "model.pth", content={"model": state})


def as_detectron2(model) -> dict[str, torch.Tensor]:
    """The model's weights under detectron2's names."""
    state = model.state_dict()
    theirs, unknown = to_detectron2_names(state, model.windows.mask_sizes)
    assert unknown == []
    return {theirs[name]: value for name, value in state.items()}


def assert_equal_states(model, other) -> None:
    state = other.state_dict()
    assert model.state_dict().keys() == state.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name


# ---- what is loaded ----


@pytest.mark.parametrize(
    "names, kind", [("ours", "BN"), ("detectron2", "GN"), ("detectron2", "norm in the pyramid")]
)
def test_round_trip(tmp_path, caplog, names: str, kind: str) -> None:
    model, other = build(opts=MODELS[kind], seed=1), build(opts=MODELS[kind], seed=2)
    state = model.state_dict() if names == "ours" else as_detectron2(model)
    assert find_kind(state) == ("TensorMask" if names == "ours" else "detectron2")
    path = save(tmp_path / "model.pth", state)
    assert load_weights(other, path) == ([], [], [])
    assert_equal_states(other, model)
    assert caplog.text == ""
    path.write_bytes(bytes(path.stat().st_size))  # the model has copies of the mapped tensors
    assert_equal_states(other, model)


@pytest.mark.parametrize(
    "names, key, prefix",
    [
        ("ours", None, ""),
        ("ours", "state_dict", "model."),
        ("ours", "model", "module."),
        ("detectron2", "state_dict", "model.module._orig_mod."),
        ("detectron2", None, "_orig_mod.module."),
    ],
)
def test_dicts_of_wrapped_models(caplog, names: str, key: str | None, prefix: str) -> None:
    model, other = build(seed=1), build(seed=2)
    state = model.state_dict() if names == "ours" else as_detectron2(model)
    state = {prefix + name: value for name, value in state.items()}
    with caplog.at_level("INFO"):
        result = load_weights(other, state if key is None else {key: state, "epoch": 3})
    assert result == ([], [], [])
    assert_equal_states(other, model)
    assert ("prefixes of wrappers" in caplog.text) == (prefix != "")
    assert f"loaded {len(state)} of the model's {len(state)} entries" in caplog.text


def test_compiled_parts_and_names_that_become_equal() -> None:
    bias = torch.rand(16)
    model = build()
    load_weights(model, {"module.fpn._orig_mod.p7.bias": bias})
    assert torch.equal(model.fpn.p7.bias, bias)
    with pytest.raises(ValueError, match="names are equal without"):
        load_weights(model, {"module.fpn.p7.bias": bias, "fpn.p7.bias": bias})


@pytest.mark.parametrize("opts", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("head", ["natural", "aligned", "bipyramid"])
def test_names_of_detectron2_and_back(opts: list, head: str) -> None:
    with torch.device("meta"):
        model = build_from_scratch(head, [*opts, "MODEL.DEVICE", "meta"])
    state = model.state_dict()
    theirs, unknown = to_detectron2_names(state, model.windows.mask_sizes)
    assert unknown == []
    assert len(set(theirs.values())) == len(state)
    assert find_kind(theirs.values()) == "detectron2"
    back, left_out = to_our_names(theirs.values(), "detectron2", model.windows.mask_sizes)
    assert left_out == []
    assert {theirs[name]: name for name in state} == back


def test_names_of_detectron2_by_hand() -> None:
    names = {
        "backbone.bottom_up.stem.conv1.weight": "backbone.stem.conv1.weight",
        "backbone.bottom_up.stem.conv1.norm.running_var": "backbone.stem.bn1.running_var",
        "backbone.bottom_up.res4.22.conv3.norm.bias": "backbone.res4.22.bn3.bias",
        "backbone.bottom_up.res2.0.shortcut.weight": "backbone.res2.0.downsample.0.weight",
        "backbone.bottom_up.res2.0.shortcut.norm.weight": "backbone.res2.0.downsample.1.weight",
        "backbone.fpn_lateral5.bias": "fpn.lateral.p5.bias",
        "backbone.fpn_output2.weight": "fpn.output.p2.weight",
        "backbone.top_block.p7.weight": "fpn.p7.weight",
        "head.cls_subnet.6.weight": "head.cls_subnet.6.weight",
        "head.bbox_pred.bias": "head.bbox_pred.bias",
        "head.mask_subnet.0.weight": "mask_head.mask_subnet.0.weight",
        "head.mask_fuse.0.bias": "mask_head.mask_fuse.0.bias",
        "head.mask_pred_07.weight": "mask_head.mask_pred.1.weight",
        "head.mask_pred_15.bias": "mask_head.mask_pred.0.bias",
    }
    assert to_our_names(names, "detectron2", [15, 7]) == (names, [])
    back = {ours: theirs for theirs, ours in names.items()}
    assert to_detectron2_names(back, [15, 7]) == (back, [])
    with_norm = {
        "backbone.fpn_lateral2.weight": "fpn.lateral.p2.0.weight",
        "backbone.fpn_lateral2.norm.weight": "fpn.lateral.p2.1.weight",
    }
    assert to_our_names(with_norm, "detectron2", []) == (with_norm, [])
    unknown = ["head.mask_pred_7.weight", "head.mask_pred_11.weight", "roi_heads.a"]
    useless = ["pixel_mean", "anchor_generator.cell_anchors.0"]
    ours, left_out = to_our_names([*unknown, *useless], "detectron2", [15, 7])
    assert (ours, left_out) == ({name: name for name in unknown}, useless)


def test_a_released_file_of_detectron2(tmp_path, caplog) -> None:
    model, other = build(seed=1), build(seed=2)
    arrays = {name: value.numpy() for name, value in as_detectron2(model).items()}
    arrays |= {"pixel_mean": np.zeros((3, 1, 1), np.float32)}
    arrays |= {f"anchor_generator.cell_anchors.{i}": np.zeros((1, 4)) for i in range(6)}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2"}))
    with caplog.at_level(logging.INFO):
        assert not any(load_weights(other, path))
    assert_equal_states(other, model)
    assert len(caplog.records) == 2
    assert "entries that are not used: pixel_mean, anchor_generator.cell_anchors.0," in caplog.text


def test_levels_without_windows_are_left_out(caplog) -> None:
    """detectron2 makes p2..p7 whichever of them the head reads."""
    trained, model = build(seed=1), build(opts=MODELS["p3 to p6"], seed=2)
    with caplog.at_level(logging.INFO):
        assert not any(load(model, as_detectron2(trained)))
    unused = [f"backbone.{way}.{leaf}" for way in ("fpn_lateral2", "fpn_output2", "top_block.p7")
              for leaf in ("weight", "bias")]  # fmt: skip
    line, _ = caplog.messages
    assert line == f"model.pth: entries that are not used: {', '.join(unused)}"
    state = model.state_dict()
    assert all(torch.equal(trained.state_dict()[name], value) for name, value in state.items())


def test_a_name_of_the_model_zoo_is_resolved(tmp_path, monkeypatch) -> None:
    model, other = build(seed=1), build(seed=2)
    path = save(tmp_path / "downloaded", model.state_dict())
    monkeypatch.setattr(loading, "resolve", {"tensormask_R_50_FPN_1x": path}.__getitem__)
    assert not any(load_weights(other, "tensormask_R_50_FPN_1x"))
    assert_equal_states(other, model)


def test_a_predictor_opens_its_file_once(tmp_path) -> None:
    weights = {name: value.numpy() for name, value in build().state_dict().items()}
    content = {"model": weights, "class_names": ["a", "b", "c"], "category_ids": [7, 8, 9]}
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(content))
    with patch.object(builtins, "open", wraps=open) as opened:
        predictor = tensormask.Predictor(get_cfg(), path)
    assert [call.args[0] for call in opened.call_args_list].count(path) == 1
    assert predictor.class_names == ["a", "b", "c"]
    assert predictor.category_ids == [7, 8, 9]


def test_dtypes_are_the_models() -> None:
    model, other = build(seed=1), build(seed=2)
    half = {name: value.half() for name, value in model.state_dict().items()}
    assert not any(load(other, half))
    for name, value in other.state_dict().items():
        assert value.dtype == model.state_dict()[name].dtype
        assert torch.equal(value, half[name].float()), name


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_norms_without_statistics_have_mean_0_and_variance_1(caplog, norm: str) -> None:
    opts = ["MODEL.RESNETS.NORM", norm]
    model = build(opts=opts)
    for name, value in model.state_dict().items():
        if ".running_" in name:
            value.fill_(7)  # the values before loading
    state = dict(build(opts=opts).state_dict())
    bare = {name: v for name, v in state.items() if ".running_" not in name}
    loaded = load(model, bare)
    assert loaded == ([], [], [])
    check_complete(loaded, "model.pth")
    for name, value in model.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            assert (value == (1 if "var" in name else 0)).all(), name
    assert caplog.text == ""

    # A file with only one of the two statistics is damaged.
    for name in ("backbone.stem.bn1.running_mean", "backbone.stem.bn1.running_var"):
        one = {key: value for key, value in state.items() if key != name}
        assert load(model, one).missing == [name]
    # A norm without any entry is missing.
    state = {name: v for name, v in state.items() if not name.startswith("backbone.stem.bn1.")}
    assert len(load(model, state).missing) == 4


# ---- what does not fit ----


def test_misfits_are_returned_and_logged(caplog) -> None:
    model = build()
    state = model.state_dict()
    del state["fpn.p7.bias"]
    state["head.bbox_pred.weight"] = torch.zeros(5, 16, 3, 3)
    state["head.extra"] = torch.zeros(1)
    before = model.head.bbox_pred.weight.clone()
    result = load(model, state)
    assert result.missing == ["fpn.p7.bias"]
    assert result.unexpected == ["head.extra"]
    assert result.misshapen == [
        "head.bbox_pred.weight: (5, 16, 3, 3) in the file, (8, 16, 3, 3) in the model"
    ]
    assert torch.equal(model.head.bbox_pred.weight, before)
    for name in ("fpn.p7.bias", "head.extra", "(5, 16, 3, 3)"):
        assert name in caplog.text
    with pytest.raises(ValueError, match=r"1 parameters are missing.*1 have another.*fpn\.p7"):
        check_complete(result, "model.pth")


def test_batch_norms_do_not_fit_other_norms() -> None:
    trained = dict(build(opts=["MODEL.RESNETS.NORM", "BN"]).state_dict())
    loaded = load(build(opts=["MODEL.RESNETS.NORM", "GN"]), trained)
    with pytest.raises(ValueError, match=r"another norm.*MODEL\.RESNETS\.NORM"):
        check_complete(loaded, "model.pth")


def test_long_lists_and_names_are_cut(caplog) -> None:
    state = build().state_dict() | {f"{'x' * 300}{i}\n": torch.zeros(1) for i in range(100)}
    assert len(load(build(), state).unexpected) == 100
    (line,) = caplog.messages
    assert len(line) < 1200
    assert "100 unexpected" in line


def test_a_file_without_any_parameter_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of its 1 entries"):
        load(build(), {"a": torch.zeros(1)})


@pytest.mark.parametrize("names, num_classes", [("ours", 1), ("detectron2", 5)])
def test_other_classes_load_all_but_the_classifier(caplog, names, num_classes) -> None:
    trained = build(seed=1)
    model = build(opts=["MODEL.TENSOR_MASK.NUM_CLASSES", num_classes], seed=2)
    fresh = {name: value.clone() for name, value in model.head.cls_score.state_dict().items()}
    state = trained.state_dict() if names == "ours" else as_detectron2(trained)
    result = load(model, state)
    (line,) = caplog.messages
    assert f"3 classes, the model has {num_classes}: the classifier keeps its initial" in line
    assert result.missing == result.unexpected == []
    assert result.misshapen == [
        f"head.cls_score.{leaf}: {(6, *rest)} in the file, {(2 * num_classes, *rest)} in the model"
        for leaf, rest in (("weight", (16, 3, 3)), ("bias", ()))
    ]
    for name, value in model.state_dict().items():
        expected = trained.state_dict()[name]
        if name.startswith("head.cls_score."):
            expected = fresh[name.rpartition(".")[2]]
        assert torch.equal(value, expected), name
    with pytest.raises(ValueError, match=r"such as head\.cls_score\.weight: \(6,"):
        check_complete(result, "model.pth")


def test_other_misfits_of_the_classifier_are_no_change_of_classes(caplog) -> None:
    state = build().state_dict()
    for shape in ((7, 16, 3, 3), (4, 16, 1, 1)):  # not a multiple of two windows; another kernel
        state["head.cls_score.weight"] = torch.zeros(shape)
        state["head.cls_score.bias"] = torch.zeros(shape[0])
        assert len(load(build(), state).misshapen) == 2
    assert "classes" not in caplog.text
    assert "2 misshapen: head.cls_score.weight" in caplog.text


def test_other_window_sizes() -> None:
    sizes = ["MODEL.ANCHOR_GENERATOR.SIZES", [[44 * 2**k, 28 * 2**k] for k in range(6)]]
    model = build(opts=sizes, seed=1)
    # With detectron2's names, masks of 11 are matched and those of 15 are unexpected.
    trained = build()
    result = load(model, as_detectron2(trained))
    assert result.missing == [f"mask_head.mask_pred.1.{leaf}" for leaf in ("weight", "bias")]
    assert result.unexpected == [f"head.mask_pred_15.{leaf}" for leaf in ("weight", "bias")]
    assert torch.equal(model.mask_head.mask_pred[0].weight, trained.mask_head.mask_pred[0].weight)
    # With our names, they have another shape.
    result = load(model, trained.state_dict())
    assert result.misshapen[0] == (
        "mask_head.mask_pred.1.weight: (225, 16, 1, 1) in the file, (49, 16, 1, 1) in the model"
    )


def test_an_upscale_head_does_not_take_the_masks_of_another() -> None:
    opts = ["MODEL.TENSOR_MASK.HEAD", "upscale_aligned", "MODEL.TENSOR_MASK.UPSCALE_LAMBDA", 5]
    opts += ["MODEL.ANCHOR_GENERATOR.SIZES", [[60 * 2**k] for k in range(6)]]
    model, other = build("aligned", opts), build("aligned", opts, seed=1)
    trained = build("aligned", opts[4:])
    assert not any(load(other, model.state_dict()))
    result = load(model, as_detectron2(trained))
    assert result.misshapen == [
        "mask_head.mask_pred.0.weight: (225, 16, 1, 1) in the file, (9, 16, 1, 1) in the model",
        "mask_head.mask_pred.0.bias: (225,) in the file, (9,) in the model",
    ]


def test_another_model_of_detectron2_gives_its_trunk_and_pyramid() -> None:
    trained, model = build(seed=1), build(seed=2)
    state = {n: v for n, v in as_detectron2(trained).items() if n.startswith("backbone.")}
    state["roi_heads.box_head.fc1.weight"] = torch.zeros(4, 4)
    result = load(model, state)
    assert result.unexpected == ["roi_heads.box_head.fc1.weight"]
    assert {name.partition(".")[0] for name in result.missing} == {"head", "mask_head"}
    assert torch.equal(model.fpn.p7.weight, trained.fpn.p7.weight)
