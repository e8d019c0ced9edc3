"""A hook of MkDocs: links to files of the repository outside of docs/ work in the site, too.

Each file that a page links becomes a page below `repository/`: a document as it is, any other file
as a listing, a folder as a list of its files. MkDocs checks the links that result.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
# Code stays as it is, so that links are what is left.
CODE_OR_LINK = re.compile(
    r"^(?P<fence>```+|~~~+).*?^(?P=fence)$"
    r"|(?P<code>`+)(?!`)(?:(?!\n\n).)+?(?<!`)(?P=code)(?!`)"
    r"|(?<=\]\()(?P<link>[^)\s#]*)(?P<anchor>#[^)\s]*)?(?=\))",
    re.MULTILINE | re.DOTALL,
)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".cff": "yaml"}
NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"


def on_files(files, config):
    """Add a page for each file outside of docs/ that is linked, directly or by such a page."""
    waiting = [
        (f"docs/{page.src_uri}", page.content_string) for page in files.documentation_pages()
    ]
    waiting += [(path, content_of(path)) for path in in_nav(config.nav)]
    seen = {path for path, _ in waiting}
    while waiting:
        path, content = waiting.pop()
        if not path.startswith("docs/"):
            files.append(File.generated(config, uri_of(path), content=content))
        linked = targets(path, content) if path.endswith(".md") else children(path)
        for target in linked - seen:
            if (ROOT / target).exists() and not target.startswith("docs/"):
                seen.add(target)
                waiting.append((target, content_of(target)))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Point the links of a document to the pages of the site."""
    uri = page.file.src_uri
    path = uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"
    return relinked(markdown, path) if (ROOT / path).is_file() else markdown


def in_nav(nav) -> list[str]:
    """Return the files of the repository, outside of docs/, that the navigation names."""
    if isinstance(nav, str):
        return [nav.removeprefix("repository/")] if nav.startswith("repository/") else []
    items = nav.values() if isinstance(nav, dict) else nav
    return [path for item in items for path in in_nav(item)]


def uri_of(path: str) -> str:
    """Return the file of the site that shows a file of the repository.

    Example:
        >>> uri_of("docs/training.md"), uri_of("CHANGELOG.md"), uri_of("tensormask/cli.py")
        ('training.md', 'repository/CHANGELOG.md', 'repository/tensormask/cli.py.md')
    """
    if path.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def content_of(path: str) -> str:
    """Return the page of a file or folder outside of docs/."""
    if (ROOT / path).is_dir():
        names = [posixpath.basename(child) for child in sorted(children(path))]
        folder = posixpath.basename(path)
        rows = [f"- [{name}]({folder}/{name}.md)" for name in names]
        return NOT_SEARCHED + f"# {path}\n\n" + "\n".join(rows)
    content = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return content
    language = LANGUAGES.get(Path(path).suffix, "text")
    return NOT_SEARCHED + f"# {path}\n\n~~~~~~~~ {language}\n{content}~~~~~~~~\n"


def children(path: str) -> set[str]:
    """Return the sources of a folder; none of a file."""
    folder = ROOT / path
    found = [f for f in folder.iterdir() if f.suffix in LANGUAGES] if folder.is_dir() else []
    return {f"{path}/{file.name}" for file in found}


def targets(path: str, text: str) -> set[str]:
    """Return the paths in the repository that a document links."""
    links = [match["link"] for match in CODE_OR_LINK.finditer(text) if match["link"]]
    return {resolved(path, link) for link in links if "://" not in link}


def resolved(path: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def relinked(text: str, path: str) -> str:
    """Return the text of a document of the repository with the links that it has in the site."""
    folder = posixpath.dirname(uri_of(path))

    def replaced(match: re.Match) -> str:
        link = match["link"]
        if not link or ":" in link:
            return match[0]
        target = resolved(path, link)
        return posixpath.relpath(uri_of(target), folder or ".") + (match["anchor"] or "")

    return CODE_OR_LINK.sub(replaced, text)
