"""Pages of HTML: escaped, strict about names, self-contained, and images inside of them."""

import base64
import shutil
import sys

import cv2
import numpy as np
import pytest

from tensormask.utils.errors import UserError
from tensormask.visualization.html import page

jinja2 = pytest.importorskip("jinja2")


@pytest.fixture
def template(tmp_path, monkeypatch):
    """Return a function that makes a template with a content block."""
    shutil.copytree(page.TEMPLATES, tmp_path / "templates")
    monkeypatch.setattr(page, "TEMPLATES", tmp_path / "templates")

    def make(content: str) -> str:
        text = '{% extends "base.html.j2" %}{% block content %}' + content + "{% endblock %}"
        (tmp_path / "templates" / "a.html.j2").write_text(text)
        return "a.html.j2"

    return make


def test_a_page_escapes_values_and_has_all_names(template, tmp_path):
    path = page.write_page(tmp_path / "new" / "a.html", template("<p>{{ name }}</p>"), name="<ä>")
    html = path.read_text(encoding="utf-8")
    assert "<p>&lt;ä&gt;</p>" in html
    assert "default-src 'none'" in html
    with pytest.raises(jinja2.UndefinedError, match="nmae"):
        page.render(template("{{ nmae }}"), name="")


def test_images_are_inside():
    rgb = np.zeros((4, 6, 3), np.uint8)
    rgb[..., 0] = 250
    for quality, kind in ((None, "png"), (90, "jpeg")):
        head, _, code = page.image_uri(rgb, quality).partition(",")
        assert head == f"data:image/{kind};base64"
        image = cv2.imdecode(np.frombuffer(base64.b64decode(code), np.uint8), cv2.IMREAD_COLOR)
        assert image.shape == rgb.shape
        assert np.abs(image[..., ::-1].astype(int) - rgb).max() <= 5


def test_without_jinja2_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"tensormask\[report\]"):
        page.render("base.html.j2")
