"""The command `tensormask`: its list, its dispatch, and overrides anywhere in a command line."""

import argparse
import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import tensormask
from tensormask import cli
from tensormask.commands import train
from tensormask.commands.common import (
    CommandParser,
    add_config_file,
    add_overrides,
    exits_on_user_error,
)
from tensormask.config import get_cfg
from tensormask.utils.errors import UserError

ROOT = Path(__file__).parents[1]
LIST_OF_COMMANDS = """
import sys, tensormask.cli
code = tensormask.cli.main(["--help"])
dir(tensormask)
assert code == 0 and "torch" not in sys.modules
"""
WITHOUT_ARGUMENTS = {"env", "build-ops"}


def test_commands_are_listed_without_importing_torch():
    done = subprocess.run(
        [sys.executable, "-c", LIST_OF_COMMANDS], capture_output=True, text=True, check=True
    )
    for name, (_, summary) in cli.COMMANDS.items():
        assert f"{name} " in done.stdout
        assert summary in done.stdout


@pytest.mark.parametrize(
    "words", [["-m", "tensormask", "--help"], ["tools/demo.py", "--help"]], ids=" ".join
)
@pytest.mark.skipif(os.name != "posix", reason="SIGPIPE")
def test_a_closed_stdout(words):
    """`tensormask --help | true` ends without a traceback."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, *words],
        stdout=write,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_closed_stdout_is_no_mistake():
    @exits_on_user_error
    def main(arguments):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        main([])


def test_words_of_the_program_itself(capsys):
    assert cli.main([]) == 0
    assert capsys.readouterr().out == f"{cli.describe()}\n"
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tensormask {tensormask.__version__}\n"
    assert cli.main(["trian"]) == 2
    assert "'trian' is not a command; the nearest one is train" in capsys.readouterr().err
    assert cli.main(["visualize"]) == 2
    assert "tensormask visualize data or " in capsys.readouterr().err
    assert cli.main(["env"]) == 0
    assert "  on cpu " in capsys.readouterr().out


def test_completion(capsys):
    assert cli.main(["--print-completion", "fish"]) == 2
    assert "bash or zsh" in capsys.readouterr().err
    pytest.importorskip("shtab")
    assert cli.main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    words = [
        "bash",
        "-c",
        f"{script}\nCOMP_WORDS=(tensormask visualize windows --we); COMP_CWORD=3\n"
        '_shtab_tensormask; echo "${COMPREPLY[@]}"',
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "--weights\n"


def test_completion_without_shtab_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["--print-completion", "bash"]) == 2
    assert "tensormask[completion]" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_says_its_name_and_what_it_needs(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*name.split(), "--help"])
    assert capsys.readouterr().out.startswith(f"usage: tensormask {name} ")
    if name not in WITHOUT_ARGUMENTS:
        with pytest.raises(SystemExit, match="2"):
            cli.main(name.split())
        first, example, _ = capsys.readouterr().err.splitlines()
        assert first.startswith(f"tensormask {name}: error: ")
        assert "KEY" not in first
        assert example.startswith(f"example: tensormask {name} ")


@pytest.mark.parametrize("name", [n for n in cli.COMMANDS if n not in WITHOUT_ARGUMENTS])
def test_an_example_is_a_command_line_of_its_parser(name):
    parser = importlib.import_module(f"tensormask.commands.{cli.COMMANDS[name][0]}").build_parser()
    words = parser.example.replace('"', "").split()[1 + 1 + len(name.split()) :]
    get_cfg().merge_from_list(getattr(parser.parse_args(words), "opts", []))


def test_a_config_without_its_option(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "quickstart", "OUTPUT_DIR", "output/mine"])
    assert "name a config with --config-file" in capsys.readouterr().err


def test_a_script_of_tools_has_its_own_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/tools/train_net.py"])
    assert train.build_parser().prog == "tools/train_net.py"


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda p: p.stem)
def test_a_script_of_tools_can_be_imported(monkeypatch, path):
    calls = []
    monkeypatch.setattr(cli, "main", lambda arguments: calls.append(arguments) or 7)
    assert runpy.run_path(str(path))["main"](["a", "b"]) == 7
    ((*command, first, last),) = calls
    assert " ".join(command) in cli.COMMANDS
    assert (first, last) == ("a", "b")


def test_evaluate_is_train_with_eval_only(monkeypatch):
    calls = []
    monkeypatch.setattr(train, "evaluate_only", lambda cfg, resume: calls.append((cfg, resume)))
    assert cli.main(["evaluate", "--resume", "SEED", "5", "MODEL.DEVICE", "cpu"]) == 0
    ((cfg, resume),) = calls
    assert (cfg.SEED, resume) == (5, True)


def parse(line: str) -> argparse.Namespace:
    parser = CommandParser("test", description="", example="")
    add_config_file(parser, default="")
    parser.add_argument("inputs", nargs="*")
    parser.add_argument("--more", nargs="+")
    parser.add_argument("--size", nargs=2)
    parser.add_argument("--output")
    parser.add_argument("--fast", action="store_true")
    add_overrides(parser)
    return parser.parse_args(line.split())


@pytest.mark.parametrize(
    "line, inputs, opts",
    [
        ("SEED 1 a.jpg --fast b.jpg VERSION 2 c.jpg", "a.jpg b.jpg c.jpg", "SEED 1 VERSION 2"),
        ("a.jpg SOLVER.BASE_LRR 1", "a.jpg", "SOLVER.BASE_LRR 1"),  # the config names the nearest
        ("MODEL 1", "", "MODEL 1"),  # a group
        ("IMG.JPG INDEX MODEL.pth s@SEED", "IMG.JPG INDEX MODEL.pth s@SEED", ""),
        ("SOLVER.BASE_LR -1e-5 SEED -1", "", "SOLVER.BASE_LR -1e-5 SEED -1"),
        ("DATASETS.TRAIN ['a.json@b']", "", "DATASETS.TRAIN ['a.json@b']"),
        ("OUTPUT_DIR SEED", "", "OUTPUT_DIR SEED"),
        ("--output SEED a.jpg", "a.jpg", ""),
        ("--outp SEED a.jpg", "a.jpg", ""),
        ("--output=SEED a.jpg", "a.jpg", ""),
        ("--size 1 SEED --more SEED x SEED 1 --fast a.jpg", "a.jpg", "SEED 1"),
        ("a.jpg --opts NO.KEY 1 --output x SEED 2", "a.jpg", "NO.KEY 1 SEED 2"),
        ("SEED 1 -- SEED 2", "SEED 2", "SEED 1"),
    ],
)  # fmt: skip
def test_overrides_anywhere(line, inputs, opts):
    args = parse(line)
    assert (" ".join(args.inputs), " ".join(args.opts)) == (inputs, opts)


@pytest.mark.parametrize(
    "line, message",
    [
        ("a.jpg SOLVER.MAX_ITER=3", "write SOLVER.MAX_ITER 3"),
        ("a.jpg SEED", "SEED has no value"),
        ("a.jpg model.device cpu", "write MODEL.DEVICE"),
        ("SEED --fast", "SEED has no value"),
    ],
)
def test_mistakes_in_overrides(line, message):
    with pytest.raises(UserError, match=message):
        parse(line)


def test_a_file_with_the_form_of_a_key(tmp_path, monkeypatch):
    """It is a file, unless there is such a key."""
    monkeypatch.chdir(tmp_path)
    for name in ("TEST.JPG", "MODEL", "SEED", "TEST=1"):
        (tmp_path / name).touch()
    args = parse("TEST.JPG MODEL TEST=1 ./SEED SEED 1")
    assert args.inputs == ["TEST.JPG", "MODEL", "TEST=1", "./SEED"]
    assert args.opts == ["SEED", "1"]


def test_public_names():
    assert set(tensormask.__all__) <= set(dir(tensormask))
    for name in tensormask.__all__:
        assert getattr(tensormask, name).__doc__
    assert tensormask.layers.swap_align2nat
    with pytest.raises(AttributeError, match="no attribute 'layer'"):
        tensormask.layer  # noqa: B018
