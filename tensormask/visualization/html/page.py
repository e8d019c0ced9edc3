"""Render templates to pages: one file of HTML each, which needs no other file and no network.

The templates are in `templates/`, and extend `base.html.j2`: colors for light and dark, and a
policy (CSP) by which a browser loads nothing from elsewhere. Values are escaped by default.
"""

import base64
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tensormask.utils.extras import require
from tensormask.utils.files import expand_home, write_atomically
from tensormask.visualization.grid import check_image

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """Return the HTML of a template, such as "report.html.j2", with values for its names.

    A str among the values is escaped; a `markupsafe.Markup` is HTML. In a script, write
    `{{ value | tojson }}`.

    Raises:
        UserError: jinja2 is not installed.
        jinja2.UndefinedError: the template uses a name without a value.
    """
    jinja2 = require("jinja2", extra="report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def write_page(path: str | Path, template: str, **values: Any) -> Path:
    """Write the page of `render` to a file in UTF-8, create its folder, and return its path."""
    path = Path(expand_home(path))
    content = render(template, **values).encode("utf-8", "backslashreplace")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(content))
    return path


def data_uri(content: bytes, media_type: str) -> str:
    """Return a file as a URL that contains it, such as for `<img src>`.

    Example:
        >>> data_uri(b"TensorMask", "text/plain")
        'data:text/plain;base64,VGVuc29yTWFzaw=='
    """
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def image_uri(rgb: np.ndarray, quality: int | None = 80) -> str:
    """Return a uint8 image `(H, W, 3)` as a URL: a JPEG of a quality in 1..100; None: a PNG.

    Raises:
        ValueError: an image that is not uint8 `(H, W, 3)`.
    """
    check_image(rgb)
    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    if quality is None:
        return data_uri(cv2.imencode(".png", bgr)[1].tobytes(), "image/png")
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    return data_uri(cv2.imencode(".jpg", bgr, options)[1].tobytes(), "image/jpeg")
