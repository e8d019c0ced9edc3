"""The site of the docs: options from comments, links to files of the repository, the notebook."""

import re
from types import SimpleNamespace

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from website import notebooks, offline, options, repository

import tensormask
from tensormask import data, evaluation, layers, modeling
from tensormask.config import get_cfg
from tensormask.config.node import leaves

ROOT = repository.ROOT


def test_every_option_has_its_default_and_its_comment():
    """Once each, in the group that it belongs to, and no text is of another key's."""
    page = options.tables(options.read_options(options.SOURCE.read_text(encoding="utf-8")))
    for key, default in leaves(get_cfg()):
        (row,) = (line for line in page.splitlines() if f'<code id="{key}">' in line)
        keys, meaning = re.match(r"\| (.*?) \| (.*) \|$", row).groups()
        name = key.rpartition(".")[2]
        text = f'<code id="{key}">{name}</code> `{options.text_of(default)}`'
        assert text in keys.split("<br>")
        assert len(meaning) > 10, key
        group = key.rpartition(".")[0] or "General"
        assert page.index(f"\n## {group}\n") < page.index(row), key


def test_comments_of_options():
    """Keys below a comment share it; names of keys become links, values code."""
    source = (
        "_DEFAULTS: dict = {\n"
        '    # The "auto" | FL* of\n    # MAX_ITER and TEST.MAX_DETS.\n'
        '    "SEED": 1,\n    "OUTPUT_DIR": "",\n'
        '    "SOLVER": {\n        # Of MAX_ITER.\n        "GAMMA": 1,\n    },\n}\n'
    )
    both, one = options.read_options(source)
    assert both == ("", ["SEED", "OUTPUT_DIR"], 'The "auto" | FL* of MAX_ITER and TEST.MAX_DETS.')
    keys = dict(leaves(get_cfg()))
    assert options.formatted(both.comment, "", keys) == (
        'The `"auto"` \\| FL\\* of MAX_ITER and [`TEST.MAX_DETS`](#TEST.MAX_DETS).'
    )
    assert options.formatted(one.comment, one.group, keys) == "Of [`MAX_ITER`](#SOLVER.MAX_ITER)."
    with pytest.raises(AssertionError, match=r"SOLVER\.GAMMA has no comment"):
        options.read_options(source.replace("        # Of MAX_ITER.\n", ""))


def test_names_of_options_are_links():
    text = (
        "`SEED` `SOLVER.STEPS` `TEST.AUG.FLIP True` [`TEST.AMP.DTYPE`](a.md) `MODEL.RPN.IN`\n"
        "``` text\n`SOLVER.GAMMA`\n```\n~~~~\n`SOLVER.GAMMA`\n~~~~\n``SOLVER.GAMMA``\n"
    )
    assert options.linked(text, "../configuration.md") == text.replace(
        "`SOLVER.STEPS`", "[`SOLVER.STEPS`](../configuration.md#SOLVER.STEPS)"
    ).replace("`TEST.AUG.FLIP True`", "[`TEST.AUG.FLIP True`](../configuration.md#TEST.AUG.FLIP)")


def test_links_lead_to_pages_of_the_site():
    text = (
        "[a](predict.md#results) [b](../MODEL_ZOO.md) [c](../tensormask/cli.py) [d](tour.ipynb)\n"
        "`[e](../setup.py)` [f](#here) [g](https://pytorch.org/x.md)\n"
        "```\n[h](../setup.py)\n```\n"
    )
    assert repository.relinked(text, "docs/training.md") == text.replace(
        "../MODEL_ZOO.md", "repository/MODEL_ZOO.md"
    ).replace("../tensormask/cli.py", "repository/tensormask/cli.py.md").replace(
        "tour.ipynb", "tour.md"
    )
    assert repository.relinked("[a](docs/predict.md#x)", "README.md") == "[a](../predict.md#x)"
    assert repository.targets("docs/training.md", text) == {
        *("docs/predict.md", "docs/tour.ipynb", "MODEL_ZOO.md", "tensormask/cli.py"),
    }


def test_a_page_that_needs_the_network_is_reported(caplog):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="a.md"))
    offline.on_post_page('<a href="https://a.org">a</a><img src="a.png">', page)
    assert not caplog.records
    for tag in ('<script src="https://a.org/a.js">', '<link href=//a.org/a.css rel="stylesheet">'):
        offline.on_post_page(tag, page)
        assert "a.md needs the network" in caplog.records.pop().message


def test_a_notebook_is_a_page_with_its_outputs():
    data = {"image/jpeg": "/9j/", "text/plain": "<Image>"}
    outputs = [
        new_output("stream", text="one\n"),
        new_output("display_data", data=data),
        new_output("execute_result", data={"text/plain": "3"}),
    ]
    cells = [new_markdown_cell("# Title"), new_code_cell("f()", outputs=outputs)]
    page, images = notebooks.page_of(new_notebook(cells=cells), "tour")
    assert page == (
        "# Title\n\n```python\nf()\n```\n\n```{.text .output}\none\n```\n\n"
        "![Output of the cell above](tour_1.jpg)\n\n```{.text .output}\n3\n```\n"
    )
    assert images == {"tour_1.jpg": b"\xff\xd8\xff"}


@pytest.mark.slow
def test_the_site_is_built_without_warnings(tmp_path):
    """As by `make docs`, where a warning is an error."""
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"))
    assert config.strict
    build(config)
    options_page = (tmp_path / "site" / "configuration.html").read_text(encoding="utf-8")
    assert 'id="SOLVER.BASE_LR"' in options_page
    pages = (tmp_path / "site" / "reference").glob("*.html")
    reference = "".join(page.read_text(encoding="utf-8") for page in pages)
    for module in (tensormask, layers, modeling, data, evaluation):
        for name in {*module.__all__} - {"UPSCALE_MODES"}:  # a constant, which has no docstring
            assert re.search(rf'id="tensormask\.[\w.]*\b{name}"', reference), name
    assert (tmp_path / "site" / "repository" / "tensormask" / "checkpoint" / "zoo.py.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("link", ["#nowhere", "b.md", "b.md#nowhere", "../nowhere.py"])
def test_dead_links_are_warnings(link, tmp_path, caplog):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text(f"# Title\n\n[a]({link})\n")
    if "#" in link:
        (docs / "b.md").write_text("# B\n")
    nav = sorted(page.name for page in docs.iterdir())
    folders = {"docs_dir": str(docs), "site_dir": str(tmp_path / "site")}
    config = load_config(str(ROOT / "mkdocs.yml"), nav=nav, extra_css=[], **folders)
    with pytest.raises(Abort, match="Aborted with 1 warnings in strict mode"):
        build(config)
    (warning,) = (r.message for r in caplog.records if r.levelname == "WARNING")
    assert link.removeprefix("../") in warning
