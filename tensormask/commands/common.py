"""What the commands share: their parser, the overrides of a config, errors of the user as one line.

Overrides are pairs `KEY VALUE`, which are accepted anywhere in a command line:

    tensormask predict MODEL.DEVICE cpu a.jpg --output out b.jpg TEST.DETECTIONS_PER_IMAGE 20
"""

import argparse
import functools
import json
import logging
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tensormask.commands import EXIT_MISTAKE, FILES
from tensormask.config import CfgNode, get_cfg
from tensormask.config.node import leaves
from tensormask.utils.errors import UserError
from tensormask.utils.files import expand_home

Main = Callable[[list[str] | None], int]


class CommandParser(argparse.ArgumentParser):
    """A parser that collects overrides in `opts` (see `add_overrides`) and shows an example.

    Args:
        command: its name, such as "train".
        example: the words after it.
    """

    def __init__(self, command: str, *, description: str, example: str, epilog: str = "") -> None:
        script = Path(sys.argv[0])
        prog = f"tools/{script.name}" if script.parent.name == "tools" else f"tensormask {command}"
        super().__init__(prog=prog, description=description, epilog=epilog)
        self.example = f"example: {prog} {example}"

    def format_help(self) -> str:
        return f"{super().format_help()}\n{self.example}\n"

    def error(self, message: str) -> NoReturn:
        more = f"{self.prog} --help shows all options"
        self.exit(EXIT_MISTAKE, f"{self.prog}: error: {message}\n{self.example}\n{more}\n")

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """Parse the words; `opts` is the list of overrides, and of words that are nothing else.

        Raises:
            UserError: a key without a value, or KEY=VALUE.
        """
        words = sys.argv[1:] if args is None else list(args)
        has_overrides = any(action.dest == "opts" for action in self._actions)
        words, overrides = self._split(words) if has_overrides else (words, [])
        parsed = self.parse_intermixed_args(words, namespace)
        if has_overrides:
            parsed.opts = [*overrides, *parsed.opts]
        for action in self._actions:
            if action.metavar in FILES:
                setattr(parsed, action.dest, _expanded(getattr(parsed, action.dest)))
        return parsed

    def _split(self, words: Sequence[str]) -> tuple[list[str], list[str]]:
        """Separate overrides from other words; after `--opts`, all words are overrides.

        The values of an option are never overrides, except from the second of a list on.
        """
        cfg, others, overrides = get_cfg(), list[str](), list[str]()
        todo, after_opts = deque(words), False
        while todo:
            word = todo.popleft()
            if word == "--":  # only names of files follow
                return [*others, word, *todo], overrides
            if word == "--opts":
                after_opts = True
            elif word.startswith("-"):
                others.append(word)
                others += [todo.popleft() for _ in range(min(len(todo), self._num_values(word)))]
            elif after_opts or is_key(word, cfg):
                if not todo or todo[0] in self._option_string_actions:
                    raise UserError(f"{word} has no value: overrides are pairs KEY VALUE")
                overrides += [word, todo.popleft()]
            else:
                others.append(word)
        return others, overrides

    def _num_values(self, option: str) -> int:
        """Return how many words after an option, which may be shortened, belong to it for sure."""
        names = self._option_string_actions
        matches = [option] if option in names else [n for n in names if n.startswith(option)]
        if not matches:  # also --option=value
            return 0
        nargs = names[matches[0]].nargs
        return nargs if isinstance(nargs, int) else int(nargs in (None, "+"))


def _expanded(value: Any) -> Any:
    """Apply `expand_home` to a path, or to those in a list."""
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    return type(value)(expand_home(value)) if value else value


def is_key(word: str, cfg: CfgNode) -> bool:
    """Return whether a word of a command line is a key of the config, maybe misspelled.

    It has the form of a key and begins with a group or key of the config. If a file of this name
    exists, only a key that exists is one: write ./SEED for a file SEED.

    Raises:
        UserError: it is KEY=VALUE, or a key in lower case that is no file.
    """
    if "." in word and word != word.upper() in dict(leaves(cfg)) and not os.path.exists(word):
        raise UserError(f"keys are in upper case: write {word.upper()}, not {word}")
    key, equals, value = word.partition("=")
    if not re.fullmatch(r"[A-Z][A-Z\d_]*(\.[A-Z\d_]+)*", key) or key.split(".")[0] not in cfg:
        return False
    if os.path.exists(word):
        return word in dict(leaves(cfg))
    if equals:
        raise UserError(f"overrides are pairs KEY VALUE: write {key} {value}, not {word}")
    return True


def add_config_file(parser: argparse._ActionsContainer, default: str | None = None) -> None:
    """Add the option `--config-file`, which is required if it has no default."""
    parser.add_argument(
        "--config-file",
        required=default is None,
        default=default,
        metavar="FILE",
        help="YAML config, or the name of one, such as tensormask_R_50_FPN_1x"
        + (f" (default: {default})" if default else ""),
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the overrides `KEY VALUE`, as `opts`; a `CommandParser` accepts them anywhere."""
    parser.add_argument(
        "opts",
        nargs="*",
        default=[],  # without it, errors of argparse name KEY VALUE as required
        metavar="KEY VALUE",
        help="overrides of the config, anywhere in the command line; after --opts, all words are",
    )


def add_size(parser: argparse.ArgumentParser) -> None:
    """Add the option `--size`, (height, width) of the input images."""
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        default=(800, 1344),
        metavar=("H", "W"),
        help="of the images, in pixels (default: 800 1344)",
    )


def read_config(config_file: str | Path, overrides: list) -> CfgNode:
    """Return the config of a file with overrides, `[KEY, VALUE, ...]`."""
    cfg = get_cfg()
    cfg.merge_from_file(str(config_file))
    cfg.merge_from_list(overrides)
    name_splits(cfg)
    return cfg


def name_splits(cfg: CfgNode) -> None:
    """Write into a config which split each `data.yaml` of YOLO stands for."""
    from tensormask.data.catalog import with_splits  # not for commands without a config

    sets = cfg.DATASETS
    train, test = with_splits(sets.TRAIN, sets.TEST)
    sets.TRAIN, sets.TEST = tuple(train), tuple(test)


def log_to_stderr(form: str = "%(message)s") -> None:
    """Show the messages of this package on stderr, of other packages only warnings."""
    logging.basicConfig(format=form)
    logging.getLogger("tensormask").setLevel(logging.INFO)


def write_json(path: str, content: object) -> None:
    """Write to the file of an option `--json`; "" or None writes nothing."""
    if path:
        Path(expand_home(path)).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def exits_on_user_error(main: Main) -> Main:
    """Decorate a `main`: print a `UserError` or `OSError` as one line, and return exit code 2."""

    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None) -> int:
        try:
            return main(arguments)
        except BrokenPipeError:  # of stdout, which `cli.main` handles
            raise
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_MISTAKE

    return wrapped
