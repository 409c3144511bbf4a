"""Figures as inline SVG: text stays text, and takes the page's font and colour, in light and in dark mode."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from ..analysis.drawing import STYLES, Series, add_heat_map, add_lines, add_omega, new_figure, plain_axes
from ..analysis.omega import StackOmega


# Stands for the page's text colour, which CSS knows and matplotlib does not
_INK = "#010203"
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
_PARAMETERS: Any = dict.fromkeys(_INKED, _INK) | {
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.linewidth": 0.6,
    "axes.formatter.useoffset": False,
    "font.size": 9,
}
# Most points of a line; more cannot be seen, and make the page large
MAX_POINTS = 400


@dataclass(frozen=True)
class Picture:
    """A figure of the page, with what it shows, also for those who cannot see it."""

    svg: Markup
    caption: str


def lines(caption: str, series: Series, label: str, x_label: str = "update", log: bool = False) -> Picture:
    """Draw lines, in neighbours' means where they have many points.

    Args:
        caption: what the picture shows.
        series: x and y of each line by its name in the legend.
        label, x_label: of the axes, with units.
        log: whether the y axis is logarithmic.
    """
    with matplotlib.rc_context(_PARAMETERS):
        figure, axes = _panel()
        add_lines(axes, {name: (thinned(x), thinned(y)) for name, (x, y) in series.items()})
        for line, (x, _) in zip(axes.lines, series.values(), strict=True):
            line.set(marker="o" if len(x) < 12 else "", markersize=3)
        _finish(axes, label, x_label, log, legend=len(series) > 1)
        return _picture(figure, caption)


def bands(caption: str, series: dict[str, tuple[Sequence[float], ...]], label: str, log: bool = False) -> Picture:
    """Draw a range over the updates for each name: `series` has x, smallest and largest values."""
    with matplotlib.rc_context(_PARAMETERS):
        figure, axes = _panel()
        for (name, columns), (colour, style) in zip(series.items(), STYLES, strict=False):
            x, low, high = map(thinned, columns)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(x, low, color=colour, linestyle=style, linewidth=1)
            axes.plot(x, high, color=colour, linestyle=style, linewidth=1, label=name)
        _finish(axes, label, "update", log, legend=True)
        return _picture(figure, caption)


def history(caption: str, updates: Sequence[int], omega: StackOmega) -> Picture:
    """Draw ω by sub-layer over time: first and last of its means, those between in grey, the last one's range.

    Args:
        updates: of the rows of `omega`.
    """
    with matplotlib.rc_context(_PARAMETERS):
        figure, axes = _panel()
        add_omega(axes, omega, f"update {updates[0]:,}", f"update {updates[-1]:,}")
        _finish(axes, "ω", "sub-layer", log=False, legend=True)
        return _picture(figure, caption)


def heat_map(caption: str, beta: Sequence[Sequence[float]], largest: float) -> Picture:
    """Draw β_{i,j} from 0 to `largest`."""
    with matplotlib.rc_context(_PARAMETERS):
        figure, axes = _panel(height=3.6)
        image = add_heat_map(axes, beta, largest)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        figure.colorbar(image, ax=axes, shrink=0.8, extend="max", label="β").outline.set_visible(False)
        return _picture(figure, caption)


def thinned(values: Sequence[float]) -> list[float]:
    """The means of neighbouring values, so that at most `MAX_POINTS` are left."""
    size = -(-len(values) // MAX_POINTS) or 1
    groups = (values[start : start + size] for start in range(0, len(values), size))
    return [sum(group) / len(group) for group in groups]


def _panel(height: float = 2.7) -> tuple[Figure, Axes]:
    """As wide as a phone, so that text stays readable there."""
    figure = new_figure(4.4, height)
    return figure, figure.add_subplot()


def _finish(axes: Axes, label: str, x_label: str, log: bool, legend: bool) -> None:
    log &= axes.dataLim.y0 > 0
    plain_axes(axes, xlabel=x_label, ylabel=label, yscale="log" if log else "linear")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log:
        axes.yaxis.set_major_formatter(_PlainNumbers())
        axes.yaxis.set_minor_formatter(_PlainNumbers(minor_thresholds=(2, 0.6)))
    if legend:
        axes.figure.legend(loc="outside upper left", ncols=2, frameon=False)


class _PlainNumbers(LogFormatter):
    """0.5 where matplotlib has powers of ten."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _picture(figure: Figure, caption: str) -> Picture:
    """The figure as a part of the page; `svg.hashsalt` keeps the ids of different figures apart."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": caption}):
        figure.savefig(file, format="svg", dpi=120)
    svg = file.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    return Picture(Markup(svg.replace(_INK, "currentColor")), caption)
