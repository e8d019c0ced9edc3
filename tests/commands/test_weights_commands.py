"""A checkpoint that would run a command: refused wherever one can be named, and nothing has run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from foreign import COMMAND_FORMATS, command
from tiny import build, get_cfg

import tensormask
from tensormask.checkpoint.files import read_checkpoint
from tensormask.commands import convert_weights, predict, train, visualize_windows

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def train_net(folder: Path, *more: str) -> int:
    arguments = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()", "OUTPUT_DIR", str(folder)]
    options = [word for word in more if word.startswith("--")]
    overrides = [word for word in more if not word.startswith("--")]
    return train.main([
        *("--config-file", QUICKSTART, "--num-gpus", "0", *options), *arguments, *overrides,
    ])  # fmt: skip


def resume(path: Path, *options: str) -> int:
    (path.parent / "last_checkpoint").write_text(path.name)
    return train_net(path.parent, "--resume", *options)


COMMANDS = {"demo": predict, "visualize_windows": visualize_windows}


def draw(name: str, path: Path) -> int:
    return COMMANDS[name].main([
        *("--config-file", QUICKSTART, "--input", "none.png", "--weights", str(path)),
        *("--opts", "MODEL.DEVICE", "cpu"),
    ])  # fmt: skip


def convert(path: Path) -> int:
    return convert_weights.main([str(path), str(path.with_name("converted.pth"))])


# Where a checkpoint can be named. Commands give an exit code, the others raise.
PLACES: dict[str, Callable[[Path], object]] = {
    "read_checkpoint": read_checkpoint,
    "load_weights": lambda path: tensormask.load_weights(build(), path),
    "load_weights, as text": lambda path: tensormask.load_weights(build(), str(path)),
    "load_weights, by address": lambda path: tensormask.load_weights(build(), path.as_uri()),
    "Predictor": lambda path: tensormask.Predictor(get_cfg(), path),
    "Predictor, from the config": lambda path: tensormask.Predictor(
        get_cfg(opts=["MODEL.WEIGHTS", str(path)])
    ),
    "train": lambda path: train_net(path.parent, "MODEL.WEIGHTS", str(path)),
    "train --eval-only": lambda path: train_net(
        path.parent, "--eval-only", "MODEL.WEIGHTS", str(path)
    ),
    "train --resume": resume,
    "train --eval-only --resume": lambda path: resume(path, "--eval-only"),
    "demo": lambda path: draw("demo", path),
    "visualize_windows": lambda path: draw("visualize_windows", path),
    "convert_weights": convert,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", COMMAND_FORMATS)
def test_a_command_is_refused_and_has_not_run(tmp_path, capsys, kind: str, place: str) -> None:
    suffix, write, load_blindly = COMMAND_FORMATS[kind]
    marker = tmp_path / "has_run"
    content = {"model": {"fpn.p7.bias": np.zeros(16), "x": command(marker)}, "iteration": 3}
    path = tmp_path / f"model{suffix}"
    path.write_bytes(write(content, marker))
    try:
        said = PLACES[place](path)
    except ValueError as error:
        said, message = 2, str(error)
    else:
        message = capsys.readouterr().err
    assert said == 2
    assert f"model{suffix}: it asks for " in message
    assert "mkdir" in message
    assert not marker.exists()
    load_blindly(path.read_bytes())  # the test means something: elsewhere the command runs
    assert marker.exists()


@pytest.mark.parametrize("part", ["beside the weights", "in a list", "in an array", "as a key"])
@pytest.mark.parametrize("kind", ["pickle 0", "pickle 5 as .safetensors", "torch", "legacy torch"])
def test_a_command_anywhere_in_a_file(tmp_path, kind: str, part: str) -> None:
    _, write, load_blindly = COMMAND_FORMATS[kind]
    marker = tmp_path / "has_run"
    run = command(marker)
    content = {"model": {"a": np.zeros(2)}}
    content |= {
        "beside the weights": {"optimizer": {"state": run}},
        "in a list": {"optimizer": [1, [run]]},
        "in an array": {"model": {"a": np.array([run], dtype=object)}},
        "as a key": {"model": {"a": np.zeros(2)}, ("b", run): 1},
    }[part]
    path = tmp_path / "model.pth"
    path.write_bytes(write(content, marker))
    with pytest.raises(ValueError, match=r"mkdir|array of objects|dtype O8"):
        read_checkpoint(path)
    assert not marker.exists()
    load_blindly(path.read_bytes())
    assert marker.exists()
