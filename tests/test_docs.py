"""The documents name only what exists: links, paths, modules, config keys, command-line options."""

import contextlib
import importlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from tensormask.config import get_cfg

ROOT = Path(__file__).parents[1]
PAGES = {str(p.relative_to(ROOT)): p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
EACH_PAGE = pytest.mark.parametrize("page", PAGES)


def read(page: str) -> str:
    text = PAGES[page].read_text(encoding="utf-8")
    if page == "CHANGELOG.md":  # the first column of its tables has names that no longer exist
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
    return text


def commands(text: str) -> list[list[str]]:
    """Return the command lines of the fenced blocks, split into words."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = (
        "\n".join(block for language, block in blocks if not language)
        .replace("\\\n", " ")
        .splitlines()
    )
    return [shlex.split(line, comments=True) for line in lines if re.search(r"\w+/\w+\.py ", line)]


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def help_of(script: str, *subcommand: str) -> str:
    """Return the help of a script of tools/ or dev/."""
    if script.startswith("tools/"):
        source = (ROOT / script).read_text(encoding="utf-8")
        module = re.search(r"from (tensormask\.commands\.\w+) import main", source)[1]
    else:
        module = Path(script).stem  # pytest has dev/ on its path
    main = importlib.import_module(module).main
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        main([*subcommand, "--help"])
    return printed.getvalue()


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


@EACH_PAGE
def test_modules_and_their_names(page):
    for name in set(re.findall(r"(?<![\w/.-])tensormask(?:\.[A-Za-z]\w*)+", read(page))):
        parts = name.split(".")
        value = importlib.import_module(parts[0])
        for i, part in enumerate(parts[1:], start=2):
            if not hasattr(value, part):
                importlib.import_module(".".join(parts[:i]))
            value = getattr(value, part)


@EACH_PAGE
def test_keys_of_the_config(page):
    cfg = get_cfg()
    for key in set(re.findall(r"(?<![\w.])[A-Z][A-Z\d_]+(?:\.[A-Z][A-Z\d_]+)+", read(page))):
        node = cfg
        for part in key.split("."):
            assert part in node, key
            node = node[part]


@EACH_PAGE
def test_options_of_commands(page):
    for words in commands(read(page)):
        start = next(i for i, word in enumerate(words) if re.fullmatch(r"\w+/\w+\.py", word))
        script, arguments = words[start], words[start + 1 :]
        subcommand = arguments[:1] if script == "dev/benchmark.py" else []
        for word in arguments:
            option = word.strip("[]")
            if option.startswith("--"):
                assert re.search(rf"{option}(?![\w-])", help_of(script, *subcommand)), words


@EACH_PAGE
def test_targets_of_make(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", read(page), re.MULTILINE):
        assert f"\n{target}:" in makefile, target
