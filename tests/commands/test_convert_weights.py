"""`tools/convert_weights.py`: names change, numbers do not; unsupported models are refused."""

import ast
import pickle
import pickletools
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign import torch_bytes
from tiny import MODELS, build, get_cfg

from tensormask.checkpoint.files import get_description, read_checkpoint, read_weights
from tensormask.commands.convert_weights import main

ROOT = Path(__file__).parents[2]
SUFFIXES = (".pth", ".pkl", ".safetensors")


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def refused(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def save(path: Path, state: dict, **beside: object) -> Path:
    path.write_bytes(torch_bytes({"model": state, **beside}))
    return path


def small_state(head: str = "bipyramid", opts: Sequence[object] = ()) -> dict[str, torch.Tensor]:
    """Return a model's weights without most of its backbone."""
    state = _built(head, str(list(opts)))
    return {name: value.clone() for name, value in state.items()}


@cache
def _built(head: str, opts: str) -> dict[str, torch.Tensor]:
    state = build(head, ast.literal_eval(opts)).state_dict()
    return {name: value for name, value in state.items() if not name.startswith("backbone.res")}


def assert_same(weights: dict, state: dict) -> None:
    assert weights.keys() == state.keys()
    for name, value in state.items():
        assert weights[name].dtype == value.dtype, name
        assert weights[name].shape == value.shape, name
        assert weights[name].numpy().tobytes() == value.numpy().tobytes(), name


@pytest.mark.parametrize("suffix, other", [(".pkl", ".pth"), (".pth", ".safetensors")])
def test_there_and_back(tmp_path, suffix: str, other: str) -> None:
    """The names of every model are tested with the tables (test_loading.py)."""
    state = build(opts=MODELS["BN"]).state_dict()
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            value.fill_(2**40)
    theirs, back = tmp_path / f"theirs{suffix}", tmp_path / f"back{other}"
    run(save(tmp_path / "ours.pth", state), theirs)
    names = set(read_weights(theirs))
    assert "backbone.bottom_up.res2.0.conv1.norm.weight" in names
    assert not names & {name for name in state if not name.startswith("head.")}
    run(theirs, back)
    assert_same(read_weights(back), state)


# Sizes are ordered as numbers, not as texts, as the names in a safetensors file are.
LARGE_MASKS = ["MODEL.ANCHOR_GENERATOR.SIZES", [[60 * 2**k, 400 * 2**k] for k in range(6)]]


@pytest.mark.parametrize(
    "head, suffix", [("natural", ".pth"), ("aligned", ".pkl"), ("bipyramid", ".safetensors")]
)
@pytest.mark.parametrize("kind", ["no masks", "norm in the pyramid", "p3 to p6", "large masks"])
def test_there_and_back_of_other_models(tmp_path, head: str, suffix: str, kind: str) -> None:
    state = small_state(head, {**MODELS, "large masks": LARGE_MASKS}[kind])
    theirs, back = tmp_path / f"theirs{suffix}", tmp_path / f"back{suffix}"
    run(save(tmp_path / "ours.pth", state), theirs)
    run(theirs, back)
    assert_same(read_weights(back), state)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bits_and_entries_that_share_their_numbers_are_kept(tmp_path, suffix: str) -> None:
    state = small_state()
    bits = torch.tensor([0x7FC00001, 0x7F800000, 1, 0x80000000], dtype=torch.int64).int()
    state["fpn.p7.bias"][:4] = bits.view(torch.float32)  # NaN with a payload, inf, denormal, -0
    state["fpn.p6.bias"] = state["fpn.p7.bias"]
    state["fpn.p7.weight"] = state["fpn.p6.weight"].transpose(2, 3)
    theirs, back = tmp_path / f"theirs{suffix}", tmp_path / f"back{suffix}"
    run(save(tmp_path / "ours.pth", state), theirs)
    run(theirs, back)
    assert_same(read_weights(back), state)


def test_a_pkl_is_what_detectron2_reads(tmp_path) -> None:
    """By Python's own loader, whatever version NumPy has, without guessing of names."""
    path = tmp_path / "model.pkl"
    model = build(opts=["MODEL.RESNETS.NORM", "BN"])
    run(save(tmp_path / "ours.pth", model.state_dict(), class_names=list("abc")), path)
    content = pickle.loads(path.read_bytes())
    assert set(content) == {"model", "__author__", "matching_heuristics", "class_names"}
    assert content["matching_heuristics"] is False
    array = content["model"]["head.mask_pred_15.weight"]
    assert type(array) is np.ndarray
    assert array.dtype == np.float32
    assert array.tobytes() == model.mask_head.mask_pred[1].weight.detach().numpy().tobytes()
    names = {argument for opcode, argument, _ in pickletools.genops(path.read_bytes())
             if opcode.name in ("GLOBAL", "STACK_GLOBAL")}  # fmt: skip
    assert names == {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}


def test_a_pth_is_what_detectron2_reads(tmp_path) -> None:
    run(save(tmp_path / "ours.pth", small_state()), tmp_path / "model.pth")
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    assert content["model"]["head.mask_pred_11.bias"].dtype == torch.float32
    assert set(content) == {"model", "__author__", "matching_heuristics"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_descriptions_are_kept_and_the_rest_is_left_out(tmp_path, capsys, suffix: str) -> None:
    kept = {"class_names": ["ä", "b", "c"], "category_ids": [7, 8, 9], "score_threshold": 0.25}
    kept |= {"config": get_cfg().dump()}
    source = save(tmp_path / "ours.pth", small_state(), **kept, iteration=3, optimizer={})
    path = tmp_path / f"theirs{suffix}"
    run(source, path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{path}: ")
    assert "names of detectron2" in line
    assert "kept: class_names, category_ids, config, score_threshold" in line
    assert line.endswith("left out: iteration, optimizer")
    assert get_description(read_checkpoint(path)) == kept
    back = tmp_path / f"back{suffix}"
    run(path, back)
    assert "left out" not in capsys.readouterr().out
    assert set(read_checkpoint(back)) == {"model", *kept}


def test_a_change_of_only_the_format(tmp_path) -> None:
    state = small_state()
    run(save(tmp_path / "a.pth", state), tmp_path / "b.safetensors", "--to", "tensormask")
    run(tmp_path / "b.safetensors", tmp_path / "c.pkl", "--to", "detectron2")
    run(tmp_path / "c.pkl", tmp_path / "d.pth", "--to", "detectron2")
    run(tmp_path / "d.pth", tmp_path / "e.pth")
    assert_same(read_weights(tmp_path / "b.safetensors"), state)
    assert_same(read_weights(tmp_path / "d.pth"), read_weights(tmp_path / "c.pkl"))
    assert_same(read_weights(tmp_path / "e.pth"), state)


def test_an_existing_file_is_replaced_on_demand_and_only_as_a_whole(tmp_path, capsys) -> None:
    state = small_state()
    source = save(tmp_path / "ours.pth", state)
    path = tmp_path / "theirs.pkl"
    path.write_bytes(b"old")
    assert "exists: give another OUTPUT, or --overwrite" in refused(capsys, source, path)
    assert path.read_bytes() == b"old"
    broken = tmp_path / "broken.pth"
    broken.write_bytes(source.read_bytes()[:-100])
    assert "cannot be read" in refused(capsys, broken, path, "--overwrite")
    assert path.read_bytes() == b"old"
    run(source, path, "--overwrite")
    assert len(read_weights(path)) == len(read_weights(source))
    run(source, source, "--overwrite")  # the tensors of INPUT are mapped from the file
    assert "backbone.top_block.p7.bias" in read_weights(source)
    run(source, source, "--overwrite")
    assert_same(read_weights(source), state)


def test_parameters_that_detectron2_lacks(tmp_path, capsys) -> None:
    state = small_state() | {"head.new.bias": torch.ones(2)}
    source = save(tmp_path / "ours.pth", state)
    message = refused(capsys, source, tmp_path / "theirs.pkl")
    assert "head.new.bias is no parameter of detectron2's TensorMask; --to tensormask" in message
    run(source, tmp_path / "kept.safetensors", "--to", "tensormask")
    assert_same(read_weights(tmp_path / "kept.safetensors"), state)


def test_weights_are_rounded_where_the_dtype_allows_it(tmp_path, capsys) -> None:
    """Biases, statistics, and arrays with values beyond the range are not."""
    state = small_state(opts=MODELS["BN"])
    state["backbone.stem.bn1.running_var"].fill_(1e6)  # float16 ends at 65504
    state["fpn.p6.weight"][0, 0, 0, 0] = 1e5
    state["fpn.p7.weight"] *= 1e-7  # below the smallest float16 but zero
    state["head.cls_score.weight"][0, 0, 0, 0] = torch.nan
    beside = {"class_names": ["a"], "category_ids": [7], "score_threshold": 0.25, "config": "x"}
    source, path = save(tmp_path / "ours.pth", state, **beside), tmp_path / "half.safetensors"
    run(source, path, "--to", "tensormask", "--dtype", "float16")
    assert "weights in float16, but 3 arrays, which it cannot" in capsys.readouterr().out
    half = read_weights(path)
    kept = {"fpn.p6.weight", "fpn.p7.weight", "head.cls_score.weight"}
    for name, value in state.items():
        rounded = value.dim() > 1 and name not in kept
        assert half[name].dtype == (torch.float16 if rounded else value.dtype), name
        assert torch.equal(half[name].nan_to_num(), value.to(half[name].dtype).nan_to_num()), name
    # The same bits each time: the order of metadata is fixed.
    again = tmp_path / "again.safetensors"
    run(source, again, "--to", "tensormask", "--dtype", "float16")
    assert again.read_bytes() == path.read_bytes()
    run(path, tmp_path / "theirs.pkl", "--dtype", "float32")
    assert {array.dtype for array in read_weights(tmp_path / "theirs.pkl").values()} <= {
        torch.float32, torch.int64,
    }  # fmt: skip


def test_averaged_weights(tmp_path, capsys) -> None:
    state, averages = small_state(), {n: v + 1 for n, v in small_state().items()}
    beside = {"ema": {"model": averages, "n_averaged": 3}, "score_threshold": 0.5}
    source = save(tmp_path / "ours.pth", state, **beside)
    run(source, tmp_path / "a.pth", "--ema", "--to", "tensormask")
    assert_same(read_weights(tmp_path / "a.pth"), averages)
    assert get_description(read_checkpoint(tmp_path / "a.pth")) == {}
    source = save(tmp_path / "ours.pth", state, ema=None)
    assert "no averaged weights" in refused(capsys, source, tmp_path / "b.pth", "--ema")


def test_unsupported_models_are_refused(tmp_path, capsys) -> None:
    opts = ["MODEL.TENSOR_MASK.HEAD", "upscale_aligned", "MODEL.TENSOR_MASK.UPSCALE_LAMBDA", 5]
    opts += ["MODEL.ANCHOR_GENERATOR.SIZES", [[60 * 2**k] for k in range(6)]]
    config = get_cfg("aligned", opts).dump()
    state = small_state("aligned", opts)
    source = save(tmp_path / "ours.pth", state, config=config)
    assert "upscale head" in refused(capsys, source, tmp_path / "theirs.pkl")
    run(source, tmp_path / "kept.safetensors", "--to", "tensormask")
    assert_same(read_weights(tmp_path / "kept.safetensors"), state)
    source = tmp_path / "kept.safetensors"
    assert "upscale head" in refused(capsys, source, tmp_path / "theirs.pkl")

    for option, what in (
        ("MASK_UNIT: 2.0", "finer masks"),
        ("NORM: LN", "norms in its towers"),
        ("MASK_IOU_ON: true", "predicted IoUs"),
    ):
        config = f"MODEL: {{TENSOR_MASK: {{UPSCALE_LAMBDA: 0, {option}}}}}"
        source = save(tmp_path / "v2.pth", small_state(), config=config)
        assert what in refused(capsys, source, tmp_path / "theirs.pkl")

    state = small_state(opts=MODELS["large windows first"])
    source = save(tmp_path / "ours.pth", state)
    assert "masks of [15, 7] pixels" in refused(capsys, source, tmp_path / "theirs.pkl")

    opts = ["MODEL.TENSOR_MASK.BOX_ON", False, "MODEL.TENSOR_MASK.NMS_ON", "masks"]
    source = save(tmp_path / "boxless.pth", small_state(opts=opts))
    assert "no box head" in refused(capsys, source, tmp_path / "theirs.pkl")
    run(source, tmp_path / "kept.pkl", "--to", "tensormask")
    assert not (tmp_path / "theirs.pkl").exists()


@pytest.mark.parametrize("config", [3, "", "[", "MODEL: 3", "a: &a [*a]", "[" * 500, "MODEL: {}"])
def test_an_unusable_config_is_ignored(tmp_path, config) -> None:
    source = save(tmp_path / "ours.pth", small_state(), config=config)
    run(source, tmp_path / "theirs.pth")


@pytest.mark.parametrize(
    "state, part",
    [
        ({"layer1.0.conv1.weight": torch.zeros(2)}, "Backbones need no conversion"),
        ({"conv1_w": torch.zeros(2)}, "it has no classifier"),
        ({"backbone.bottom_up.stem.conv1.weight": torch.zeros(2)}, "no classifier"),
        ({"a": torch.zeros(2)}, "a is no parameter"),
        ({"head.cls_score.weight": torch.zeros(2), "b" * 500: torch.zeros(2)}, "bbb... is no"),
        ({"backbone.fpn_output2.bias": torch.zeros(2), "roi_heads.a": torch.zeros(2)}, "roi_heads"),
        ({"mask_head.mask_pred.0.weight": torch.zeros(26, 1, 1, 1)}, "26 pixels is not square"),
        ({"mask_head.mask_pred.0.weight": torch.zeros(())}, "no classifier"),
        ({"a": 3}, "entry a is int"),
    ],
)
def test_other_weights_are_refused(tmp_path, capsys, state: dict, part: str) -> None:
    assert part in refused(capsys, save(tmp_path / "a.pth", state), tmp_path / "b.pth")
    assert not (tmp_path / "b.pth").exists()


def test_mistakes_on_the_command_line(tmp_path, capsys) -> None:
    numbers = torch.arange(2).bfloat16()
    source = save(tmp_path / "ours.pth", {"head.cls_score.weight": numbers})
    theirs = tmp_path / "theirs"
    args = (source, "--to", "tensormask")
    assert "not none" in refused(capsys, *args, theirs)
    assert "not .onnx" in refused(capsys, *args, theirs.with_suffix(".onnx"))
    assert "bfloat16" in refused(capsys, *args, theirs.with_suffix(".pkl")).lower()
    assert "no weights file at" in refused(capsys, tmp_path / "gone.pth", tmp_path / "a.pth")
    assert "folder" in refused(capsys, *args, tmp_path / "folder" / "a.pth")
    assert list(tmp_path.iterdir()) == [source]
    run(*args, theirs.with_suffix(".safetensors"))
    (found,) = read_weights(theirs.with_suffix(".safetensors")).values()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, numbers)
