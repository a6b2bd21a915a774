"""Axes without clutter, and figures as SVG that takes its ink from the page (light or dark)."""

import io
from html import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.rcParams.update(
    {"svg.fonttype": "none", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
)

INK = "#767676"
"""Legible on white and on black; on a page of our own it becomes the colour of the text."""
BLUE, ORANGE = "#3b82c4", "#d9822b"


def new(width: float = 6.2, height: float = 3.0) -> tuple[Figure, Axes]:
    """A figure of one plot, in inches at 72 units each."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    inked(axes)
    return figure, axes


def inked(axes: Axes) -> None:
    """Draw what is no data in the colour of the ink."""
    axes.tick_params(colors=INK, which="both")
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.title.set_color(INK)
    for spine in axes.spines.values():
        spine.set_color(INK)


def svg(figure: Figure) -> str:
    """The figure as an SVG element, for a file or a page."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def inline(figure: Figure, label: str) -> str:
    """The figure as part of a page: in the page's ink, and with a sentence for those who do not see it."""
    text = svg(figure).replace(INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label, quote=True)}"', 1)


def png(figure: Figure) -> bytes:
    """The figure as a picture of its own, on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()
