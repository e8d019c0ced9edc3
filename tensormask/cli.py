"""The command `tensormask COMMAND ...`, also `python -m tensormask`.

A command's module is imported when the command is chosen, so that the list of commands is printed
without importing torch.
"""

import argparse
import importlib
import os
import sys

from tensormask import __version__
from tensormask.commands import EXIT_CLOSED, EXIT_INTERRUPTED, EXIT_MISTAKE, FILES
from tensormask.utils.console import escape_unencodable
from tensormask.utils.errors import nearest_name

SHELLS = ("bash", "zsh")

# Command: (module of tensormask.commands, summary).
COMMANDS = {
    "train": ("train", "train a model, and evaluate it"),
    "evaluate": ("evaluate", "evaluate a checkpoint on a data set"),
    "predict": ("predict", "detect and draw the objects in images"),
    "check": ("check", "report the contents and the issues of a data set"),
    "visualize data": ("visualize_data", "draw training images and the windows that match"),
    "visualize windows": ("visualize_windows", "draw the windows and masks of a model on an image"),
    "report": ("report", "make a page of one or several runs: curves, errors, images"),
    "plot-metrics": ("plot_metrics", "draw the curves of one or several runs"),
    "benchmark": ("benchmark", "measure the latency and memory of a model"),
    "analyze": ("analyze", "count parameters, FLOPs and activations of a model"),
    "convert-data": ("convert_data", "convert a data set of another format to COCO's"),
    "convert-weights": ("convert_weights", "write weights for detectron2, or in another format"),
    "export": ("export", "write a model as one graph: ONNX or torch.export"),
    "run-ablations": ("ablations", "train the rows of the paper's tables on one config"),
    "build-ops": ("build_ops", "compile the operators for the installed PyTorch"),
    "env": ("env", "print versions, devices and the operators in use"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the first words name, and return its exit code.

    Ctrl-C, and a closed stdout as in `tensormask --help | head -1`, end it without a traceback.
    """
    escape_unencodable()
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # At its exit, Python flushes again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CLOSED


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(describe())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"tensormask {__version__}")
        return 0
    if words[0] == "--print-completion":
        return _print_completion(words[1:])
    for length in (1, 2):
        if found := COMMANDS.get(" ".join(words[:length])):
            module = importlib.import_module(f"tensormask.commands.{found[0]}")
            return int(module.main(words[length:]))
    print(_unknown(words), file=sys.stderr)
    return EXIT_MISTAKE


def describe() -> str:
    """Return the usage and one line per command."""
    return "\n".join(
        [
            "usage: tensormask COMMAND ...",
            "",
            "Dense sliding-window instance segmentation.",
            "",
            *(f"  {name:<18} {summary}" for name, (_, summary) in COMMANDS.items()),
            "",
            "tensormask COMMAND --help describes a command; --version prints the version;",
            "--print-completion bash (or zsh) prints a script that completes commands and options.",
            "Example: tensormask train --config-file quickstart",
        ]
    )


def _print_completion(words: list[str]) -> int:
    if len(words) != 1 or words[0] not in SHELLS:
        print(f"error: --print-completion takes {' or '.join(SHELLS)}", file=sys.stderr)
        return EXIT_MISTAKE
    try:
        import shtab
    except ImportError:
        print("error: it needs shtab: pip install 'tensormask[completion]'", file=sys.stderr)
        return EXIT_MISTAKE
    program = argparse.ArgumentParser("tensormask")
    groups = {"": program.add_subparsers()}
    for name, (module, summary) in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        if group not in groups:
            groups[group] = groups[""].add_parser(group, help=summary).add_subparsers()
        parser = importlib.import_module(f"tensormask.commands.{module}").build_parser()
        for action in parser._actions:
            if action.metavar in FILES:
                vars(action)["complete"] = shtab.FILE
        groups[group].add_parser(last, help=summary, parents=[parser], add_help=False)
    print(shtab.complete(program, words[0]))
    return 0


def _unknown(words: list[str]) -> str:
    if inside := [name for name in COMMANDS if name.startswith(f"{words[0]} ")]:
        return f"error: say what to {words[0]}: tensormask {' or tensormask '.join(inside)}"
    return (
        f"error: {words[0]!r} is not a command; the nearest one is "
        f"{nearest_name(words[0], COMMANDS)}. "
        "tensormask --help lists all commands."
    )
