"""A hook of MkDocs: docs/configuration.md gets its tables, from the comments in the source.

On other pages, the names of options become links to them.
"""

import ast
import posixpath
import re
from pathlib import Path
from typing import NamedTuple

from tensormask.config import get_cfg
from tensormask.config.node import leaves

SOURCE = Path(__file__).parents[2] / "tensormask" / "config" / "defaults.py"
MARK = "<!-- options -->"
# A fenced block, code as the text of a link, or a full key in code, perhaps with a value.
FULL_KEY = re.compile(
    r"^(```+|~~~+).*?^\1$|\[`[^`]*`\]"
    r"|(?<!`)`(?P<key>[A-Z][A-Z\d_]+(?:\.[A-Z][A-Z\d_]+)+)\b[^`\n]*`(?!`)",
    re.MULTILINE | re.DOTALL,
)
KEY = re.compile(r"\b[A-Z][A-Z\d_]+(?:\.[A-Z][A-Z\d_]+)*\b")


class Options(NamedTuple):
    """Neighbouring keys of a group that one comment describes."""

    group: str  # "" for keys of the top
    keys: list[str]  # full names
    comment: str


def on_page_markdown(markdown: str, page, **_) -> str:
    """Put the tables in place of the mark, or links to them."""
    if page.file.src_uri != "configuration.md":
        folder = posixpath.dirname(page.file.src_uri)
        return linked(markdown, posixpath.relpath("configuration.md", folder or "."))
    before, mark, after = markdown.partition(MARK)
    if not mark:
        raise ValueError(f"docs/configuration.md: no {MARK}")
    return before + tables(read_options(SOURCE.read_text(encoding="utf-8"))) + after


def linked(markdown: str, target: str) -> str:
    """Return a page with links from the names of options to their rows in the tables."""
    keys = dict(leaves(get_cfg()))

    def link(match: re.Match) -> str:
        return f"[{match[0]}]({target}#{match['key']})" if match["key"] in keys else match[0]

    return FULL_KEY.sub(link, markdown)


def read_options(source: str) -> list[Options]:
    """Return the options in their order. A key without a comment belongs to the last one."""
    lines = source.splitlines()
    found: list[Options] = []

    def visit(node: ast.Dict, group: str) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            full_key = f"{group}.{key.value}".lstrip(".")
            if isinstance(value, ast.Dict):
                visit(value, full_key)
                continue
            start = end = key.lineno - 1
            while lines[start - 1].lstrip().startswith("#"):
                start -= 1
            comment = " ".join(line.strip(" #") for line in lines[start:end])
            if comment:
                found.append(Options(group, [], comment))
            assert found[-1].group == group, f"{full_key} has no comment"
            found[-1].keys.append(full_key)

    (tree,) = (n for n in ast.parse(source).body if isinstance(n, ast.AnnAssign))
    visit(tree.value, "")
    return found


def tables(options: list[Options]) -> str:
    """Return a heading and a table for each group, in their order; the keys of the top first."""
    defaults = dict(leaves(get_cfg()))
    groups = sorted({o.group for o in options}, key=[o.group for o in options].index)
    parts = []
    for group in sorted(groups, key=bool):
        parts.append(f"\n## {group or 'General'}\n\n<div class='options' markdown>\n")
        parts.append("| key, default | meaning |\n|---|---|")
        for row in (o for o in options if o.group == group):
            keys = "<br>".join(
                f'<code id="{key}">{key.rpartition(".")[2]}</code> `{text_of(defaults[key])}`'
                for key in row.keys
            )
            parts.append(f"| {keys} | {formatted(row.comment, group, defaults)} |")
        parts.append("\n</div>")
    return "\n".join(parts) + "\n"


def text_of(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def formatted(comment: str, group: str, keys) -> str:
    """Return a comment in Markdown: values in quotes as code, and names of keys as links."""

    def link(match: re.Match) -> str:
        parts = group.split(".") if group else []
        for length in range(len(parts), -1, -1):
            full_key = ".".join([*parts[:length], match[0]])
            if full_key in keys:
                return f"[`{match[0]}`](#{full_key})"
        return match[0]

    words = re.split(r'("[^"]*")', comment)
    words[1::2] = [f"`{word}`" for word in words[1::2]]
    words[::2] = [KEY.sub(link, re.sub(r"([*<|])", r"\\\1", word)) for word in words[::2]]
    return "".join(words)
