"""Templates of the HTML pages, number formats, and figures in the colours of the page."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jinja2

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Placeholders for the CSS colours of the page, which depend on light or dark mode.
COLORS = {"ink": "#010203", "faint": "#010204", "torch": "#010205", "jax": "#010206"}

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mooshak",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.color": COLORS["faint"],
    "xtick.color": COLORS["ink"],
    "ytick.color": COLORS["ink"],
    "axes.edgecolor": COLORS["ink"],
    "axes.labelcolor": COLORS["ink"],
    "text.color": COLORS["ink"],
    "lines.solid_capstyle": "round",
}


@contextmanager
def themed(width: float, height: float) -> Iterator["Figure"]:
    """Yield a figure of this size in inches, in the style of the page; `svg` converts it."""
    # Late: matplotlib takes half a second to import, which --help does not need.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def svg(figure: "Figure") -> str:
    """Return a figure as an SVG element that takes its size and its colours from the page."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for name, color in COLORS.items():
        text = text.replace(color, f"var(--{name})")
    # The page sets the size: only the view box remains.
    return re.sub(r'^(<svg [^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r"\1\2", text)


def power(value: float) -> str:
    """Format a number as 2 × 10⁻⁵ instead of 2e-05."""
    if value == 0 or value != value:
        return f"{value:g}"
    digits, exponent = f"{value:.1e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{digits.removesuffix('.0')} × 10{raised}"


TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("mooshak.report", "."),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["power"] = power
