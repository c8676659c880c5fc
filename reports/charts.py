"""Charts as SVG that stands in a page: its colours follow the page's, its texts are texts, and no id occurs twice.

matplotlib draws with stand-in colours, which become the page's CSS variables, so that one picture serves light and
dark. A chart is as wide as a telephone, and is read by its description: the numbers are in the table behind it.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reports.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch

# Stand-in colours and what a page puts in their place; the order of the last ones is that of a chart's series.
_INK, _FAINT, _LIMIT = "#010101", "#020202", "#030303"
_SERIES = ("#110001", "#110002", "#110003", "#110004", "#110005", "#110006")
_VARIABLES = {
    _INK: "currentColor", _FAINT: "var(--rule)", _LIMIT: "var(--bad)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, 1)},
}  # fmt: skip
# What tells series apart where colours do not.
_MARKERS = ("o", "s", "^", "D", "v", "X")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
# Inches. 3.7 of them are 355 CSS pixels: what a telephone of 390 leaves between the margins, at a text of 12 pixels.
_WIDTH, _HEIGHT = 3.7, 2.6
_ROW = 0.165
_CELL = 0.13
_LONGEST_LABEL = 34
_MOST_POINTS = 400
# A share of a budget below this is drawn as this: on a log scale nothing has no place.
_LEAST_SHARE, _MOST_SHARE = 1e-3, 10.0
_NAMESPACES = {"": "http://www.w3.org/2000/svg", "xlink": "http://www.w3.org/1999/xlink"}
_LINK = f"{{{_NAMESPACES['xlink']}}}href"


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one name; `label` is what the legend says, and `line` whether they are joined."""

    label: str
    points: tuple[tuple[float, float], ...]
    line: bool = True


def lines(
    series: Sequence[Series], x_label: str, y_label: str, *, log: bool = False, limit: float | None = None
) -> str:
    """Curves over a number; `log` for both axes, as a power law wants them. What is not finite leaves a gap."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    with _figure(_WIDTH, _HEIGHT + 0.17 * len(series)) as figure:
        axes = figure.add_subplot()
        for index, item in enumerate(series):
            points = [(x, y if math.isfinite(y) else math.nan) for x, y in _thinned(item.points)]
            few = len(points) <= 30
            axes.plot(
                [x for x, _ in points], [y for _, y in points], label=_label(item.label, 60),
                color=_SERIES[index % len(_SERIES)], linestyle=_DASHES[(index + index // len(_SERIES)) % len(_DASHES)] if item.line else "none",
                marker=_MARKERS[index % len(_MARKERS)] if few or not item.line else "", markersize=4, linewidth=1.4,
            )  # fmt: skip
        if log:
            xs = sorted({x for item in series for x, _ in item.points})
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(xs if len(xs) <= 6 else xs[:: math.ceil(len(xs) / 6)], minor=False)
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            # Steps and layers are whole.
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if limit is not None:
            _draw_limit(axes.axhline, limit)
        axes.minorticks_off()
        axes.set(xlabel=_label(x_label), ylabel=_label(y_label))
        _legend(figure, axes)
        return _svg(figure)


def shares(rows: Sequence[str], series: Sequence[tuple[str, Sequence[float | None]]], x_label: str) -> str:
    """For each row the share of its budget that each series takes, on a log scale, with a line at the whole budget."""
    with _figure(_WIDTH, 0.75 + _ROW * len(rows) + 0.17 * len(series)) as figure:
        axes = figure.add_subplot()
        places = range(len(rows))
        beyond = False
        for index, (name, values) in enumerate(series):
            # Beside each other in a row, so that equal shares are both seen.
            aside = 0.22 * (index - (len(series) - 1) / 2)
            found = [
                (_on_scale(value), place + aside)
                for place, value in zip(places, values, strict=True)
                if value is not None
            ]
            beyond |= any(share > 1 for share, _ in found)
            axes.plot(
                [share for share, _ in found], [place for _, place in found], label=_label(name, 60), linestyle="none",
                color=_SERIES[index % len(_SERIES)], marker=_MARKERS[index % len(_MARKERS)], markersize=4.5,
            )  # fmt: skip
        axes.set(xscale="log", xlim=(_LEAST_SHARE / 1.5, _MOST_SHARE * 1.5 if beyond else 2.0), xlabel=_label(x_label))
        axes.xaxis.set_major_formatter(lambda value, _: "≤0.1%" if value <= _LEAST_SHARE else f"{100 * value:g}%")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(places, [_label(row) for row in rows])
        axes.minorticks_off()
        _draw_limit(axes.axvline, 1.0)
        _legend(figure, axes)
        return _svg(figure)


def matrix(rows: Sequence[str], columns: Sequence[str], marks: Sequence[tuple[int, int]]) -> str:
    """A square for each (row, column) of `marks`."""
    labels = [_label(row, 44) for row in rows]
    # Placed by hand, because ticks and a layout for hundreds of rows take longer than all the rest of a page.
    left = 0.1 + 0.062 * max(map(len, labels), default=0)
    top = 0.1 + 0.062 * max((len(_label(column)) for column in columns), default=0)
    width, height = left + _CELL * len(columns) + 0.1, top + _CELL * len(rows) + 0.1
    with _figure(width, height, fontsize=7) as figure:
        figure.set_layout_engine("none")
        axes = figure.add_axes((left / width, 0.1 / height, 1 - (left + 0.1) / width, 1 - (top + 0.1) / height))
        axes.set_axis_off()
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
        # One path for all squares, each a stroke as long as it is thick, and one for all lines: an element a square would
        # be most of the page.
        squares = [[(column - 0.42, float(row)), (column + 0.42, float(row))] for row, column in marks]
        right, bottom = len(columns) - 0.5, len(rows) - 0.5
        rules = [[(-0.5, float(row)), (right, float(row))] for row in range(len(rows))]
        rules += [[(float(column), -0.5), (float(column), bottom)] for column in range(len(columns))]
        axes.add_patch(_strokes(rules, _FAINT, 0.3))
        axes.add_patch(_strokes(squares, _SERIES[0], 0.84 * 72 * _CELL))
        for place, label in enumerate(labels):
            axes.text(-0.9, place, label, ha="right", va="center")
        for place, label in enumerate(columns):
            axes.text(place, -0.9, _label(label), ha="center", va="bottom", rotation=90)
        return _svg(figure)


def _strokes(ends: Sequence[Sequence[tuple[float, float]]], colour: str, width: float) -> PathPatch:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    path = Path([end for pair in ends for end in pair] or [(0, 0)], [Path.MOVETO, Path.LINETO] * len(ends) or None)
    return PathPatch(path, edgecolor=colour, facecolor="none", linewidth=width, capstyle="butt")


def _on_scale(share: float) -> float:
    return min(max(share, _LEAST_SHARE), _MOST_SHARE) if not math.isnan(share) else _MOST_SHARE


def _label(text: str, most: int = _LONGEST_LABEL) -> str:
    text = one_line(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """No more points than a chart has pixels."""
    return points if len(points) <= _MOST_POINTS else points[:: math.ceil(len(points) / _MOST_POINTS)]


def _draw_limit(draw: Any, at: float) -> None:
    draw(at, color=_LIMIT, linewidth=1.2, linestyle=(0, (6, 2)))


def _legend(figure: Figure, axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        figure.legend(loc="outside upper left", ncols=1, frameon=False, handlelength=3)


@contextmanager
def _figure(width: float, height: float, fontsize: float = 9) -> Iterator[Figure]:
    # matplotlib takes as long to import as a small run takes in all, and only a page needs it.
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "v32", "font.family": "sans-serif", "font.size": fontsize,
        "axes.labelsize": fontsize, "xtick.labelsize": fontsize, "ytick.labelsize": fontsize,
        "legend.fontsize": fontsize, "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK,
        "ytick.color": _INK, "axes.edgecolor": _FAINT, "axes.facecolor": "none", "axes.grid": True,
        "grid.color": _FAINT, "grid.linewidth": 0.5, "axes.spines.top": False, "axes.spines.right": False,
        # A name may hold a dollar sign, which would start a formula.
        "text.parse_math": False, "axes.formatter.use_mathtext": False, "axes.unicode_minus": True,
    }  # fmt: skip
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # The page's fonts show the text, not matplotlib's, which only measures it.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        # A text that is wider than the picture is cut, which the reader sees.
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)
        yield Figure(figsize=(width, height), layout="constrained", facecolor="none")


def _svg(figure: Figure) -> str:
    """The figure as an element for a page: without declaration, metadata and unused ids, coloured by the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    for prefix, uri in _NAMESPACES.items():
        ElementTree.register_namespace(prefix, uri)
    # matplotlib names the DTD of SVG 1.1, which nobody reads.
    root = ElementTree.fromstring(re.sub(r"<!DOCTYPE[^>]*>", "", file.getvalue()))
    # Its style sheet would be that of the whole page; what it says is inherited from here as well.
    for child in [child for child in root if child.tag.endswith("}metadata") or child.find("{*}style") is not None]:
        root.remove(child)
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    used = set(re.findall(r'"#([^"]+)"|url\(#([^)]+)\)', ElementTree.tostring(root, "unicode")))
    kept = {name for pair in used for name in pair if name}
    for element in root.iter():
        if element.get("id") not in kept:
            element.attrib.pop("id", None)
        # matplotlib names its own fonts; the page has better ones.
        if "font-family" in (style := element.get("style", "")):
            element.set("style", re.sub(r" font-family: [^;]*;", "", style))
    text = ElementTree.tostring(root, "unicode")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def placed(svg: str, prefix: str, label: str) -> str:
    """The SVG of a chart with its ids made its own in a page, and its description for who does not see it."""
    root = ElementTree.fromstring(svg)
    for prefix_, uri in _NAMESPACES.items():
        ElementTree.register_namespace(prefix_, uri)
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, f"{prefix}-{value}")
            elif name == _LINK:
                element.set(name, f"#{prefix}-{value.removeprefix('#')}")
            elif "url(#" in value:
                element.set(name, value.replace("url(#", f"url(#{prefix}-"))
    root.set("role", "img")
    root.set("aria-label", one_line(label))
    root.attrib.pop("version", None)
    return ElementTree.tostring(root, "unicode")
