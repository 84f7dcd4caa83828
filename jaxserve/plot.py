"""Charts of what was measured or simulated, drawn by matplotlib: an optional dependency, `jaxserve[plot]`."""

import importlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMATS = ("png", "svg", "pdf")
CHART_INCHES = (4.8, 3.2)
CURVE_POINTS = 200
"""Of a cumulative curve at most: more cannot be seen."""


class PlotError(ValueError):
    """Nothing can be drawn; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A curve. Points that are not finite are left out."""

    label: str
    points: tuple[tuple[float, float], ...]

    @property
    def finite(self) -> tuple[tuple[float, float], ...]:
        """The points that can be drawn."""
        return tuple((x, y) for x, y in self.points if math.isfinite(x) and math.isfinite(y))


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Curves over two axes that begin at zero; one picture of a figure."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Bars of 100%, each of parts in the order of `parts`.

    Attributes:
        parts: what the parts are called.
        bars: (name, size of each part).
    """

    title: str
    parts: tuple[str, ...]
    bars: tuple[tuple[str, tuple[float, ...]], ...]


def cumulative(label: str, values: Sequence[float]) -> Line:
    """The share of values up to each, in percent; at most CURVE_POINTS of them."""
    ordered = np.sort(np.asarray(values, np.float64))
    if not len(ordered):
        return Line(label=label, points=())
    places = np.unique(np.linspace(0, len(ordered) - 1, CURVE_POINTS).astype(int))
    points = [(float(ordered[place]), (place + 1) / len(ordered) * 100) for place in places]
    return Line(label=label, points=((points[0][0], 0.0), *points))


def check_path(path: Path) -> Path:
    """`path`, if a picture can be drawn there: asked before a long run, not after it.

    Raises:
        PlotError: matplotlib is not installed, the ending is unknown, or there is no such folder.
    """
    if path.suffix.removeprefix(".") not in FORMATS:
        raise PlotError(f"{path}: the name of a plot ends with .{', .'.join(FORMATS)}")
    if not path.parent.is_dir():
        raise PlotError(f"{path}: No such file or directory")
    _matplotlib()
    return path


def write(path: Path, charts: Sequence[Chart | Bars], *, columns: int = 2) -> None:
    """Draws charts into a file, in the format that its name ends with.

    Raises:
        PlotError: see `check_path`; also where the file cannot be written.
    """
    content = picture(charts, columns=columns, kind=check_path(path).suffix[1:])
    try:
        path.write_bytes(content)
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror}") from error


def picture(charts: Sequence[Chart | Bars], *, columns: int = 2, kind: str = "png") -> bytes:
    """Charts side by side as the bytes of a file; `kind` is one of FORMATS.

    Raises:
        PlotError: matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    columns = max(1, min(columns, len(charts)))
    rows = max(1, -(-len(charts) // columns))
    # Text stays text in SVG; and without pyplot there is no state that outlives this call.
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        size = columns * CHART_INCHES[0], rows * CHART_INCHES[1]
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        places = figure.subplots(rows, columns, squeeze=False).flat
        for axes, chart in zip(places, charts, strict=False):
            axes.set_title(chart.title)
            if isinstance(chart, Chart):
                _curves(axes, chart)
            else:
                _bars(axes, chart)
        for axes in list(figure.axes)[len(charts) :]:
            axes.remove()
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=120)
    return content.getvalue()


def _matplotlib() -> Any:
    """The library, where it is installed. Servers never draw, and it takes most of a second to import."""
    try:
        importlib.import_module("matplotlib.figure")
        return importlib.import_module("matplotlib")
    except ImportError:
        raise PlotError("plots need matplotlib: pip install 'jaxserve[plot]'") from None


def _curves(axes: Any, chart: Chart) -> None:
    for line in chart.lines:
        xs, ys = zip(*line.finite, strict=True) if line.finite else ((), ())
        axes.plot(xs, ys, label=line.label, marker="o" if len(xs) < 20 else "")
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if chart.lines:
        axes.legend(loc="best", fontsize="small")


def _bars(axes: Any, chart: Bars) -> None:
    """Horizontal bars, the first on top."""
    names, left = [name for name, _ in chart.bars], np.zeros(len(chart.bars))
    for index, part in enumerate(chart.parts):
        sizes = np.asarray([parts[index] for _, parts in chart.bars], np.float64)
        totals = np.asarray([sum(parts) or 1.0 for _, parts in chart.bars])
        axes.barh(names, sizes / totals * 100, left=left, label=part)
        left = left + sizes / totals * 100
    axes.invert_yaxis()
    axes.set_xlabel("%")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=len(chart.parts), fontsize="small")
