"""Checkpoints: atomic, plain data, and refused with a reason if they do not match the run."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from tensormask.engine import resume as ckpt
from tensormask.engine.step import TrainState

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def make_parts(optimizer_class=torch.optim.SGD, width=2, lr=0.1):
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
    optimizer = optimizer_class(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5**i)
    return TrainState(model, optimizer, scheduler, torch.amp.GradScaler("cpu", enabled=False))


def step(state, x):
    state.optimizer.zero_grad()
    state.model(x).square().sum().backward()
    state.optimizer.step()
    state.scheduler.step()


def save(folder, state, name="model_0000004.pth"):
    checkpoint = ckpt.pack_checkpoint(
        state,
        iteration=4,
        config="SEED: 3\n",
        class_names=["star", "ring"],
        category_ids=[7, 9],
        issues=[("a", "box_empty", 3)],
    )
    return ckpt.save_checkpoint(folder, name, checkpoint)


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002


def test_the_state_is_restored(tmp_path):
    parts = make_parts(torch.optim.AdamW)
    x = torch.randn(4, 3)
    step(parts, x)
    path = save(tmp_path, parts)
    drawn = draw()
    other = make_parts(torch.optim.AdamW)
    loaded = ckpt.load_checkpoint(path)
    assert ckpt.restore_checkpoint(loaded, other) == 5
    assert draw() == drawn
    assert other.optimizer.param_groups[0]["lr"] == 0.05
    for both in (parts, other):
        step(both, x)
    for key, value in parts.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[key]), key
    assert loaded["class_names"] == ["star", "ring"]
    assert loaded["category_ids"] == [7, 9]
    assert ckpt.unpack_issues(loaded) == [("a", "box_empty", 3)]
    assert set(loaded) == {
        *("model", "optimizer", "scheduler", "scaler", "ema", "iteration", "random_states"),
        *("issues", "config", "class_names", "category_ids", "versions", "run"),
        "parameter_names",
    }


MANY_ISSUES = [
    *(("a", "object_too_small", 10**12 + i) for i in range(160_000)),
    ("b", "image_broken", "x.png"),
    ("b", "image_broken", 4),
    ("b", "box_empty", 2**70),
]


def test_many_issues_are_restored(tmp_path):
    checkpoint = ckpt.pack_checkpoint(
        make_parts(), iteration=4, config="", class_names=[], category_ids=[], issues=MANY_ISSUES
    )
    ids = checkpoint["issues"]["a"]["object_too_small"]
    assert (ids.dtype, ids.shape) == (torch.int64, (160_000,))
    loaded = ckpt.load_checkpoint(ckpt.save_checkpoint(tmp_path, "model.pth", checkpoint))
    assert ckpt.unpack_issues(loaded) == MANY_ISSUES


def test_issues_of_older_checkpoints():
    """They are a list, with kinds that have other names today."""
    faults = [["a", "polygon_odd", 3], ["b", "image_broken", "x.png"]]
    expected = [("a", "polygon_malformed", 3), ("b", "image_broken", "x.png")]
    assert ckpt.unpack_issues({"faults": faults}) == expected
    assert ckpt.unpack_issues({}) == []


def test_last_checkpoint_names_the_newest(tmp_path):
    assert ckpt.find_last_checkpoint(tmp_path) is None
    parts = make_parts()
    save(tmp_path, parts)
    path = save(tmp_path, parts, "model_final.pth")
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert ckpt.find_last_checkpoint(tmp_path) == path


@pytest.mark.parametrize("name", ["gone.pth", "../model.pth", ""])
def test_last_checkpoint_names_a_missing_file(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "model.pth").touch()
    (tmp_path / "run" / "last_checkpoint").write_text(name)
    with pytest.raises(ValueError, match="last_checkpoint"):
        ckpt.find_last_checkpoint(tmp_path / "run")


def test_damaged_and_other_files(tmp_path):
    path = save(tmp_path, make_parts())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        ckpt.load_checkpoint(path)
    torch.save({"model": {}, "iteration": 3}, path)
    with pytest.raises(ValueError, match=r"lacks optimizer, scheduler.*MODEL\.WEIGHTS"):
        ckpt.load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="not a dict of weights"):
        ckpt.load_checkpoint(path)


def test_another_model_or_optimizer_is_refused(tmp_path):
    loaded = ckpt.load_checkpoint(save(tmp_path, make_parts()))
    with pytest.raises(ValueError, match="another model"):
        ckpt.restore_checkpoint(loaded, make_parts(width=5))
    with pytest.raises(ValueError, match="optimizer"):
        ckpt.restore_checkpoint(loaded, make_parts(torch.optim.AdamW))
