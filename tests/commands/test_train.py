"""The command `tools/train_net.py`: messages, exit codes and log; runs in test_end_to_end.py."""

import pytest
from tiny import CONFIGS

from tensormask.commands import train as train_net
from tensormask.engine import trainer
from tensormask.engine.anomaly import NonFiniteError
from tensormask.engine.signals import TrainingStopped
from tensormask.evaluation import UnexpectedResultsError
from tensormask.utils.errors import UserError
from tensormask.utils.files import DiskFullError

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def test_mistakes_are_one_line(tmp_path, capsys):
    for arguments in (
        ["--config-file", str(tmp_path / "missing.yaml")],
        ["SOLVER.BASE_LRR", "1"],
        ["SOLVER.BASE_LR"],
        ["--num-gpus", "2", "SEED", "1"],
        ["--num-gpus", "-1", "SEED", "1"],
        ["--eval-only", "OUTPUT_DIR", str(tmp_path)],
        ["DATASETS.TRAIN", "('missing.json@missing',)", "OUTPUT_DIR", str(tmp_path)],
    ):
        assert train_net.main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: "), arguments
        assert error.count("\n") == 1, arguments


def test_no_gpus_is_the_cpu():
    for words, device in ([], "cpu"), (["MODEL.DEVICE", "cuda"], "cuda"):
        args = train_net.build_parser().parse_args(["--num-gpus", "0", *words])
        assert train_net.setup_config(args).MODEL.DEVICE == device


def test_a_launched_process_launches_no_others(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train_net.main(["--num-gpus", "2", "MODEL.DEVICE", "cpu"]) == 2
    assert "started by torchrun" in capsys.readouterr().err


def test_the_launched_command_has_all_options(monkeypatch):
    calls = []
    monkeypatch.setattr(train_net, "launch", lambda *args, **options: calls.append((args, options)))
    words = ["--config-file", str(CONFIGS / "quickstart.yaml"), "--num-gpus", "2"]
    for flags in (["--resume", "--eval-only"], ["--overwrite"]):
        train_net.main([*words, *flags, "MODEL.DEVICE", "cpu"])
        (((_, *command),), options) = calls.pop()
        assert command[2:] == [
            *("--num-gpus", "1", "--config-file", words[1], *flags, "MODEL.DEVICE", "cpu"),
        ]
        assert options["num_processes"] == 2


@pytest.mark.parametrize(
    "error, code",
    [
        (UserError("a key"), 2),
        (FileNotFoundError("a file"), 2),
        (UnexpectedResultsError("AP"), 1),
        (NonFiniteError("NaN"), 1),
        (DiskFullError("full"), 1),
        (TrainingStopped(15), 143),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(monkeypatch, capsys, error, code):
    def run(cfg, **options):
        raise error

    monkeypatch.setattr(train_net, "train", run)
    assert train_net.main(["SEED", "1"]) == code
    expected = "" if code == 143 else f"error: {error}\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("bug", [KeyError("x"), ValueError("x")])
def test_a_bug_keeps_its_traceback(monkeypatch, bug):
    def run(cfg, **options):
        raise bug

    monkeypatch.setattr(train_net, "train", run)
    with pytest.raises(type(bug)):
        train_net.main(["SEED", "1"])


@pytest.mark.parametrize("error", [ValueError("a bug"), UserError("a mistake")])
def test_the_error_that_ends_a_run_is_in_its_log(tmp_path, fakes, monkeypatch, capsys, error):
    """With its traceback, unless it is a user's mistake; the console has it only once."""

    def step(*args, **options):
        raise error

    monkeypatch.setattr(trainer, "train_step", step)
    opts = ["OUTPUT_DIR", str(tmp_path), "DATASETS.TRAIN", "('a',)", "DATASETS.TEST", "('b',)"]
    opts += ["MODEL.TENSOR_MASK.NUM_CLASSES", "2"]
    is_bug = not isinstance(error, UserError)
    if is_bug:
        with pytest.raises(ValueError, match="a bug"):
            train_net.main(opts)
    else:
        assert train_net.main(opts) == 2
    log = (tmp_path / "log.txt").read_text()
    assert f"ERROR {error}" in log
    assert ("Traceback" in log) is is_bug
    assert str(error) not in capsys.readouterr().out
