"""Line charts and bars as SVG text, with nothing but the standard library."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

import numpy as np

from jaxserve.sim.report import SOURCES, Report

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 34, 48
COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#555555")
CURVE_POINTS = 200
"""Of a cumulative curve at most: more cannot be seen."""


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


def figure(charts: Sequence[Chart | Bars], *, columns: int = 2) -> str:
    """Charts side by side, as one SVG document."""
    columns = max(1, min(columns, len(charts)))
    rows = max(1, -(-len(charts) // columns))
    parts = [
        f'<g transform="translate({index % columns * WIDTH} {index // columns * HEIGHT})">{_drawn(chart)}</g>'
        for index, chart in enumerate(charts)
    ]
    width, height = columns * WIDTH, rows * HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
        f'<rect width="{width}" height="{height}" fill="white"/>{"".join(parts)}</svg>\n'
    )


def cumulative(label: str, values: Sequence[float]) -> Line:
    """The share of values up to each; at most CURVE_POINTS of them."""
    ordered = np.sort(np.asarray(values, np.float64))
    if not len(ordered):
        return Line(label=label, points=())
    places = np.unique(np.linspace(0, len(ordered) - 1, CURVE_POINTS).astype(int))
    points = [(float(ordered[place]), (place + 1) / len(ordered) * 100) for place in places]
    return Line(label=label, points=((points[0][0], 0.0), *points))


def report_figure(reports: Sequence[Report]) -> str:
    """Of one or several runs: who waited how long, how requests queued, and where prompt tokens came from."""
    ttft = [
        cumulative(report.label, [r.ttft for r in report.records if r.ttft is not None]) for report in reports
    ]
    itl = [cumulative(report.label, [gap for r in report.records for gap in r.itl]) for report in reports]
    waiting = [Line(label=report.label, points=_in_flight(report)) for report in reports]
    charts = [
        Chart(title="Time to first token", x_label="seconds", y_label="% of requests", lines=tuple(ttft)),
        Chart(title="Between tokens", x_label="seconds", y_label="% of gaps", lines=tuple(itl)),
        Chart(
            title="Requests under way", x_label="seconds of traffic", y_label="requests", lines=tuple(waiting)
        ),
    ]
    return figure([*charts, _sources(reports)])


def _in_flight(report: Report) -> tuple[tuple[float, float], ...]:
    """(seconds, requests under way) at even times."""
    starts = np.sort([record.start for record in report.records])
    ends = np.sort([record.end for record in report.records])
    times = np.linspace(0, report.duration_s, CURVE_POINTS)
    counts = np.searchsorted(starts, times, side="right") - np.searchsorted(ends, times, side="right")
    return tuple(zip(times.tolist(), counts.astype(float).tolist(), strict=True))


def _sources(reports: Sequence[Report]) -> Bars:
    """Per run and role, the sources of prompt tokens."""
    bars = []
    for report in reports:
        for role in report.roles:
            sources = report.sources(role)
            bars.append((f"{report.label}: {role}", tuple(float(sources.get(name)) for name in SOURCES)))
    return Bars(title="Prompt tokens by source", parts=tuple(SOURCES.values()), bars=tuple(bars))


def _drawn(chart: Chart | Bars) -> str:
    """One chart, WIDTH x HEIGHT from the origin."""
    title = _text(WIDTH / 2, 18, chart.title, "middle", 'font-weight="bold"')
    return title + (_curves(chart) if isinstance(chart, Chart) else _bars(chart))


def _curves(chart: Chart) -> str:
    """Axes, grid, curves and their names."""
    points = [point for line in chart.lines for point in line.finite]
    x_ticks, y_ticks = (ticks(max((point[axis] for point in points), default=1.0)) for axis in (0, 1))
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + x / x_ticks[-1] * inner_width, HEIGHT - BOTTOM - y / y_ticks[-1] * inner_height

    parts = []
    for tick in x_ticks:
        x, y = place(tick, 0)
        parts.append(f'<path d="M{x:.1f} {TOP}V{y:.1f}" stroke="#e4e4e4"/>')
        parts.append(_text(x, y + 15, f"{tick:g}", "middle"))
    for tick in y_ticks:
        x, y = place(0, tick)
        parts.append(f'<path d="M{x:.1f} {y:.1f}H{WIDTH - RIGHT}" stroke="#e4e4e4"/>')
        parts.append(_text(x - 5, y + 4, f"{tick:g}", "end"))
    parts.append(_text(LEFT + inner_width / 2, HEIGHT - 12, chart.x_label, "middle"))
    middle = TOP + inner_height / 2
    parts.append(_text(14, middle, chart.y_label, "middle", f'transform="rotate(-90 14 {middle:.0f})"'))
    for index, line in enumerate(chart.lines):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line.finite)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts.append(_legend(index, line.label, colour))
    return "".join(parts)


def _bars(chart: Bars) -> str:
    """Horizontal bars, their names above them, the parts' names below."""
    inner_width, room = WIDTH - 2 * RIGHT, (HEIGHT - TOP - BOTTOM) / max(1, len(chart.bars))
    parts = []
    for row, (name, sizes) in enumerate(chart.bars):
        y, left, total = TOP + row * room, float(RIGHT), sum(sizes) or 1.0
        parts.append(_text(RIGHT, y + 12, name, "start"))
        for index, size in enumerate(sizes):
            width = size / total * inner_width
            box = f'x="{left:.1f}" y="{y + 17:.1f}" width="{width:.1f}" height="{max(4.0, room - 24):.1f}"'
            parts.append(f'<rect {box} fill="{COLOURS[index % len(COLOURS)]}"/>')
            left += width
    for index, name in enumerate(chart.parts):
        x = RIGHT + inner_width * index / len(chart.parts)
        parts.append(f'<rect x="{x:.1f}" y="{HEIGHT - 30}" width="10" height="10" fill="{COLOURS[index]}"/>')
        parts.append(_text(x + 15, HEIGHT - 21, name, "start"))
    return "".join(parts)


def ticks(top: float, *, about: int = 5) -> tuple[float, ...]:
    """Round numbers from 0 to `top` or just beyond, about so many. A top of less than 1e-9 counts as 1."""
    top = top if top >= 1e-9 and math.isfinite(top) else 1.0
    rough = top / about
    power = 10.0 ** math.floor(math.log10(rough))
    size = next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= rough), 10 * power)
    return tuple(round(index * size, 12) for index in range(math.ceil(top / size - 1e-9) + 1))


def _legend(index: int, label: str, colour: str) -> str:
    return _text(WIDTH - RIGHT - 6, HEIGHT - BOTTOM - 10 - 15 * index, label, "end", f'fill="{colour}"')


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'
