"""Checkpoint files: what is read, what is said of misfits, what is refused and not run."""

import logging
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from tiny import build

from tensormask.engine.weights import load_weights, read_weights


class Command:
    """Unpickled by Python's own loader, this would make a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_own_checkpoint_round_trip(tmp_path) -> None:
    model, other = build(seed=1), build(seed=2)
    torch.save({"model": model.state_dict(), "iteration": 3}, tmp_path / "model.pth")
    assert load_weights(other, tmp_path / "model.pth") == ([], [], [])
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_misfits_are_returned_and_logged(tmp_path, caplog) -> None:
    model = build()
    state = model.state_dict()
    del state["fpn.p7.bias"]
    state["head.cls_score.weight"] = torch.zeros(5, 16, 3, 3)
    state["head.extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "model.pth")
    with caplog.at_level(logging.WARNING):
        result = load_weights(model, tmp_path / "model.pth")
    assert result.missing == ["fpn.p7.bias"]
    assert result.unexpected == ["head.extra"]
    assert result.misshapen == [
        "head.cls_score.weight: (5, 16, 3, 3) in the file, (6, 16, 3, 3) in the model"
    ]
    for name in ("fpn.p7.bias", "head.extra", "(5, 16, 3, 3)"):
        assert name in caplog.text


def test_nothing_in_common_is_an_error(tmp_path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="none of its 1 entries"):
        load_weights(build(), tmp_path / "model.pth")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_of_arrays(tmp_path, protocol: int) -> None:
    arrays = OrderedDict(
        a=np.arange(6, dtype=np.float32).reshape(2, 3), b=np.float64(2.5), c=np.zeros((), np.int64)
    )
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": {"a": arrays["a"], "c": arrays["c"]}}, protocol))
    weights = read_weights(path)
    assert weights["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert weights["c"].dtype == torch.int64


def test_pickles_from_before_numpy_2(tmp_path) -> None:
    data = pickle.dumps({"a": np.ones(3, np.float32)}, protocol=2)
    assert b"numpy._core.multiarray" in data
    path = tmp_path / "model.pkl"
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read_weights(path)["a"].tolist() == [1, 1, 1]


def places_for(command: Command) -> list:
    return [
        command,
        {"model": command},
        {"model": {"a": np.zeros(2), "b": command}},
        {"model": {"a": np.zeros(2)}, "optimizer": [command]},
        {"model": {"a": np.array([command], dtype=object)}},
    ]


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_commands_are_refused_and_do_not_run(tmp_path, place: int, suffix: str) -> None:
    content = places_for(Command(tmp_path / "ran"))[place]
    path = tmp_path / f"model{suffix}"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="mkdir" if suffix == ".pkl" else "plain data"):
        load_weights(build(), path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(content))  # the test means something: elsewhere the command runs
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps({"a": np.zeros(9)})[:-20]])
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_damaged_files_are_refused(tmp_path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"model{suffix}"):
        read_weights(path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"model": {"a": "text"}}, {"a": {"b": 1}}, 3])
def test_other_contents_are_refused(tmp_path, content) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"model\.pkl"):
        read_weights(path)


def test_missing_files_and_addresses(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_weights(tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="download"):
        read_weights("https://example.com/model.pkl")
