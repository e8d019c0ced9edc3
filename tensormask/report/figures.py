"""Figures as inline SVG by matplotlib. Colors are variables of the page, for light and dark."""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tensormask.report.curves import Curve
from tensormask.utils.errors import shorten
from tensormask.utils.extras import require

NUM_COLORS = 6  # --c0 ... --c5 of base.html.j2
_SIZE = (4.2, 2.6)  # inches, of a panel; a page scales it
# Colors that matplotlib writes, and that become variables. No other color is drawn.
_VARIABLES = {
    "#100001": "--text",
    "#100002": "--muted",
    "#100003": "--line",
    **{f"#20000{number}": f"--c{number}" for number in range(NUM_COLORS)},
}
_TEXT, _MUTED, _LINE, *_COLORS = _VARIABLES
_STYLE = {
    "svg.fonttype": "none",  # text, in the font of the page
    "svg.hashsalt": "tensormask",  # the same names in every run
    "text.parse_math": False,  # names can contain $
    "font.size": 10,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.titlecolor": _TEXT,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "text.color": _TEXT,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
_MAX_NAME = 24  # characters in a legend
_LINES = ("-", "--", ":", "-.")  # beyond six curves


def draw_curves(title: str, curves: Mapping[str, Curve | None]) -> str:
    """Return the SVG of a metric over iterations, a curve for each run that has it.

    Args:
        curves: by run, in the order of their colors.
    """
    with _matplotlib():
        figure, axis = _panel(title)
        for number, curve in enumerate(curves.values()):
            if curve is not None:
                marker = "o" if len(curve[0]) <= 20 else None
                axis.plot(*curve, marker=marker, markersize=3, **_line(number))
        axis.set_xlabel("iterations")
        axis.margins(x=0.02)
        return _to_svg(figure, f"{title} over iterations")


def draw_precision(
    title: str, curves: Mapping[str, Sequence[float]], *, legend: bool = True
) -> str:
    """Return the SVG of precision over recall, both from 0 to 1.

    Args:
        curves: by name, precisions at evenly spread recalls from 0 to 1.
        legend: name the curves in the figure.
    """
    with _matplotlib():
        figure, axis = _panel(title)
        for number, precision in enumerate(curves.values()):
            recalls = [index / (len(precision) - 1) for index in range(len(precision))]
            axis.plot(recalls, precision, **_line(number))
        axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
        if legend and curves:
            # Given apart: of labels of lines, those that begin with _ are left out.
            names = [shorten(name, _MAX_NAME) for name in curves]
            figure.legend(axis.lines, names, loc="outside lower left", ncols=3, handlelength=1.2)
        return _to_svg(figure, f"{title}: precision over recall")


def _matplotlib() -> Any:
    matplotlib = require("matplotlib", extra="report")
    return matplotlib.rc_context(_STYLE)


def _panel(title: str) -> tuple[Any, Any]:
    # Without pyplot: no backend, and no state that is left behind.
    figure = require("matplotlib.figure", extra="report").Figure(_SIZE, layout="constrained")
    axis = figure.add_subplot()
    axis.set_title(title, loc="left")
    return figure, axis


def _line(number: int) -> dict[str, Any]:
    style = _LINES[number // NUM_COLORS % len(_LINES)]
    return {"color": _COLORS[number % NUM_COLORS], "linestyle": style, "linewidth": 1.6}


def _to_svg(figure: Any, description: str) -> str:
    """Return the element `svg`, without a size of its own, with names of the page's colors."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the page's fonts have more letters
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every figure
    head, _, body = svg.partition(">")
    (view_box,) = re.findall(r'viewBox="[^"]*"', head)
    head = f'<svg {view_box} role="img" aria-label="{escape(description)}">'
    body = re.sub(r"font-family: [^;]*; ", "", body)
    body = re.sub("|".join(_VARIABLES), lambda color: f"var({_VARIABLES[color[0]]})", body)
    return head + body
