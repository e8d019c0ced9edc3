"""The documents name only what exists: links, paths, modules, config keys, command lines."""

import contextlib
import importlib
import inspect
import io
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tensormask.cli import COMMANDS
from tensormask.config import get_cfg
from tensormask.config.detectron2 import _IGNORED, _SWITCHED_OFF

ROOT = Path(__file__).parents[1]
PAGES = {str(p.relative_to(ROOT)): p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]}
COMMAND_LINE = re.compile(
    r"^(?:\w+=\S* )*(?:\S*python3? |torchrun .*?)?"
    r"(-m tensormask|tensormask|(?:tools|dev)/\w+\.py) (.*)",
    re.MULTILINE,
)
EACH_PAGE = pytest.mark.parametrize("page", PAGES)


def read(page: str) -> str:
    text = PAGES[page].read_text(encoding="utf-8")
    if page in ("CHANGELOG.md", "docs/migration.md"):
        # The first column of their tables has names that no longer exist, or those of detectron2.
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
    return re.sub("^::: .*$", "", text, flags=re.MULTILINE)  # mkdocstrings checks these names


def commands(text: str) -> list[list[str]]:
    """Return the command lines of the fenced blocks, from the name of the program on."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    shell = "\n".join(block for language, block in blocks if language in ("", "bash", "sh"))
    lines = COMMAND_LINE.findall(shell.replace("\\\n", " "))
    return [
        [program.removeprefix("-m "), *shlex.split(words, comments=True)]
        for program, words in lines
    ]


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def help_of(script: str, *subcommand: str) -> str:
    """Return the help of a script of dev/."""
    main = importlib.import_module(Path(script).stem).main  # pytest has dev/ on its path
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        main([*subcommand, "--help"])
    return printed.getvalue()


def command_of(program: str, words: list[str]) -> tuple[str, list[str]]:
    """Return the module of a command, given by `tensormask` or tools/*.py, and its arguments."""
    if program != "tensormask":
        source = (ROOT / program).read_text(encoding="utf-8")
        name = re.search(r'main\(\["(.*)", \*sys\.argv', source)[1]
        return COMMANDS[name.replace('", "', " ")][0], words
    length = 1 + (words[0] not in COMMANDS)
    return COMMANDS[" ".join(words[:length])][0], words[length:]


@EACH_PAGE
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if "://" not in link:
            target, _, anchor = link.partition("#")
            path = PAGES[page].parent / target if target else PAGES[page]
            assert path.exists(), link
            assert not anchor or anchor in anchors(path), link


@EACH_PAGE
def test_paths_of_the_repository(page):
    folders = "configs|csrc|dev|docs|tensormask|tests|tools"
    paths = re.findall(rf"(?<![\w/.])(?:{folders})/[\w./]*\.\w+", read(page))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def named(name: str) -> Any:
    """Return a module, or what it has under a name."""
    parts = name.split(".")
    value = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=2):
        if not hasattr(value, part):
            importlib.import_module(".".join(parts[:i]))
        value = getattr(value, part)
    return value


@EACH_PAGE
def test_modules_and_their_names(page):
    for name in set(re.findall(r"(?<![\w/.-])tensormask(?:\.[A-Za-z]\w*)+", read(page))):
        if name != "tensormask.json":  # a file in an archive
            named(name)


def test_migration_from_detectron2():
    """Our calls have these arguments, and no key of detectron2's that we treat is missing."""
    text = PAGES["docs/migration.md"].read_text(encoding="utf-8")
    calls = re.findall(r"`(tensormask(?:\.\w+)+)\(([^`]*)\)", text)
    assert len(calls) > 10
    for name, arguments in calls:
        parameters = inspect.signature(named(name)).parameters
        if "options" not in parameters:  # of build: tests/test_extending.py has them
            assert set(re.findall(r"(\w+)=", arguments)) <= set(parameters), name
    assert [key for key in (*_IGNORED, *_SWITCHED_OFF) if f"`{key}`" not in text] == []
    commands = re.findall(r"`tensormask ([a-z-]+(?: (?:data|windows)\b)?)", text)
    assert set(commands) <= set(COMMANDS)


@EACH_PAGE
def test_keys_of_the_config(page):
    cfg = get_cfg()
    for key in set(re.findall(r"(?<![\w.])[A-Z][A-Z\d_]+(?:\.[A-Z][A-Z\d_]+)+", read(page))):
        node = cfg
        for part in key.split("."):
            assert part in node, key
            node = node[part]


@EACH_PAGE
def test_command_lines(page):
    for program, *words in commands(read(page)):
        if program.startswith("dev/"):
            subcommand = words[:1] if program == "dev/benchmark.py" else []
            for word in words:
                option = word.strip("[]")
                if option.startswith("--"):
                    assert re.search(rf"{option}(?![\w-])", help_of(program, *subcommand)), words
        elif not words[0].startswith("-"):
            module, arguments = command_of(program, words)
            if arguments[-1:] == ["..."] and not arguments[-2].startswith("-"):
                del arguments[-1]
            parser = importlib.import_module(f"tensormask.commands.{module}").build_parser()
            get_cfg().merge_from_list(getattr(parser.parse_args(arguments), "opts", []))


def optional_dependencies() -> dict[str, list[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["optional-dependencies"]


@EACH_PAGE
def test_extras(page):
    extras = re.findall(r"(?:tensormask|\.)\[([a-z,-]+)\]", read(page))
    assert set(",".join(extras).split(",")) - {""} <= set(optional_dependencies())


def test_tables_of_commands_and_extras():
    rows = {page: re.findall(r"^\| `([^`]*)` ", read(page), re.MULTILINE) for page in PAGES}
    assert set(COMMANDS) <= set(rows["docs/commands.md"])
    assert set(optional_dependencies()) <= set(rows["docs/install.md"])


@EACH_PAGE
def test_targets_of_make(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", read(page), re.MULTILINE):
        assert f"\n{target}:" in makefile, target
