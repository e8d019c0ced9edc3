"""A checkpoint with a command in it: refused by everything that takes a checkpoint, and not run."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from foreign import command, torch_bytes
from tiny import build, get_cfg

import tensormask
from tensormask.checkpoint.files import read_checkpoint
from tensormask.commands import convert_weights, predict, train, visualize_windows
from tensormask.utils.errors import UserError

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def train_net(folder: Path, *more: str) -> int:
    options = [word for word in more if word.startswith("--")]
    overrides = [word for word in more if not word.startswith("--")]
    overrides += ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()", "OUTPUT_DIR", str(folder)]
    return train.main(["--config-file", QUICKSTART, "--num-gpus", "0", *options, *overrides])


def resume(path: Path, *options: str) -> int:
    (path.parent / "last_checkpoint").write_text(path.name)
    return train_net(path.parent, "--resume", *options)


def draw(command: ModuleType, path: Path) -> int:
    options = ["--config-file", QUICKSTART, "--input", "none.png", "--weights", str(path)]
    return command.main([*options, "--opts", "MODEL.DEVICE", "cpu"])


# What takes a checkpoint. Commands return an exit code, the others raise.
USERS: dict[str, Callable[[Path], object]] = {
    "read_checkpoint": read_checkpoint,
    "load_weights": lambda path: tensormask.load_weights(build(), path),
    "load_weights, as text": lambda path: tensormask.load_weights(build(), str(path)),
    "load_weights, by URL": lambda path: tensormask.load_weights(build(), path.as_uri()),
    "Predictor": lambda path: tensormask.Predictor(get_cfg(), path),
    "Predictor, from the config": lambda path: tensormask.Predictor(
        get_cfg(opts=["MODEL.WEIGHTS", str(path)])
    ),
    "train": lambda path: train_net(path.parent, "MODEL.WEIGHTS", str(path)),
    "eval": lambda path: train_net(path.parent, "--eval-only", "MODEL.WEIGHTS", str(path)),
    "train --resume": resume,
    "train --eval-only --resume": lambda path: resume(path, "--eval-only"),
    "demo": lambda path: draw(predict, path),
    "visualize_windows": lambda path: draw(visualize_windows, path),
    "convert_weights": lambda path: convert_weights.main([str(path), f"{path}.converted.pth"]),
}


@pytest.mark.parametrize("user", USERS)
def test_a_command_is_not_run(tmp_path, capsys, user: str) -> None:
    """Each file format is tested in tests/checkpoint/test_files_untrusted.py."""
    marker = tmp_path / "has_run"
    content = {"model": {"fpn.p7.bias": torch.zeros(16), "x": command(marker)}, "iteration": 3}
    path = tmp_path / "model.pth"
    path.write_bytes(torch_bytes(content))
    try:
        code = USERS[user](path)
    except UserError as error:
        code, message = 2, str(error)
    else:
        message = capsys.readouterr().err
    assert code == 2
    assert "model.pth asks for " in message
    assert "mkdir" in message
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the control: plain pickle runs the command
    assert marker.exists()
